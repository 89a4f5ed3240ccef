"""Evaluations: the effect of a live method or a codec on a model, in numbers, always beside the untouched cache.

`evaluation` defines what an evaluation is, `variants` the caches that are compared, and `runner` runs it; `metrics`
compares caches and logits, `statistics` makes tables of records.

A new evaluation is one file in `tasks/`: a subclass of `Evaluation` with the decorator `@evaluations.register("name")`.
Nothing else is edited; its docstring and options become `mlxkv eval NAME --help`. Packages outside mlxkv add
evaluations by the entry point group `mlxkv.evaluations`.
"""

from mlxkv.evaluate.evaluation import Evaluation as Evaluation
from mlxkv.evaluate.evaluation import evaluations as evaluations

"""Evaluations: the effect of a live method or a codec on a model, in numbers, always beside the untouched cache.

evaluation.py says what an evaluation is, tasks/ has one a file, variants.py says what is evaluated, runner.py runs it.
"""

from mlxkv.evaluate.evaluation import Evaluation as Evaluation
from mlxkv.evaluate.evaluation import evaluations as evaluations

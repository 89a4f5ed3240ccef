"""Evaluations: what a method does to a model, in numbers. Every file without a leading underscore is one. It has

    Options                             a frozen dataclass that validates itself, its fields made by `_run.option`
    SCORES                              the numbers of a record that tables show, as means over samples
    units(tokenizer, options, seed)     the samples of a seed, each with what measures it, a `_run.Unit`

and is found by its name: by `mlxkv eval`, which makes the fields of Options its options, and by `_run.run`. What is
evaluated is a `_variants.Variant`: a live cache, a codec, or the untouched cache, which is always measured too.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from types import ModuleType

from mlxkv.errors import InputError


def names() -> list[str]:
    """All evaluations."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def evaluation(name: str) -> ModuleType:
    """The module of an evaluation. Raises InputError listing those there are."""
    if name not in names():
        raise InputError(f"no evaluation {name!r}; there are {', '.join(names())}")
    return import_module(f"{__name__}.{name}")

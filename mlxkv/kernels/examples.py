"""Calls of every kernel, worth timing and worth checking on a new machine. Each kernel's module has its own EXAMPLES."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import mlx.core as mx
import numpy as np

import mlxkv.kernels

# Largest relative and absolute difference from the reference. Integers are identical.
TOLERANCE = {mx.float32: (1e-5, 1e-6), mx.float16: (2e-3, 1e-3), mx.bfloat16: (1.6e-2, 8e-3)}


@dataclass(frozen=True)
class Example:
    """A module's reference_<op> and metal_<op>, to be called with `arguments(tokens)`. `module` is filled in by `all_examples`."""

    op: str
    label: str
    arguments: Callable[[int], tuple]
    tokens: int = 4096
    module: str = ""

    def function(self, path: str) -> Callable[..., Any]:
        """path: "reference" or "metal"."""
        found: Callable[..., Any] = getattr(import_module(f"mlxkv.kernels.{self.module}"), f"{path}_{self.op}")
        return found

    def agrees(self, arguments: tuple) -> bool:
        """Whether the kernel's results are its reference's: same shapes and types, values within TOLERANCE."""
        expected, found = (arrays(self.function(path)(*arguments)) for path in ("reference", "metal"))
        return len(expected) == len(found) and all(_same(*pair) for pair in zip(found, expected))


def all_examples() -> Iterator[Example]:
    """The EXAMPLES of every module in this package that has some."""
    for info in iter_modules(mlxkv.kernels.__path__):
        for example in getattr(import_module(f"mlxkv.kernels.{info.name}"), "EXAMPLES", ()):
            yield replace(example, module=info.name)


def arrays(tree: Any) -> list[mx.array | np.ndarray]:
    """The arrays in arguments or results: tuples, lists and dataclasses of arrays, all else left out."""
    if isinstance(tree, mx.array | np.ndarray):
        return [tree]
    if is_dataclass(tree):
        return [leaf for field in fields(tree) for leaf in arrays(getattr(tree, field.name))]
    return [leaf for part in tree for leaf in arrays(part)] if isinstance(tree, tuple | list) else []


def _same(*pair: mx.array | np.ndarray) -> bool:
    found, expected = (mx.array(one) for one in pair)
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return False
    if found.dtype not in TOLERANCE:
        return bool(mx.array_equal(found, expected))
    relative, absolute = TOLERANCE[found.dtype]
    wide = found.astype(mx.float32), expected.astype(mx.float32)
    return bool(mx.allclose(*wide, rtol=relative, atol=absolute, equal_nan=True))

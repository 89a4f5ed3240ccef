"""The registry of kernels: each operation's three functions, and calls of them worth checking and timing.

The file of a kernel registers its operations, following the protocol in `mlxkv.kernels`. `mlxkv doctor` checks every example
on a new machine, and `benchmarks/experiments/kernels.py` times them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from inspect import signature

import mlx.core as mx
import numpy as np

from mlxkv.errors import InputError
from mlxkv.registry import Registry

# Largest relative and absolute difference from the reference. Integers are identical.
TOLERANCE = {mx.float32: (1e-5, 1e-6), mx.float16: (2e-3, 1e-3), mx.bfloat16: (1.6e-2, 8e-3)}


@dataclass(frozen=True)
class Example:
    """A call of an operation with sizes of a real model.

    Parameters
    ----------
    label
        Readable description of the sizes.
    arguments
        A function from a number of tokens to the operation's positional arguments.
    tokens
        The number of tokens at which a benchmark times the call.
    """

    label: str
    arguments: Callable[[int], tuple[object, ...]]
    tokens: int = 4096


@dataclass(frozen=True)
class Operation:
    """One operation of a kernel: three functions of one signature, parameters' names, defaults and types included.

    Parameters
    ----------
    name
        File and operation, such as "bits.pack".
    dispatch
        The function that other rooms call: `metal` where `mlxkv.kernels.metal.available()`, else `reference`.
    reference
        Plain MLX or NumPy operations, on any device: the definition of the result.
    metal
        The call of the Metal kernel, whose result is that of `reference`, floats within `TOLERANCE`.
    examples
        At least one call.

    Raises
    ------
    InputError
        Without examples, or when the three signatures differ.
    """

    name: str
    dispatch: Callable[..., object]
    reference: Callable[..., object]
    metal: Callable[..., object]
    examples: tuple[Example, ...]

    def __post_init__(self) -> None:
        if not self.examples:
            raise InputError(f"the operation {self.name} needs an example, which mlxkv doctor can check")
        expected = signature(self.dispatch)
        for function in (self.reference, self.metal):
            if signature(function) != expected:
                raise InputError(
                    f"{self.name}: a function has {signature(function)} where the dispatcher has {expected}"
                )

    def agrees(self, arguments: tuple[object, ...]) -> bool:
        """Check whether kernel and reference give the same shapes, the same types and values within `TOLERANCE`.

        Parameters
        ----------
        arguments
            Positional arguments of one call.

        Returns
        -------
        bool
            False too when the results hold different numbers of arrays.
        """
        expected, found = (arrays(path(*arguments)) for path in (self.reference, self.metal))
        return len(expected) == len(found) and all(_same(*pair) for pair in zip(found, expected))


kernel_operations: Registry[Operation] = Registry("kernel operation", "mlxkv.kernels")


def register(operation: Operation) -> None:
    """Add an operation to `kernel_operations`, under its name.

    Parameters
    ----------
    operation
        An operation that the calling file defines.
    """
    kernel_operations.register(operation.name)(operation)


def iter_examples() -> Iterator[tuple[Operation, Example]]:
    """Yield every example of every registered operation.

    Yields
    ------
    tuple[Operation, Example]
        Sorted by the operation's name.

    Examples
    --------
    >>> sorted({operation.name for operation, _ in iter_examples()})[:4]
    ['bits.pack', 'bits.unpack', 'centroids.assign', 'centroids.sums']
    """
    for _, operation in kernel_operations.items():
        for example in operation.examples:
            yield operation, example


def arrays(tree: object) -> list[mx.array | np.ndarray]:
    """Return the arrays in an operation's arguments or results.

    Parameters
    ----------
    tree
        An array, or a tuple, list or dataclass of such; everything else holds no arrays.

    Returns
    -------
    list[mx.array | np.ndarray]
        The arrays, in order.
    """
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

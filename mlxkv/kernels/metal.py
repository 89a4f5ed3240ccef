"""Metal kernels by name: `metal_kernels/<name>.metal` is the body of a function, `common.metal` goes before each.

`mx.fast.metal_kernel` writes the function's signature around the body: https://ml-explore.github.io/mlx, "Custom
Metal Kernels". Facts that shape the bodies: inputs of fewer than 8 elements come in the `constant` address space,
others in `device`; 0-d inputs are references; with `atomic` every output is one; a grid of no threads is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import cast

import mlx.core as mx

from mlxkv.bundled.resources import resource_dir


@dataclass(frozen=True, eq=False)
class Kernel:
    """A body and the names of its buffers, compiled on first call for each combination of types.

    Parameters
    ----------
    name
        The body's file, without `.metal`.
    inputs
        Names of the input buffers, in the order of a call's arrays.
    outputs
        Names of the output buffers.
    atomic
        Make every output an array of atomics, to which threads may add at the same time.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    atomic: bool = False

    def __call__(
        self,
        *,
        inputs: Sequence[mx.array],
        grid: tuple[int, ...],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
        template: Sequence[tuple[str, object]] = (),
        init_value: float | None = None,
    ) -> list[mx.array]:
        """Run the kernel.

        Parameters
        ----------
        inputs
            An array for each input buffer.
        grid
            Numbers of threads in three dimensions, at least 1 each.
        threadgroup
            Numbers of threads that share threadgroup memory, at most 1024 in all.
        output_shapes
            A shape for each output buffer.
        output_dtypes
            A type for each output buffer.
        template
            Names that the body uses for types, integers and booleans; each combination is compiled once.
        init_value
            The value that all elements of all outputs start from; None leaves them undefined.

        Returns
        -------
        list[mx.array]
            An array for each output buffer.
        """
        return compiled(self)(
            inputs=inputs,
            template=list(template),
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=output_shapes,
            output_dtypes=output_dtypes,
            init_value=init_value,
        )


def available() -> bool:
    """Check whether dispatchers call Metal.

    Returns
    -------
    bool
        True where the default device is a GPU that Metal runs.
    """
    return mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu)


def source(name: str) -> str:
    """Return the text of one file in metal_kernels/.

    Parameters
    ----------
    name
        The file's name, without `.metal`.

    Returns
    -------
    str
        ASCII text.

    Examples
    --------
    >>> "exp" in source("decode_attention")
    True
    """
    return (resource_dir("metal_kernels") / f"{name}.metal").read_text("ascii")


@cache
def compiled(kernel: Kernel) -> Callable[..., list[mx.array]]:
    """Return MLX's callable for a kernel. MLX compiles it when it is first called.

    Parameters
    ----------
    kernel
        A declared kernel.

    Returns
    -------
    Callable[..., list[mx.array]]
        The result of `mx.fast.metal_kernel`, made once for each kernel.
    """
    kernel_call = mx.fast.metal_kernel(
        name=f"mlxkv_{kernel.name}",
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=source(kernel.name),
        header=source("common"),
        atomic_outputs=kernel.atomic,
    )
    return cast(Callable[..., list[mx.array]], kernel_call)  # MLX says only that it is an object


@lru_cache(maxsize=64)
def factor(value: float) -> mx.array:
    """Return a number as kernels read it: templates hold no floats.

    Parameters
    ----------
    value
        The number.

    Returns
    -------
    mx.array
        float32 `[1]`.
    """
    return mx.array([value], mx.float32)

"""Metal kernels by name: `metal_kernels/<name>.metal` is the body of a function, `common.metal` goes before each.

`mx.fast.metal_kernel` writes the function's signature around the body: https://ml-explore.github.io/mlx, "Custom
Metal Kernels". Facts that shape the bodies: inputs of fewer than 8 elements come in the `constant` address space,
others in `device`; 0-d inputs are references; with `atomic` every output is one; a grid of no threads is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx

from mlxkv.bundled.resources import resource_dir


@dataclass(frozen=True)
class Kernel:
    """A body and the names of its buffers, compiled on first call for each combination of types.

    Call it with the keywords of MLX's kernels: inputs, template, grid (threads), threadgroup, output_shapes,
    output_dtypes, init_value. It returns the list of outputs.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    atomic: bool = False

    def __call__(self, **call: Any) -> list[mx.array]:
        return compiled(self)(**call)


def available() -> bool:
    """Whether dispatchers take Metal: the default device is a GPU that Metal runs."""
    return mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu)


def source(name: str) -> str:
    """The text of one file in metal_kernels/."""
    return (resource_dir("metal_kernels") / f"{name}.metal").read_text("ascii")


@cache
def compiled(kernel: Kernel) -> Any:
    """MLX's callable for a kernel. MLX compiles it when it is first called."""
    return mx.fast.metal_kernel(
        name=f"mlxkv_{kernel.name}",
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=source(kernel.name),
        header=source("common"),
        atomic_outputs=kernel.atomic,
    )

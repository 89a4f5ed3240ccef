"""Metal's kernels where there is no Metal: one operation each, with results of the right shape and type and no meaning.

What a program does before a GPU can start does not depend on values, so it can be timed and counted on any machine. Not in it is
what MLX does when a kernel of somebody's own is called, which it refuses without Metal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import mlx.core as mx

from mlxkv.kernels import metal

Shape = tuple[int, ...]
_new: list[mx.array] = []  # that may not be computed yet


@contextmanager
def metal_path() -> Iterator[Counter[str]]:
    """Let the library and MLX take the path that they take on Metal; inside, count the launches of each of the library's kernels.

    MLX's own fast operations, which without Metal are a dozen plain ones, are one each as on Metal.
    """
    launches: Counter[str] = Counter()

    @cache
    def compiled(kernel: metal.Kernel) -> Callable[..., list[mx.array]]:
        return _kernel(kernel, launches)

    stubs: list[tuple[Any, str, Any]] = [
        (metal, "available", lambda: True),
        (metal, "compiled", compiled),
        (mx.fast, "rms_norm", rms_norm),
        (mx.fast, "layer_norm", layer_norm),
        (mx.fast, "rope", rope),
        (mx.fast, "scaled_dot_product_attention", scaled_dot_product_attention),
        (mx, "quantize", quantize),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in stubs]
    try:
        for owner, name, stub in stubs:
            setattr(owner, name, stub)
        yield launches
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _kernel(kernel: metal.Kernel, launches: Counter[str]) -> Callable[..., list[mx.array]]:
    """Return what stands in for a compiled kernel: its arguments are checked as far as MLX's own call does."""

    def call(
        *,
        inputs: Sequence[Any],
        template: Sequence[tuple[str, object]],
        grid: Shape,
        threadgroup: Shape,
        output_shapes: Sequence[Shape],
        output_dtypes: Sequence[mx.Dtype],
        init_value: float | None,
    ) -> list[mx.array]:
        given = len(inputs), len(output_shapes), len(output_dtypes)
        if given != (len(kernel.inputs), len(kernel.outputs), len(kernel.outputs)):
            raise ValueError(
                f"{kernel.name} takes {len(kernel.inputs)} inputs and {len(kernel.outputs)} outputs: {given}"
            )
        launches[kernel.name] += 1
        results = [_zeros(tuple(shape), dtype) for shape, dtype in zip(output_shapes, output_dtypes)]
        return mx.depends(results, [x for x in inputs if isinstance(x, mx.array)])

    return call


@cache
def _zeros(shape: Shape, dtype: mx.Dtype) -> mx.array:
    """Return zeros, one array for each shape; they are computed with what depends on them, since computing is not to be timed."""
    zeros = mx.zeros(shape, dtype)
    _new.append(zeros)
    return zeros


def compute_zeros() -> None:
    """Compute all zeros that stubs have returned, so that the operations that make them are not counted."""
    mx.eval(_new)
    _new.clear()


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """Stand in for MLX's, as the others here do."""
    return mx.depends(_zeros(x.shape, x.dtype), [x] if weight is None else [x, weight])


def layer_norm(x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float) -> mx.array:
    return mx.depends(_zeros(x.shape, x.dtype), [part for part in (x, weight, bias) if part is not None])


def rope(
    x: mx.array,
    dims: int,
    *,
    traditional: bool,
    base: float | None,
    scale: float,
    offset: Any,
    freqs: mx.array | None = None,
) -> mx.array:
    return mx.depends(_zeros(x.shape, x.dtype), [part for part in (x, offset, freqs) if isinstance(part, mx.array)])


def scaled_dot_product_attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, sinks: mx.array | None = None
) -> mx.array:
    arrays = [part for part in (q, k, v, mask, sinks) if isinstance(part, mx.array)]
    return mx.depends(_zeros((*q.shape[:-1], v.shape[-1]), q.dtype), arrays)


def quantize(w: mx.array, group_size: int = 64, bits: int = 4) -> list[mx.array]:
    *rows, dims = w.shape
    scales = _zeros((*rows, dims // group_size), w.dtype)
    return mx.depends([_zeros((*rows, dims * bits // 32), mx.uint32), scales, scales], [w])

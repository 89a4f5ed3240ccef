"""Launches of attention over digits: planned once for their shapes, then looked up."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxkv.errors import MismatchError
from mlxkv.kernels._packed_launch import MAX_DIMS, REGISTERS, SIMD_GROUPS, SMALLEST, THREADGROUP

Shape = tuple[int, ...]

TILE = 128  # rows of a bucket that share a scale a channel: what a split is made of
UNIT = 127  # what 1 is in a basis
FULL = 256  # threadgroups that busy any GPU: then splits take more tiles, for each turns queries again


class Launch(NamedTuple):
    """Plan of the two launches of a call, without its arrays; the same until tokens are packed."""

    template: list[tuple[str, object]]
    grid: tuple[int, int, int]
    width: int  # of a head's row of parts, without scores
    merge_template: list[tuple[str, object]]
    merge_grid: tuple[int, int, int]
    shape: Shape  # of the output
    gaps: bool  # whether some bucket has no rows, or no digits
    sizes: mx.array


def check_shapes(queries: Shape, sinks: Shape | None, tail: tuple[Shape, Shape]) -> None:
    """Check that queries of one token, unquantized keys and the tail's values fit together."""
    B, Hq, L, D = queries
    _, H, room, Dv = tail[1]
    for name, shape, rows in (("the tail's keys", tail[0], room), ("sinks", sinks, sinks and sinks[2])):
        if shape is not None and (L != 1 or Hq % H or shape != (B, H, rows, D) or tail[1] != (B, H, room, Dv)):
            raise MismatchError(f"{name} {shape} and values {tail[1]} do not fit queries {queries} of one token")


@lru_cache(maxsize=1024)
def layout(
    queries: Shape,
    dtype: mx.Dtype,
    sinks: Shape | None,
    tail: tuple[Shape, Shape],
    keys: tuple[Shape, ...],
    values: tuple[Shape, ...],
    logits: bool,
) -> Launch | None:
    """Plan a call for its shapes, those of codes among them; None where the kernel does not take them."""
    check_shapes(queries, sinks, tail)
    B, Hq, _, D = queries
    _, H, room, Dv = tail[1]
    rows = [shape[2] for shape in keys]
    widths = [[shape[3] for shape in slot] for slot in (keys, values)]
    arrays = [math.prod(shape) for shape in (*keys, *values)] + [4 * B * H * max(slot) for slot in widths]
    if (
        rows != [shape[2] for shape in values]
        or max(D, Dv) > MAX_DIMS
        or min(D, Dv) < SMALLEST
        or any(0 < size < SMALLEST for size in arrays)
    ):
        return None
    if not any(widths[0]) or not any(widths[1]) or not sum(rows):
        return None
    K, V = (-(-max(slot) // 32) for slot in widths)  # bytes of a lane
    group = Hq // H
    passes = -(-group // _heads_at_once(D, Dv, K, V))
    columns = B * H * passes
    tiles = [-(-count // TILE) for count in rows]
    per = max(1, -(-sum(tiles) * columns // FULL))
    splits = [-(-count // per) for count in tiles]
    template: list[tuple[str, object]] = [
        ("D", D), ("DV", Dv), ("GROUP", group), ("HEADS", -(-group // passes)), ("K_BYTES", K), ("V_BYTES", V),
        ("UNIT", UNIT), ("LOGITS", logits), ("SIMD_GROUPS", SIMD_GROUPS),
    ]  # fmt: skip
    merging: list[tuple[str, object]] = [
        ("DV", Dv), ("GROUP", group), ("V_BYTES", V), ("UNIT", UNIT), ("SIMD_GROUPS", SIMD_GROUPS), ("OUT", dtype),
    ]  # fmt: skip
    return Launch(
        template,
        (THREADGROUP[0], 1 + sum(splits), columns),
        Dv + 2 + sum(count * (4 * width + 2) for count, width in zip(splits, widths[1])),
        merging,
        (THREADGROUP[0], B * H * (group + 1), 1),
        (B, Hq, 1, Dv),
        0 in arrays,
        mx.array(np.array([*rows, *widths[0], *widths[1], sinks[2] if sinks else 0, room, H, per], np.int32)),
    )


@lru_cache(maxsize=1024)
def newest_rows(rows: int) -> mx.array:
    """Return how many rows of the tail count, as kernels read it: int32 `[1]`."""
    return mx.array([rows], mx.int32)


@lru_cache(maxsize=1)
def nothing() -> mx.array:
    """Return what stands for codes that a bucket does not have; never read."""
    return mx.array(np.zeros((1, 1, 1, SMALLEST), np.uint8))


def _heads_at_once(D: int, Dv: int, K: int, V: int) -> int:
    """Return with how many query heads a SIMD-group attends at once: as many as its registers hold, at least one."""
    own = [max(4 * count, 1 << max(0, (dim - 1).bit_length() - 5)) for dim, count in ((D, K), (Dv, V))]
    fitting = [n for n in range(1, 9) if n * sum(own) + 4 * (1 << (n - 1).bit_length()) + 4 * max(K, V) <= REGISTERS]
    return max(fitting, default=1)

"""Launches of packed attention: checked and planned once for their shapes, then looked up."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxkv.errors import InputError, MismatchError
from mlxkv.kernels._rotation import turn
from mlxkv.kernels.bits import UNQUANTIZED
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.kernels.metal import factor

Pair = tuple[mx.array, mx.array]
Shape = tuple[int, ...]

SIMD_GROUPS = 8  # of a threadgroup: 256 threads start whatever registers the compiler gives them
THREADGROUP = (32 * SIMD_GROUPS, 1, 1)
REGISTERS = 76  # that queries, sums, scores and scales may have of a lane: 2 threadgroups then fit a core
MAX_DIMS = 256  # of keys or values
SMALLEST = 8  # dims: a buffer of fewer elements comes in another address space
ONE_PASS_TOKENS = 512  # up to which one threadgroup takes all tokens of its heads, and no second launch merges
SPLIT_TOKENS = 128  # that a threadgroup of the first pass takes, or more
FULL = 512  # threadgroups that busy any GPU: then splits grow longer, not more


class Launch(NamedTuple):
    """Plan of a launch, without its arrays; the same for every layer, and for 16 tokens in a row."""

    template: list[tuple[str, object]]
    grid: tuple[int, int, int]
    shapes: list[Shape]
    dtypes: list[mx.Dtype]
    k_turn: mx.array
    v_turn: mx.array
    merge: Launch | None


class Layout(NamedTuple):
    """Sizes of a call that were checked, and its launch; None where the kernel of buckets does it."""

    kv_heads: int
    value_dim: int
    rows: tuple[int, int, int]
    launch: Launch | None


def described(
    queries: mx.array,
    sinks: Pair | None,
    packed: Bucket | None,
    tail: Pair | None,
    lengths: mx.array | None,
    bias: mx.array | None,
    logits: mx.array | None,
) -> tuple:
    """Return all that the launch of a call depends on, for look-up."""
    parts = None
    if packed is not None:
        k, v = packed
        parts = (
            (k.words.shape, k.bits, k.dim, k.tile_tokens, k.tile_dims, k.rotated),
            (v.words.shape, v.bits, v.dim, v.tile_tokens, v.tile_dims, v.rotated),
        )
    return (
        queries.shape,
        queries.dtype,
        None if sinks is None else (sinks[0].shape, sinks[1].shape, sinks[0].dtype, sinks[1].dtype),
        parts,
        None if tail is None else (tail[0].shape, tail[1].shape, tail[0].dtype, tail[1].dtype),
        None if lengths is None else lengths.shape,
        None if bias is None else bias.shape,
        None if logits is None else logits.shape,
    )


@lru_cache(maxsize=256)
def layout(
    queries: Shape,
    dtype: mx.Dtype,
    sinks: tuple | None,
    packed: tuple | None,
    tail: tuple | None,
    lengths: Shape | None,
    bias: Shape | None,
    logits: Shape | None,
) -> Layout:
    """Check shapes and types, and plan the launch, once for each combination of them."""
    shapes = [
        None if sinks is None else sinks[:2],
        None if packed is None else tuple((*words[:-1], dim) for words, _, dim, *_ in packed),
        None if tail is None else tail[:2],
    ]
    parts = [part for part in shapes if part is not None]
    if not parts:
        raise InputError("attention needs sinks, packed tokens or a tail; each may hold 0 tokens")
    B, Hq, L, D = queries
    _, Hkv, _, Dv = parts[0][1]
    if L != 1 or Hq % Hkv:
        raise MismatchError(f"queries {queries}: expected one token and a multiple of {Hkv} heads")
    for keys, values in parts:
        if keys != (B, Hkv, keys[2], D) or values != (B, Hkv, keys[2], Dv):
            raise MismatchError(
                f"keys {keys} and values {values} do not fit queries {queries}, {Hkv} kv heads and {Dv} value dims"
            )
    types = {kind for part in (sinks, tail) if part is not None for kind in part[2:]}
    if len(types) > 1:
        raise MismatchError(f"unquantized keys and values are of types {sorted(map(str, types))}, expected one type")
    rows = tuple(0 if part is None else part[0][2] for part in shapes)
    T = sum(rows)
    for name, shape, expected in (
        ("lengths", lengths, [(B,)]),
        ("bias", bias, [(B, 1, T), (B, Hkv, T), (B, Hq, T)]),
        ("logits", logits, [(Hq,)]),
    ):
        if shape is not None and shape not in expected:
            raise MismatchError(f"{name} {shape} should be {' or '.join(map(str, expected))}")
    given = [part is not None for part in (sinks, packed, tail, lengths, bias, logits)]
    empty = any(keys[2] == 0 for keys, _ in parts)
    launch = None if empty else _plan(queries, dtype, Hkv, Dv, T, packed, given)
    return Layout(Hkv, Dv, (rows[0], rows[1], rows[2]), launch)


def _plan(
    queries: Shape, dtype: mx.Dtype, Hkv: int, Dv: int, T: int, packed: tuple | None, given: list[bool]
) -> Launch | None:
    """Choose heads of a SIMD-group and splits; None for heads that are too wide or narrow, and unquantized `packed`."""
    B, Hq, _, D = queries
    keys, values = packed or ((None, 2, D, 1, 1, False), (None, 2, Dv, 1, 1, False))
    heads = _heads_at_once(D, Dv)
    if not heads or min(D, Dv) < SMALLEST or max(keys[1], values[1]) >= UNQUANTIZED:
        return None
    group = Hq // Hkv
    passes = -(-group // heads)
    columns = B * Hkv * passes
    splits = 1 if T <= ONE_PASS_TOKENS else min(-(-T // SPLIT_TOKENS), max(1, -(-FULL // columns)))
    sinks, has_packed, tail, lengths, bias, logits = given
    flags = (sinks, has_packed, tail, lengths and tail, bias, logits, keys[5], values[5], splits == 1)
    template: list[tuple[str, object]] = [
        ("D", D),
        ("DV", Dv),
        ("GROUP", group),
        ("HEADS", -(-group // passes)),
        ("K_BITS", keys[1]),
        ("K_TOKENS", keys[3]),
        ("K_DIMS", keys[4]),
        ("V_BITS", values[1]),
        ("V_TOKENS", values[3]),
        ("V_DIMS", values[4]),
        ("PARTS", sum(flag << i for i, flag in enumerate(flags))),
        ("SIMD_GROUPS", SIMD_GROUPS),
        ("OUT", dtype if splits == 1 else mx.float32),
    ]
    shape = (B, Hq, 1, Dv)
    k_turn, v_turn = (turn(dim) if turned else factor(1.0) for dim, turned in ((D, keys[5]), (Dv, values[5])))
    grid = (THREADGROUP[0], splits, columns)
    if splits == 1:
        return Launch(template, grid, [shape], [dtype], k_turn, v_turn, None)
    merging: list[tuple[str, object]] = [
        ("DV", Dv),
        ("V_TURNED", values[5]),
        ("SIMD_GROUPS", SIMD_GROUPS),
        ("OUT", dtype),
    ]
    merge = Launch(merging, (THREADGROUP[0], B * Hq, 1), [shape], [dtype], k_turn, v_turn, None)
    return Launch(template, grid, [(B, Hq, splits, Dv + 2)], [mx.float32], k_turn, v_turn, merge)


def _heads_at_once(D: int, Dv: int) -> int:
    """Return with how many query heads a SIMD-group attends at once: as many as its registers hold, 0 for none."""
    if max(D, Dv) > MAX_DIMS:
        return 0
    K, V = (1 << max(0, (dim - 1).bit_length() - 5) for dim in (D, Dv))  # dims of a lane: a power of two
    fitting = [n for n in range(1, 9) if n * (K + V) + 4 * (1 << (n - 1).bit_length()) + 2 * max(K, V) <= REGISTERS]
    return max(fitting, default=0)


@lru_cache(maxsize=1)
def nothing() -> mx.array:
    """Return what stands for arrays that a call does not have; never read."""
    return mx.array(np.zeros((1, 1, 1, 8), np.uint32))

"""Attention of one new token over all that a packing cache keeps of a layer: sinks, packed tokens and newest tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxkv.errors import InputError, MismatchError
from mlxkv.kernels import metal
from mlxkv.kernels._products import scores_of, softmax, weighted_sum
from mlxkv.kernels._rotation import rotate, rotate_back, rotation
from mlxkv.kernels.bits import UNQUANTIZED, reference_pack
from mlxkv.kernels.decode_attention import Bucket, decode_attention
from mlxkv.kernels.metal import Kernel
from mlxkv.kernels.operations import Example, Operation, register

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

_ATTEND = Kernel(
    "packed_attention",
    inputs=(
        "queries", "sinks_k", "sinks_v", "k", "k_shift", "k_scale", "v", "v_shift", "v_scale", "tail_k", "tail_v",
        "lengths", "bias", "logits", "scale", "k_turn", "v_turn",
    ),
    outputs=("out",),
)  # fmt: skip
_MERGE = Kernel("packed_attention_merge", inputs=("partials", "v_turn"), outputs=("out",))


def packed_attention(
    queries: mx.array,
    sinks: Pair | None,
    packed: Bucket | None,
    tail: Pair | None,
    scale: float,
    lengths: mx.array | None = None,
    bias: mx.array | None = None,
    logits: mx.array | None = None,
) -> mx.array:
    """Return softmax(scale * queries . keys + bias) . values of one token, accumulated in float32.

    Parameters
    ----------
    queries
        `[B, Hq, 1, D]`, float32, float16 or bfloat16. Hq is a multiple of Hkv: query head h reads key/value head
        h // (Hq // Hkv).
    sinks
        Unquantized keys `[B, Hkv, n, D]` and values `[B, Hkv, n, Dv]` of one float type; None for none.
    packed
        Quantized keys and values, each with its own bits and tiles, rotated or not; None for none.
    tail
        Like `sinks`, and of the same type: a buffer whose first rows are the newest tokens.
    scale
        Factor on the products, such as D**-0.5.
    lengths
        How many rows of the tail each batch row has, int32 `[B]`; the rows after them count for nothing, but have to be
        finite. None for all rows of the buffer. The values are not checked, which would wait for the device.
    bias
        Added to the scaled products, `[B, 1 or Hkv or Hq, T]` of any float type, of all T rows: sinks, packed tokens,
        then the whole buffer of the tail; -inf masks a token. None adds nothing.
    logits
        Attention sinks, `[Hq]` of any float type: a logit of each query head that takes part in its softmax, as the score
        of a token whose value is 0 (gpt-oss, https://arxiv.org/abs/2508.10925). None for none.

    Returns
    -------
    mx.array
        `[B, Hq, 1, Dv]` of queries' type. Zeros where every token is masked, or there is none.

    Raises
    ------
    InputError
        Without sinks, packed tokens and tail.
    MismatchError
        For shapes or types that do not fit together.

    Examples
    --------
    >>> from mlxkv.kernels.bits import pack
    >>> old, new = mx.random.normal((1, 2, 128, 64)), mx.random.normal((1, 2, 16, 64))
    >>> packed = pack(old, bits=8, tile_tokens=64, tile_dims=1), pack(old, bits=8, tile_tokens=1, tile_dims=64)
    >>> packed_attention(mx.random.normal((1, 8, 1, 64)), None, packed, (new, new), 0.125, mx.array([5])).shape
    (1, 8, 1, 64)
    """
    attend = metal_packed_attention if metal.available() else reference_packed_attention
    return attend(queries, sinks, packed, tail, scale, lengths, bias, logits)


def reference_packed_attention(
    queries: mx.array,
    sinks: Pair | None,
    packed: Bucket | None,
    tail: Pair | None,
    scale: float,
    lengths: mx.array | None = None,
    bias: mx.array | None = None,
    logits: mx.array | None = None,
) -> mx.array:
    """Attend by the array operations that define `packed_attention`.

    Parameters
    ----------
    queries, sinks, packed, tail, scale, lengths, bias, logits
        See `packed_attention`.

    Returns
    -------
    mx.array
        See `packed_attention`.
    """
    Hkv, Dv, rows, _ = _layout(*_described(queries, sinks, packed, tail, lengths, bias, logits))
    B, Hq, _, D = queries.shape
    if not sum(rows):
        return mx.zeros((B, Hq, 1, Dv), queries.dtype)
    grouped = (queries.astype(mx.float32) * scale).reshape(B, Hkv, Hq // Hkv, D)
    parts = [] if sinks is None else [grouped @ sinks[0].astype(mx.float32).swapaxes(-1, -2)]
    if packed is not None:
        parts.append(scores_of(rotate(grouped) if packed[0].rotated else grouped, packed[0]))
    if tail is not None:
        newest = grouped @ tail[0].astype(mx.float32).swapaxes(-1, -2)
        if lengths is not None:
            newest = mx.where(mx.arange(rows[2]) < lengths[:, None, None, None], newest, -mx.inf)
        parts.append(newest)
    scores = mx.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
    if bias is not None:
        each = mx.repeat(bias.astype(mx.float32), Hq // bias.shape[1], axis=1)
        scores += each.reshape(B, Hkv, Hq // Hkv, -1)
    weights = softmax(scores, logits)
    first, last = rows[0], rows[0] + rows[1]
    output = mx.zeros((B, Hkv, Hq // Hkv, Dv))
    if packed is not None:
        output = weighted_sum(weights[..., first:last], packed[1])
        output = rotate_back(output) if packed[1].rotated else output
    if sinks is not None:
        output += weights[..., :first] @ sinks[1].astype(mx.float32)
    if tail is not None:
        output += weights[..., last:] @ tail[1].astype(mx.float32)
    return output.reshape(B, Hq, 1, Dv).astype(queries.dtype)


def metal_packed_attention(
    queries: mx.array,
    sinks: Pair | None,
    packed: Bucket | None,
    tail: Pair | None,
    scale: float,
    lengths: mx.array | None = None,
    bias: mx.array | None = None,
    logits: mx.array | None = None,
) -> mx.array:
    """Attend by the kernel.

    Parameters
    ----------
    queries, sinks, packed, tail, scale, lengths, bias, logits
        See `packed_attention`.

    Returns
    -------
    mx.array
        See `packed_attention`.
    """
    layout = _layout(*_described(queries, sinks, packed, tail, lengths, bias, logits))
    launch = layout.launch
    if launch is None:
        return _without_the_kernel(queries, sinks, packed, tail, scale, lengths, bias, logits)
    nothing = _nothing()
    raw = tail or sinks or (queries, queries)
    words = [nothing] * 6
    if packed is not None:
        k, v = packed
        words = [k.words, k.bias, k.scale, v.words, v.bias, v.scale]
    (out,) = _ATTEND(
        inputs=[
            queries,
            *(sinks or raw),
            *words,
            *(tail or raw),
            nothing if lengths is None else lengths,
            nothing if bias is None else bias,
            nothing if logits is None else logits,
            _factor(scale),
            launch.k_turn,
            launch.v_turn,
        ],
        template=launch.template,
        grid=launch.grid,
        threadgroup=THREADGROUP,
        output_shapes=launch.shapes,
        output_dtypes=launch.dtypes,
    )
    if launch.merge is None:
        return out
    merge = launch.merge
    return _MERGE(
        inputs=[out, launch.v_turn],
        template=merge.template,
        grid=merge.grid,
        threadgroup=THREADGROUP,
        output_shapes=merge.shapes,
        output_dtypes=merge.dtypes,
    )[0]


def _without_the_kernel(
    queries: mx.array,
    sinks: Pair | None,
    packed: Bucket | None,
    tail: Pair | None,
    scale: float,
    lengths: mx.array | None,
    bias: mx.array | None,
    logits: mx.array | None,
) -> mx.array:
    """Attend by the kernel of buckets, which has room for the widest heads and takes packed tokens of any kind."""
    buckets = [] if sinks is None else [_unquantized(sinks)]
    buckets += [] if packed is None else [packed]
    buckets += [] if tail is None else [_unquantized(tail)]
    if lengths is not None and tail is not None:
        rows = [keys.shape[-2] for keys, _ in buckets]
        hidden = mx.where(mx.arange(sum(rows)) < sum(rows[:-1]) + lengths[:, None, None], 0.0, -mx.inf)
        bias = hidden if bias is None else bias + hidden
    return decode_attention(queries, buckets, scale, bias, logits)[0]


def _unquantized(pair: Pair) -> Bucket:
    """Return a pair in the form that `decode_attention` takes."""
    keys, values = pair
    return reference_pack(keys, UNQUANTIZED, 1, keys.shape[-1]), reference_pack(
        values, UNQUANTIZED, 1, values.shape[-1]
    )


class _Launch(NamedTuple):
    """What a launch of a kernel needs besides arrays; the same for every layer, and for 16 tokens in a row."""

    template: list[tuple[str, object]]
    grid: tuple[int, int, int]
    shapes: list[Shape]
    dtypes: list[mx.Dtype]
    k_turn: mx.array
    v_turn: mx.array
    merge: _Launch | None


class _Layout(NamedTuple):
    """Sizes of a call that were checked, and its launch; None where the kernel of buckets has to do it."""

    kv_heads: int
    value_dim: int
    rows: tuple[int, int, int]
    launch: _Launch | None


def _described(
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
def _layout(
    queries: Shape,
    dtype: mx.Dtype,
    sinks: tuple | None,
    packed: tuple | None,
    tail: tuple | None,
    lengths: Shape | None,
    bias: Shape | None,
    logits: Shape | None,
) -> _Layout:
    """Check shapes and types, and plan the launch, once for each combination of them."""
    shapes = [None if part is None else part[:2] for part in (sinks, tail)]
    if packed is not None:
        shapes.insert(1, tuple((*words[:-1], dim) for words, _, dim, *_ in packed))
    else:
        shapes.insert(1, None)
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
    given = sinks, packed, tail, lengths, bias, logits
    launch = _plan(queries, dtype, Hkv, Dv, T, packed, [part is not None for part in given])
    return _Layout(Hkv, Dv, (rows[0], rows[1], rows[2]), launch)


def _plan(
    queries: Shape, dtype: mx.Dtype, Hkv: int, Dv: int, T: int, packed: tuple | None, given: list[bool]
) -> _Launch | None:
    """Choose heads a SIMD-group and splits; None where the kernel has no room, no tokens or unquantized `packed`."""
    B, Hq, _, D = queries
    keys, values = packed or ((None, 2, D, 1, 1, False), (None, 2, Dv, 1, 1, False))
    heads = _heads_at_once(D, Dv)
    if T == 0 or not heads or min(D, Dv) < SMALLEST or max(keys[1], values[1]) >= UNQUANTIZED:
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
    k_turn, v_turn = (_turn(dim) if turned else _factor(1.0) for dim, turned in ((D, keys[5]), (Dv, values[5])))
    grid = (THREADGROUP[0], splits, columns)
    if splits == 1:
        return _Launch(template, grid, [shape], [dtype], k_turn, v_turn, None)
    merging: list[tuple[str, object]] = [
        ("DV", Dv),
        ("V_TURNED", values[5]),
        ("SIMD_GROUPS", SIMD_GROUPS),
        ("OUT", dtype),
    ]
    merge = _Launch(merging, (THREADGROUP[0], B * Hq, 1), [shape], [dtype], k_turn, v_turn, None)
    return _Launch(template, grid, [(B, Hq, splits, Dv + 2)], [mx.float32], k_turn, v_turn, merge)


def _heads_at_once(D: int, Dv: int) -> int:
    """Return with how many query heads a SIMD-group attends at once: as many as its registers hold, 0 for none."""
    if max(D, Dv) > MAX_DIMS:
        return 0
    K, V = (1 << max(0, (dim - 1).bit_length() - 5) for dim in (D, Dv))  # dims of a lane: a power of two
    fitting = [n for n in range(1, 9) if n * (K + V) + 4 * (1 << (n - 1).bit_length()) + 2 * max(K, V) <= REGISTERS]
    return max(fitting, default=0)


@lru_cache(maxsize=64)
def _factor(scale: float) -> mx.array:
    """Return the scale as the kernel reads it."""
    return mx.array([scale], mx.float32)


@lru_cache(maxsize=1)
def _nothing() -> mx.array:
    """Return what stands for arrays that a call does not have; never read."""
    return mx.array(np.zeros((1, 1, 1, 8), np.uint32))


@lru_cache(maxsize=16)
def _turn(dim: int) -> mx.array:
    """Return the columns of a rotation that its others follow from by signs: `[dim, odd part of dim]`."""
    odd = dim // (dim & -dim)
    return mx.array(np.ascontiguousarray(np.array(rotation(dim))[:, :odd]))


def _example(keys: tuple[int, int, int], rotated: bool) -> Callable[[int], tuple]:
    """Return a call of 32 query heads over 8 kv heads: 4 sinks, packed tokens and a tail of which 40 rows are used."""

    def arguments(tokens: int) -> tuple:
        queries, first, old, new = (
            mx.random.normal(shape, key=mx.random.key(0)).astype(mx.bfloat16)
            for shape in ((1, 32, 1, 128), (1, 8, 4, 128), (1, 8, tokens, 128), (1, 8, 48, 128))
        )
        packed = (reference_pack(old, *keys, rotated), reference_pack(old, keys[0], 1, 128, rotated))
        return queries, (first, first), packed, (new, new), 128**-0.5, mx.array([40], mx.int32)

    return arguments


register(
    Operation(
        "packed_attention.packed_attention",
        packed_attention,
        reference_packed_attention,
        metal_packed_attention,
        (
            Example("32/8 heads x 128 dims, 8 bits, a short text", _example((8, 64, 1), False), 256),
            Example("32/8 heads x 128 dims, 8 bits", _example((8, 64, 1), False)),
            Example("32/8 heads x 128 dims, 4 bits, rotated", _example((4, 60, 1), True)),
            Example("32/8 heads x 128 dims, 4 bits, rotated", _example((4, 60, 1), True), 32768),
        ),
    )
)

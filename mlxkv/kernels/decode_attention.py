"""Attention of one new token over quantized keys and values, in buckets of any precision, never unpacked in memory.

The kernel is one pass over each bucket: the running maximum and sum of the online softmax
(https://arxiv.org/abs/1805.02867) for splits of the tokens, as in flash-decoding
(https://crfm.stanford.edu/2023/10/12/flashdecoding.html). Unlike there, it also writes the scores: a second kernel merges the
splits of all buckets, and sums each token's attention, which importance-driven caches need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

from mlxkv.errors import InputError, MismatchError
from mlxkv.kernels import metal
from mlxkv.kernels._products import Rows, attention_over
from mlxkv.kernels._rotation import rotate, turn
from mlxkv.kernels.bits import UNQUANTIZED, QuantizedArray, reference_pack, unquantized_values
from mlxkv.kernels.metal import Kernel, factor
from mlxkv.kernels.operations import Example, Operation, register

Bucket = tuple[QuantizedArray, QuantizedArray]

SPLIT_TOKENS = 128  # tokens of a bucket that one threadgroup attends to
SIMD_GROUPS = 8  # of a threadgroup
REGISTER_FLOATS = 2304  # queries and sums that a SIMD-group's registers may hold for its heads: more would spill
MAX_HEADS = 8  # query heads that a SIMD-group attends with
MAX_BUCKETS = 8  # that one kernel merges
MASS_TOKENS = 1024  # whose attention mass one threadgroup of that sums
_THREADGROUP = (32 * SIMD_GROUPS, 1, 1)
_FLOAT32 = [mx.float32]
MAX_DIMS = 576  # of keys or values: threadgroup memory holds that many, and MLA's latents need them

_ATTEND = Kernel(
    "decode_attention",
    inputs=("queries", "k", "k_shift", "k_scale", "v", "v_shift", "v_scale", "bias", "sinks", "scale"),
    outputs=("parts",),
)
_MERGE = Kernel(
    "decode_attention_merge",
    inputs=(*(f"parts{i}" for i in range(MAX_BUCKETS)), "turn", "importance", "old_share", "new_share"),
    outputs=("output", "mass"),
)


def decode_attention(
    queries: mx.array,
    buckets: Sequence[Bucket],
    scale: float,
    bias: mx.array | None = None,
    sinks: mx.array | None = None,
    importance: mx.array | None = None,
    decay: float = 1.0,
) -> tuple[mx.array, mx.array]:
    """Return softmax(scale * queries . keys + bias) . values, accumulated in float32, and each token's attention mass.

    Parameters
    ----------
    queries
        `[B, Hq, 1, D]`, one token; D up to 576.
    buckets
        1 to 8 pairs of keys `[B, Hkv, Tb, D]` and values `[B, Hkv, Tb, Dv]`, both of one float type, each with
        its own bits and tiles; Tb may be 0, Dv up to 576. Hq is a multiple of Hkv: query head h reads key/value head
        h // (Hq // Hkv).
    scale
        Factor on the products, such as D**-0.5.
    bias
        Added to the scaled products, `[B, 1 or Hkv or Hq, T]` of any float type, of all T tokens in the order of the buckets; -inf masks
        a token. None adds nothing.
    sinks
        Attention sinks, `[Hq]` of any float type: a logit of each query head that takes part in its softmax, as the score
        of a token whose value is 0 (gpt-oss, https://arxiv.org/abs/2508.10925). -inf is none. None is none at all.
    importance
        `[B, Hkv, n]` float32, a running mean or sum of the attention of the n tokens before the newest; the newest is the
        last of all. None for none.
    decay
        Weight of `importance` against the new mass, which has the rest; with 1 both are added.

    Returns
    -------
    tuple[mx.array, mx.array]
        The output `[B, Hq, 1, Dv]` of queries' type, and the mass `[B, Hkv, T]` float32: each token's attention
        probability, summed over the query heads that share its key/value head, so a row sums to Hq / Hkv, less what the
        sinks take. That is what importance per token and head accumulates (H2O, https://arxiv.org/abs/2306.14048).
        Given importance, its update is in mass's place, `[B, Hkv, n + 1]`; the newest token's is its mass. It is computed
        when the output is, as a cache's state has to be.
        Where every token is masked, or there is none, output and mass are 0; NaN and infinite keys, queries or sinks
        (other than -inf) give NaN, as plain softmax does.

    Raises
    ------
    InputError
        Without buckets, or for more, or for larger dims.
    MismatchError
        For shapes or types that do not fit together.

    Examples
    --------
    >>> from mlxkv.kernels.bits import pack
    >>> keys, values = mx.random.normal((1, 2, 100, 64)), mx.random.normal((1, 2, 100, 64))
    >>> bucket = pack(keys, bits=4, tile_tokens=1, tile_dims=32), pack(values, bits=4, tile_tokens=1, tile_dims=32)
    >>> output, mass = decode_attention(mx.random.normal((1, 8, 1, 64)), [bucket], scale=64**-0.5)
    >>> output.shape, mass.shape, [round(row.item(), 3) for row in mass[0].sum(axis=-1)]
    ((1, 8, 1, 64), (1, 2, 100), [4.0, 4.0])
    """
    attend = metal_decode_attention if metal.available() else reference_decode_attention
    return attend(queries, buckets, scale, bias, sinks, importance, decay)


def reference_decode_attention(
    queries: mx.array,
    buckets: Sequence[Bucket],
    scale: float,
    bias: mx.array | None = None,
    sinks: mx.array | None = None,
    importance: mx.array | None = None,
    decay: float = 1.0,
) -> tuple[mx.array, mx.array]:
    """Attend by the array operations that define `decode_attention`, a piece of each bucket unpacked at a time.

    Parameters
    ----------
    queries, buckets, scale, bias, sinks, importance, decay
        See `decode_attention`.

    Returns
    -------
    tuple[mx.array, mx.array]
        See `decode_attention`.
    """
    T = _checked_tokens(
        queries.shape,
        [(k.shape, k.dtype, v.shape, v.dtype) for k, v in buckets],
        None if bias is None else bias.shape,
        None if sinks is None else sinks.shape,
        None if importance is None else importance.shape,
    )
    B, Hkv, _, Dv = buckets[0][1].shape
    G = queries.shape[1] // Hkv
    if T == 0:
        return _empty_result(queries, Hkv, Dv)
    grouped = (queries.astype(mx.float32) * scale).reshape(B, Hkv, G, -1)
    if bias is not None:
        bias = mx.repeat(bias.astype(mx.float32), G * Hkv // bias.shape[1], axis=1).reshape(B, Hkv, G, T)
    parts = [(_rows(k), _rows(v)) for k, v in buckets]
    output, weights, total = attention_over(grouped, parts, bias, sinks)
    output = output.reshape(B, Hkv * G, 1, Dv).astype(queries.dtype)
    mass = ((1 / total).swapaxes(-1, -2) @ weights).squeeze(-2)
    if importance is not None:
        mass, (old, new) = mass[..., -importance.shape[-1] - 1 :], _shares(decay)
        mass = mx.concatenate([old * importance + new * mass[..., :-1], mass[..., -1:]], axis=-1)
        output = mx.depends(output, [mass])
    return output, mass


def _rows(packed: QuantizedArray) -> Rows:
    return unquantized_values(packed) if packed.is_unquantized else packed


def metal_decode_attention(
    queries: mx.array,
    buckets: Sequence[Bucket],
    scale: float,
    bias: mx.array | None = None,
    sinks: mx.array | None = None,
    importance: mx.array | None = None,
    decay: float = 1.0,
) -> tuple[mx.array, mx.array]:
    """Attend by the kernel, a launch for each bucket, and merge the splits of all buckets.

    Parameters
    ----------
    queries, buckets, scale, bias, sinks, importance, decay
        See `decode_attention`.

    Returns
    -------
    tuple[mx.array, mx.array]
        See `decode_attention`.
    """
    if importance is not None and not importance.size:  # no buffer can be empty
        output, mass = metal_decode_attention(queries, buckets, scale, bias, sinks)
        mass = mass[..., -1:]
        return mx.depends(output, [mass]), mass
    kinds = tuple((k.kind, v.kind) for k, v in buckets)
    launches = _launches(
        queries.shape,
        queries.dtype,
        kinds,
        None if bias is None else bias.shape,
        None if sinks is None else sinks.shape,
        None if importance is None else importance.shape,
    )
    if not launches.buckets:
        _, Hkv, _, Dv = buckets[0][1].shape
        return _empty_result(queries, Hkv, Dv)
    rotated = rotate(queries) if launches.rotates else queries
    parts, factors = [], factor(scale)
    for place, turned, start, stop, last, template, grid, shapes in launches.buckets:
        k, v = buckets[place]
        parts += _ATTEND(
            inputs=[
                rotated if turned else queries,
                *_buffers(k),
                *_buffers(v),
                queries if bias is None else bias[..., start:stop],
                queries if sinks is None or not last else sinks,
                factors,
            ],
            template=template,
            grid=grid,
            threadgroup=_THREADGROUP,
            output_shapes=shapes,
            output_dtypes=_FLOAT32,
        )
    output, mass = _MERGE(
        inputs=[
            *parts,
            *parts[:1] * (MAX_BUCKETS - len(parts)),
            launches.turn,
            parts[0] if importance is None else importance,
            *(map(factor, _shares(decay))),
        ],
        template=launches.template,
        grid=launches.grid,
        threadgroup=_THREADGROUP,
        output_shapes=launches.shapes,
        output_dtypes=launches.dtypes,
    )
    return output, mass


class _Launch(NamedTuple):
    """Launch for a bucket, without its arrays."""

    place: int
    turned: bool
    start: int
    stop: int
    last: bool
    template: list[tuple[str, int | bool]]
    grid: tuple[int, int, int]
    shapes: list[tuple[int, ...]]


class _Launches(NamedTuple):
    """All launches of a call: those for buckets that hold tokens, and the one that merges them."""

    buckets: list[_Launch]
    rotates: bool
    template: list[tuple[str, object]]
    grid: tuple[int, int, int]
    shapes: list[tuple[int, ...]]
    dtypes: list[mx.Dtype]
    turn: mx.array


@lru_cache(maxsize=256)
def _launches(
    queries: tuple[int, ...],
    dtype: mx.Dtype,
    kinds: tuple[tuple[tuple, tuple], ...],
    bias: tuple[int, ...] | None,
    sinks: tuple[int, ...] | None,
    importance: tuple[int, ...] | None,
) -> _Launches:
    """Check shapes and types, and plan the launches, once for all layers alike."""
    T = _checked_tokens(queries, [(k[0], k[-1], v[0], v[-1]) for k, v in kinds], bias, sinks, importance)
    B, Hq, _, D = queries
    _, Hkv, _, Dv = kinds[0][1][0]
    passes = -(-Hq // Hkv // min(MAX_HEADS, max(1, REGISTER_FLOATS // (D + Dv))))
    launches: list[_Launch] = []
    start = turned = 0
    for place, (k, v) in enumerate(kinds):
        (*_, tokens, _), k_bits, k_tokens, k_dims, k_turned, kept = k
        _, v_bits, v_tokens, v_dims, v_turned, _ = v
        if not tokens:
            continue
        stop, splits = start + tokens, -(-tokens // SPLIT_TOKENS)
        turned |= v_turned << len(launches)
        template: list[tuple[str, int | bool]] = [
            ("D", D),
            ("DV", Dv),
            ("K_BITS", k_bits),
            ("V_BITS", v_bits),
            # Dividing by a constant is cheap; unquantized ones have no tiles.
            ("K_TOKENS", 1 if k_bits >= UNQUANTIZED else k_tokens),
            ("K_DIMS", 1 if k_bits >= UNQUANTIZED else k_dims),
            ("V_TOKENS", 1 if v_bits >= UNQUANTIZED else v_tokens),
            ("V_DIMS", 1 if v_bits >= UNQUANTIZED else v_dims),
            ("HEADS", -(-Hq // Hkv // passes)),
            ("BFLOAT", kept == mx.bfloat16),
            ("SPLIT_TOKENS", SPLIT_TOKENS),
            ("SIMD_GROUPS", SIMD_GROUPS),
            ("BIAS", bias is not None),
            # Sinks are counted once: in the last bucket, which is always the new token, so that one more kernel is compiled.
            ("SINKS", sinks is not None and stop == T),
        ]
        grid = (32 * SIMD_GROUPS, splits, B * Hkv * passes)
        shapes: list[tuple[int, ...]] = [(B, Hq, splits * (Dv + 2) + tokens)]
        launches.append(_Launch(place, k_turned, start, stop, stop == T, template, grid, shapes))
        start = stop
    merging: list[tuple[str, object]] = [
        ("DV", Dv),
        ("GROUP", Hq // Hkv),
        ("BUCKETS", len(launches)),
        ("ROTATED", turned),
        ("SPLIT_TOKENS", SPLIT_TOKENS),
        ("MASS_TOKENS", MASS_TOKENS),
        ("SIMD_GROUPS", SIMD_GROUPS),
        ("IMPORTANCE", importance is not None),
        ("OUT", dtype),
    ]
    grid = (32 * SIMD_GROUPS, B * (Hq + Hkv * -(-T // MASS_TOKENS)), 1)
    return _Launches(
        launches, any(k[4] for k, _ in kinds), merging, grid, [(B, Hq, 1, Dv), (B, Hkv, T if importance is None else importance[-1] + 1)], [dtype, mx.float32],
        turn(Dv) if turned else factor(1.0),
    )  # fmt: skip


def _buffers(packed: QuantizedArray) -> tuple[mx.array, mx.array, mx.array]:
    """Return words, bias, scale; words in their place, unread, where unquantized values have none: no buffer can be empty."""
    words = packed.words
    return (words, words, words) if packed.bits >= UNQUANTIZED else (words, packed.bias, packed.scale)


def _shares(decay: float) -> tuple[float, float]:
    """Return the weights of old importance and new mass."""
    return (1.0, 1.0) if decay == 1 else (decay, 1 - decay)


def _empty_result(queries: mx.array, kv_heads: int, dims: int) -> tuple[mx.array, mx.array]:
    """Return output and mass of attention over no tokens."""
    B, Hq = queries.shape[:2]
    return mx.zeros((B, Hq, 1, dims), queries.dtype), mx.zeros((B, kv_heads, 0))


def _checked_tokens(
    queries: tuple[int, ...],
    buckets: Sequence[tuple[tuple[int, ...], mx.Dtype, tuple[int, ...], mx.Dtype]],
    bias: tuple[int, ...] | None,
    sinks: tuple[int, ...] | None,
    importance: tuple[int, ...] | None = None,
) -> int:
    """Check that all shapes fit together and return the total number of tokens."""
    if not 0 < len(buckets) <= MAX_BUCKETS:
        raise InputError(
            f"{len(buckets)} buckets: attention needs at least one bucket, which may hold 0 tokens, and at most {MAX_BUCKETS}"
        )
    B, Hq, L, D = queries
    _, Hkv, _, Dv = buckets[0][2]
    if max(D, Dv) > MAX_DIMS:
        raise InputError(f"heads of {D} and {Dv} dims: the kernel's threadgroup memory ends at {MAX_DIMS}")
    if L != 1 or Hq % Hkv:
        raise MismatchError(f"queries {queries}: expected one token and a multiple of {Hkv} heads")
    for k, k_dtype, v, v_dtype in buckets:
        if k != (B, Hkv, k[-2], D) or v != (B, Hkv, k[-2], Dv) or k_dtype != v_dtype:
            raise MismatchError(
                f"keys {k} {k_dtype} and values {v} {v_dtype} do not fit queries {queries}, "
                f"{Hkv} kv heads and {Dv} value dims"
            )
    T = sum(k[-2] for k, *_ in buckets)
    if bias is not None and bias not in ((B, 1, T), (B, Hkv, T), (B, Hq, T)):
        raise MismatchError(f"bias {bias} is not [{B}, 1 or {Hkv} or {Hq}, {T}]")
    if sinks is not None and sinks != (Hq,):
        raise MismatchError(f"sinks {sinks} are not [{Hq}], a logit for each query head")
    if importance is not None and importance != (B, Hkv, min(importance[-1], T - 1)):
        raise MismatchError(
            f"importance {importance} is not [{B}, {Hkv}, up to {T - 1}], of the tokens before the newest"
        )
    return T


def _example(key_tokens: int, key_dims: int) -> Callable[[int], tuple]:
    """Return a call of 32 query heads over 8 kv heads: 4-bit keys and 2-bit values, and 32 more tokens unquantized."""

    def arguments(tokens: int) -> tuple:
        queries, old, new = (
            mx.random.normal(shape, key=mx.random.key(0)).astype(mx.bfloat16)
            for shape in ((1, 32, 1, 128), (1, 8, tokens, 128), (1, 8, 32, 128))
        )
        packed = (reference_pack(old, 4, key_tokens, key_dims), reference_pack(old, 2, 1, 32))
        return queries, [packed, (reference_pack(new, UNQUANTIZED, 1, 32),) * 2], 128**-0.5

    return arguments


def _example_with_sinks(tokens: int) -> tuple:
    queries, buckets, scale = _example(1, 32)(tokens)
    return queries, buckets, scale, None, queries[0, :, 0, 0]


register(
    Operation(
        "decode_attention.decode_attention",
        decode_attention,
        reference_decode_attention,
        metal_decode_attention,
        (
            Example("32/8 heads x 128 dims, 4-bit keys by token", _example(1, 32)),
            Example("32/8 heads x 128 dims, 4-bit keys by token, attention sinks", _example_with_sinks),
            Example("32/8 heads x 128 dims, 4-bit keys by dim", _example(32, 1)),
            Example("32/8 heads x 128 dims, 4-bit keys by dim", _example(32, 1), 32768),
        ),
    )
)

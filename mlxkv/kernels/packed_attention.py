"""Attention of one new token over all that a packing cache keeps of a layer: sinks, packed tokens and newest tokens."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mlxkv.kernels import metal
from mlxkv.kernels._packed_launch import THREADGROUP, Pair, described, layout, nothing
from mlxkv.kernels._products import attention_over
from mlxkv.kernels.bits import UNQUANTIZED, reference_pack
from mlxkv.kernels.decode_attention import Bucket, decode_attention
from mlxkv.kernels.metal import Kernel, factor
from mlxkv.kernels.operations import Example, Operation, register

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
    Hkv, Dv, rows, _ = layout(*described(queries, sinks, packed, tail, lengths, bias, logits))
    B, Hq, _, D = queries.shape
    if not sum(rows):
        return mx.zeros((B, Hq, 1, Dv), queries.dtype)
    grouped = (queries.astype(mx.float32) * scale).reshape(B, Hkv, Hq // Hkv, D)
    added = None
    if bias is not None:
        added = mx.repeat(bias.astype(mx.float32), Hq // bias.shape[1], axis=1).reshape(B, Hkv, Hq // Hkv, -1)
    if lengths is not None and tail is not None:
        used = mx.arange(sum(rows)) < rows[0] + rows[1] + lengths[:, None, None, None]
        added = mx.where(used, 0.0 if added is None else added, -mx.inf)
    parts = [part for part in (sinks, packed, tail) if part is not None]
    output = attention_over(grouped, parts, added, logits)[0]
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
    launch = layout(*described(queries, sinks, packed, tail, lengths, bias, logits)).launch
    if launch is None:
        return _without_the_kernel(queries, sinks, packed, tail, scale, lengths, bias, logits)
    absent = nothing()
    raw = tail or sinks or (queries, queries)
    words = [absent] * 6
    if packed is not None:
        k, v = packed
        words = [k.words, k.bias, k.scale, v.words, v.bias, v.scale]
    (out,) = _ATTEND(
        inputs=[
            queries,
            *(sinks or raw),
            *words,
            *(tail or raw),
            absent if lengths is None else lengths,
            absent if bias is None else bias,
            absent if logits is None else logits,
            factor(scale),
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

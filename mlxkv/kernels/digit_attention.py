"""Attention of one new token over rows of 2-bit digits, the packed tokens of the live method `klt`, never unpacked to keys.

A key is mean + basis @ codes, so its product with a query is one of the codes with the query's coordinates. A code is a sum of
digits times powers of 4: the query is expanded to one number a digit, once a token, and the digits are multiplied as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxkv.errors import MismatchError
from mlxkv.kernels import metal
from mlxkv.kernels._digit_launch import TILE as TILE
from mlxkv.kernels._digit_launch import UNIT as UNIT
from mlxkv.kernels._digit_launch import check_shapes, layout, newest_rows, nothing
from mlxkv.kernels._packed_launch import THREADGROUP
from mlxkv.kernels._products import exponentials
from mlxkv.kernels.metal import Kernel, factor
from mlxkv.kernels.operations import Example, Operation, register

DIGITS = 4  # of a channel, at most
# Steps of a uniform quantizer of a Gaussian with as many digits, in deviations, as bfloat16 has them: 0.9957, 0.3352, ...
STEPS = (0.0, 0.99609375, 0.3359375, 0.10400390625, 0.03076171875)
PLANES = (1.0, 4.0, 16.0, 64.0)  # what the digits of a byte count for
Pair = tuple[mx.array, mx.array]

_ATTEND = Kernel(
    "digit_attention",
    inputs=(
        "queries", "sinks_k", "sinks_v", "tail_k", "tail_v",
        "k_basis", "k_order", "k_place", "k_mean", "k_a", "k_b", "k_c", "k_scales_a", "k_scales_b", "k_scales_c",
        "v_order", "v_place", "v_a", "v_b", "v_c", "v_scales_a", "v_scales_b", "v_scales_c",
        "logits", "scale", "sizes", "newest",
    ),
    outputs=("parts",),
)  # fmt: skip
_MERGE = Kernel(
    "digit_attention_merge",
    inputs=("parts", "v_basis", "v_order", "v_mean", "sizes", "newest"),
    outputs=("output", "mass"),
)


class DigitSlot(NamedTuple):
    """Keys, or values, of packed tokens in three buckets a, b and c, the most important first.

    A row of a bucket has N digits, N a multiple of 4: digit p is in byte p % (N / 4), in its bits 2 * (p // (N / 4)) and the next.

    Parameters
    ----------
    basis
        int8 `[B, H, D, D]`: the directions are its columns, in units of 1 / 127.
    order
        uint8 or uint16 `[B, H, largest N]`: the channel (column) that each digit is of. A bucket has the first N.
    place
        bfloat16 `[B, H, N of a + N of b + N of c]`: what a digit of a bucket counts for, in the byte with its other digits masked, where
        the scale is 1.
    mean
        `[B, H, D]` of the type that tokens are stored in.
    codes_a, codes_b, codes_c
        uint8 `[B, H, rows, N / 4]`.
    scales_a, scales_b, scales_c
        uint8 `[B, H, tiles, D]`: of each 128 rows, eighths of the binary logarithm of a channel's scale, plus 128.
    """

    basis: mx.array
    order: mx.array
    place: mx.array
    mean: mx.array
    codes_a: mx.array
    codes_b: mx.array
    codes_c: mx.array
    scales_a: mx.array
    scales_b: mx.array
    scales_c: mx.array

    @property
    def codes(self) -> tuple[mx.array, mx.array, mx.array]:
        """Rows of each bucket."""
        return self.codes_a, self.codes_b, self.codes_c

    @property
    def scales(self) -> tuple[mx.array, mx.array, mx.array]:
        """Scales of each bucket."""
        return self.scales_a, self.scales_b, self.scales_c

    @property
    def rows(self) -> tuple[int, ...]:
        """Number of rows of each bucket."""
        return tuple(codes.shape[2] for codes in self.codes)

    def buckets(self) -> Iterator[tuple[mx.array, mx.array, mx.array]]:
        """Return codes, scales and places of each bucket.

        Yields
        ------
        tuple of mx.array
            uint8 `[B, H, rows, N / 4]`, uint8 `[B, H, tiles, D]`, bfloat16 `[B, H, N]`.
        """
        start = 0
        for codes, scales in zip(self.codes, self.scales):
            stop = start + 4 * codes.shape[-1]
            yield codes, scales, self.place[..., start:stop]
            start = stop


class DigitRows(NamedTuple):
    """Keys and values of the same packed tokens, a row for a row.

    Parameters
    ----------
    keys, values
        Of dims D and Dv, with digits of their own.
    """

    keys: DigitSlot
    values: DigitSlot


@lru_cache(1)
def deviations() -> mx.array:
    """Return the factor that each scale stands for.

    Returns
    -------
    mx.array
        float32 `[256]`.
    """
    return mx.array(np.exp2((np.arange(256) - 128) / 8).astype(np.float32))


@lru_cache
def middles(digits: int) -> mx.array:
    """Return the middle of the range of each masked digit of a row.

    Parameters
    ----------
    digits
        N, of the row.

    Returns
    -------
    mx.array
        float32 `[N]`.
    """
    return mx.array(1.5 * np.repeat(np.array(PLANES, np.float32), digits // 4))


def channels(slot: DigitSlot) -> mx.array:
    """Return which channel each digit is of.

    Parameters
    ----------
    slot
        Packed keys or values.

    Returns
    -------
    mx.array
        float32 `[B, H, largest N, D]`, 1 at the digit's channel and 0 elsewhere.
    """
    return _identity(slot.basis.shape[-1])[slot.order]


def masked_digits(codes: mx.array) -> mx.array:
    """Return the digits of rows, each times the power of 4 of its place in the byte.

    Parameters
    ----------
    codes
        uint8 `[B, H, rows, N / 4]`.

    Returns
    -------
    mx.array
        float32 `[B, H, tiles, 128, N]`; rows after the last one are 0.
    """
    B, H, rows, width = codes.shape
    tiles = -(-rows // TILE)
    if rows % TILE:
        codes = mx.pad(codes, [(0, 0), (0, 0), (0, tiles * TILE - rows), (0, 0)])
    masked = mx.expand_dims(codes, -2) & _masks()
    return masked.reshape(B, H, tiles, TILE, 4 * width).astype(mx.float32)


def digit_attention(
    queries: mx.array,
    sinks: Pair | None,
    packed: DigitRows,
    tail: Pair,
    scale: float,
    rows: int,
    logits: mx.array | None = None,
) -> Pair:
    """Return softmax(scale * queries . keys) . values of one token, and the attention that the newest tokens get.

    Parameters
    ----------
    queries
        `[B, Hq, 1, D]` of any float type. Hq is a multiple of Hkv: query head h reads key/value head h // (Hq // Hkv).
    sinks
        Unquantized keys `[B, Hkv, n, D]` and values `[B, Hkv, n, Dv]`; None for none.
    packed
        Packed tokens.
    tail
        Keys and values like `sinks`: a buffer whose first `rows` rows are the newest tokens.
    scale
        Factor on the products, such as D**-0.5.
    rows
        1 or more.
    logits
        Attention sinks, `[Hq]`: a logit of each query head that takes part in its softmax and adds nothing to the output (gpt-oss,
        https://arxiv.org/abs/2508.10925). None for none.

    Returns
    -------
    tuple of mx.array
        The output `[B, Hq, 1, Dv]` of queries' type, accumulated in float32, and the attention probability of each of the
        newest tokens, summed over the query heads that share its key/value head, `[B, Hkv, rows]` float32.

    Raises
    ------
    MismatchError
        Where keys and values have different rows, fewer newest tokens are there, or shapes do not fit together.
    """
    attend = metal_digit_attention if metal.available() else reference_digit_attention
    return attend(queries, sinks, packed, tail, scale, rows, logits)


def reference_digit_attention(
    queries: mx.array,
    sinks: Pair | None,
    packed: DigitRows,
    tail: Pair,
    scale: float,
    rows: int,
    logits: mx.array | None = None,
) -> Pair:
    """Attend by the array operations that define `digit_attention`.

    Parameters
    ----------
    queries, sinks, packed, tail, scale, rows, logits
        See `digit_attention`.

    Returns
    -------
    tuple of mx.array
        See `digit_attention`.
    """
    _check(packed, tail, rows)
    check_shapes(queries.shape, None if sinks is None else sinks[0].shape, (tail[0].shape, tail[1].shape))
    B, H, D = packed.keys.mean.shape
    grouped = (queries.astype(mx.float32) * scale).reshape(B, H, -1, D)
    newest = (tail[0][:, :, :rows], tail[1][:, :, :rows])
    keys, values = newest if sinks is None else (mx.concatenate([*pair], axis=2) for pair in zip(sinks, newest))
    common = grouped @ mx.expand_dims(packed.keys.mean.astype(mx.float32), -1)  # [B, H, G, 1]
    scores, plain = _packed_scores(grouped, packed.keys), grouped @ keys.astype(mx.float32).swapaxes(-1, -2)
    if logits is None:  # a softmax does not change where all scores are less by as much
        plain = plain - common
    else:
        scores = [part + common for part in scores]
    weights, total = exponentials(mx.concatenate([*scores, plain], axis=-1), logits, False)
    stop = sum(packed.values.rows)
    output = _weighted(weights[..., :stop], packed.values) + weights[..., stop:] @ values.astype(mx.float32)
    mass = (1 / total).swapaxes(-1, -2) @ weights[..., -rows:]
    return (output / total).reshape(B, -1, 1, output.shape[-1]).astype(queries.dtype), mass[:, :, 0]


def metal_digit_attention(
    queries: mx.array,
    sinks: Pair | None,
    packed: DigitRows,
    tail: Pair,
    scale: float,
    rows: int,
    logits: mx.array | None = None,
) -> Pair:
    """Attend by the kernel, and merge what its threadgroups found.

    Parameters
    ----------
    queries, sinks, packed, tail, scale, rows, logits
        See `digit_attention`.

    Returns
    -------
    tuple of mx.array
        See `digit_attention`.
    """
    k, v = packed
    launch = None
    first = tail if sinks is None or not sinks[0].size else sinks
    if first[0].dtype == tail[0].dtype and first[1].dtype == tail[1].dtype:
        launch = layout(
            queries.shape, queries.dtype, None if first is tail else first[0].shape, (tail[0].shape, tail[1].shape),
            (k.codes_a.shape, k.codes_b.shape, k.codes_c.shape), (v.codes_a.shape, v.codes_b.shape, v.codes_c.shape),
            logits is not None,
        )  # fmt: skip
    if launch is None or not 0 < rows <= tail[0].shape[2]:
        return reference_digit_attention(queries, sinks, packed, tail, scale, rows, logits)
    if launch.gaps:
        k, v = _filled(k), _filled(v)
    count = newest_rows(rows)
    B, Hq = queries.shape[:2]
    (parts,) = _ATTEND(
        inputs=[
            queries, *first, *tail, *k, v.order, v.place, *v[4:],
            queries if logits is None else logits, factor(scale), launch.sizes, count,
        ],
        template=launch.template,
        grid=launch.grid,
        threadgroup=THREADGROUP,
        output_shapes=[(B, Hq, launch.width + rows)],
        output_dtypes=[mx.float32],
    )  # fmt: skip
    output, mass = _MERGE(
        inputs=[parts, v.basis, v.order, v.mean, launch.sizes, count],
        template=launch.merge_template,
        grid=launch.merge_grid,
        threadgroup=THREADGROUP,
        output_shapes=[launch.shape, (B, tail[0].shape[1], rows)],
        output_dtypes=[queries.dtype, mx.float32],
    )
    return output, mass


def _filled(slot: DigitSlot) -> DigitSlot:
    """Return a slot with another array in the place of those without elements: no buffer can be empty."""
    return DigitSlot(*(part if part.size else nothing() for part in slot))


def _check(packed: DigitRows, tail: Pair, rows: int) -> None:
    """Check that keys and values have the same rows, and that the newest tokens are there."""
    keys, values = packed
    if keys.rows != values.rows or not 0 < rows <= tail[0].shape[2]:
        raise MismatchError(
            f"packed keys have {keys.rows} rows, packed values {values.rows}, and {rows} of {tail[0].shape[2]} newest tokens"
        )


def _packed_scores(queries: mx.array, keys: DigitSlot) -> list[mx.array]:
    """Return the products `[B, H, G, rows]` of queries `[B, H, G, D]` with the keys of each bucket, but for their mean."""
    B, H, G, _ = queries.shape
    turned = mx.expand_dims(queries @ keys.basis.astype(mx.float32), 2) * _deviations_of(keys)  # [B, H, tiles, G, D]
    expanded = turned @ mx.expand_dims(channels(keys), 2).swapaxes(-1, -2)  # [B, H, tiles, G, largest N]
    found, first = [], 0
    for codes, scales, place in keys.buckets():
        (count, width), tiles = codes.shape[2:], scales.shape[2]
        if not codes.size:
            found.append(mx.zeros((B, H, G, count)))
            continue
        own = expanded[:, :, first : first + tiles, :, : 4 * width] * mx.expand_dims(place, (2, 3))
        products = own @ masked_digits(codes).swapaxes(-1, -2) - own @ mx.expand_dims(middles(4 * width), -1)
        found.append(products.swapaxes(2, 3).reshape(B, H, G, -1)[..., :count])  # of [B, H, tiles, G, 128]
        first += tiles
    return found


def _weighted(weights: mx.array, values: DigitSlot) -> mx.array:
    """Return the sum `[B, H, G, Dv]` of the values of all buckets, with weights `[B, H, G, rows of all]`."""
    B, H, G, _ = weights.shape
    which, start = mx.expand_dims(channels(values), 2), 0
    coordinates: list[mx.array] = []  # each [B, H, tiles, G, D]
    for codes, scales, place in values.buckets():
        count, tiles, digits = codes.shape[2], scales.shape[2], place.shape[-1]
        if codes.size:
            own = weights[..., start : start + count]
            if count < tiles * TILE:
                own = mx.pad(own, [(0, 0)] * 3 + [(0, tiles * TILE - count)])
            own = own.reshape(B, H, G, tiles, TILE).swapaxes(2, 3)
            sums = own @ masked_digits(codes) - own.sum(axis=-1, keepdims=True) * middles(digits)
            coordinates.append((sums * mx.expand_dims(place, (2, 3))) @ which[..., :digits, :])
        start += count
    total = weights.sum(axis=-1, keepdims=True) * mx.expand_dims(values.mean.astype(mx.float32), 2)
    if not coordinates:
        return total
    turned = (mx.concatenate(coordinates, axis=2) * _deviations_of(values)).sum(axis=2)
    return total + turned @ values.basis.astype(mx.float32).swapaxes(-1, -2)


def _deviations_of(slot: DigitSlot) -> mx.array:
    """Return the deviations of all tiles that hold digits, `[B, H, tiles, 1, D]`, in units of the basis."""
    scales = [scales for codes, scales in zip(slot.codes, slot.scales) if codes.size]
    if not scales:
        return mx.zeros((*slot.mean.shape[:2], 0, 1, slot.mean.shape[-1]))
    return mx.expand_dims(_deviations_in_units()[mx.concatenate(scales, axis=2)], 3)


@lru_cache(1)
def _deviations_in_units() -> mx.array:
    """Return what each scale stands for times a column of the basis, float32 `[256]`."""
    return mx.array(np.array(deviations()) / UNIT)


@lru_cache(1)
def _masks() -> mx.array:
    """Return the bits of each digit of a byte, uint8 `[4, 1]`."""
    return mx.array([[3], [12], [48], [192]], mx.uint8)


@lru_cache
def _identity(dims: int) -> mx.array:
    return mx.array(np.eye(dims, dtype=np.float32))  # there at once: any thread can use it


def _example(bits: float) -> Callable[[int], tuple]:
    """Return a call of 32 query heads over 8 kv heads: 4 sinks, packed tokens of so many bits a dim, 40 of a tail's 48 rows."""

    def slot(random: np.random.Generator, rows: tuple[int, int, int]) -> DigitSlot:
        widths = [int(16 * bits * share) for share in (1.5, 1.25, 0.875)]  # bytes
        return DigitSlot(
            mx.array(random.integers(-30, 31, (1, 8, 128, 128)), mx.int8),
            mx.array(random.integers(0, 128, (1, 8, 4 * max(widths))), mx.uint8),
            mx.array(random.uniform(0.005, 0.02, (1, 8, 4 * sum(widths)))).astype(mx.bfloat16),
            mx.array(random.standard_normal((1, 8, 128))).astype(mx.bfloat16),
            *(mx.array(random.integers(0, 256, (1, 8, n, w)), mx.uint8) for n, w in zip(rows, widths)),
            *(mx.array(random.integers(100, 124, (1, 8, -(-n // TILE), 128)), mx.uint8) for n in rows),
        )

    def arguments(tokens: int) -> tuple:
        random, blocks = np.random.default_rng(0), -(-tokens // 16)
        queries, first, newest = (
            mx.array(random.standard_normal(shape)).astype(mx.bfloat16)
            for shape in ((1, 32, 1, 128), (1, 8, 4, 128), (1, 8, 48, 128))
        )
        rows = (blocks, 4 * blocks, 11 * blocks)
        packed = DigitRows(slot(random, rows), slot(random, rows))
        return queries, (first, first), packed, (newest, newest), 128**-0.5, 40

    return arguments


register(
    Operation(
        "digit_attention.digit_attention",
        digit_attention,
        reference_digit_attention,
        metal_digit_attention,
        (
            Example("32/8 heads x 128 dims, 2.5 bits, a short text", _example(2.5), 256),
            Example("32/8 heads x 128 dims, 1.5 bits", _example(1.5)),
            Example("32/8 heads x 128 dims, 2.5 bits", _example(2.5)),
            Example("32/8 heads x 128 dims, 2.5 bits", _example(2.5), 32768),
        ),
    )
)

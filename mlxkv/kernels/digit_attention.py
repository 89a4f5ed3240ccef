"""Attention of one new token over tokens in digits of 2 bits: coordinates in a basis of each head's own, some finer than others.

A row of a bucket is a token. Channel i of the row is a code of n digits, n = 0..4, `c = sum_j 4^(n-1-j) (d_j - 1.5)`; its coordinate is
the code times a step, and the token is the mean and the sum of coordinates times the basis' columns. So the product of a query with a row is a product
of digits with an expanded query, and rows are never put together (`DigitSlot` says how digits, places and scales are kept).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxkv.errors import MismatchError

Pair = tuple[mx.array, mx.array]

BUCKETS = 3  # of a slot: tokens of one bucket have equally many digits
DIGITS = 4  # of a byte
TILE_ROWS = 128  # rows of a bucket that share the scales of their channels
MIDDLE = 1.5  # of the values 0..3 that a digit has
SCALE_STEPS = 8  # steps of a scale in an octave
SCALE_ZERO = 128  # the byte of a scale that is 1


class DigitSlot(NamedTuple):
    """Keys or values of the packed tokens of one layer, in three buckets.

    Parameters
    ----------
    basis
        int8 `[B, Hkv, D, D]`: its columns are directions, each times a factor of its own.
    place
        float16 `[B, Hkv, N0 + N1 + N2]`: what a digit of each bucket counts, for a scale of 1; the factor of its column is in it.
    order
        uint8, or uint16 where D > 256, `[B, Hkv, max N]`: the channel (column) that a digit belongs to. All buckets share it: bucket b has
        the first Nb.
    mean
        float16 `[B, Hkv, D]`, which is not in the digits.
    codes
        uint8 `[B, Hkv, Tb, Nb / 4]` for each bucket: digit p is in bits 2 (p % 4) of byte p // 4.
    scales
        uint8 `[B, Hkv, ceil(Tb / 128), D]` for each bucket: `2 ** ((u - 128) / 8)` scales a channel in 128 rows.
    """

    basis: mx.array
    place: mx.array
    order: mx.array
    mean: mx.array
    codes: tuple[mx.array, ...]
    scales: tuple[mx.array, ...]

    def digits(self, bucket: int) -> int:
        """Return Nb, the number of digits of a row.

        Parameters
        ----------
        bucket
            0 to 2.

        Returns
        -------
        int
            A multiple of 4.
        """
        return DIGITS * int(self.codes[bucket].shape[-1])

    def places(self, bucket: int) -> slice:
        """Return where a bucket's digits are in `place`.

        Parameters
        ----------
        bucket
            0 to 2.

        Returns
        -------
        slice
            Of the last axis.
        """
        start = sum(self.digits(before) for before in range(bucket))
        return slice(start, start + self.digits(bucket))


class DigitRows(NamedTuple):
    """Keys and values of the packed tokens of one layer; bucket b of both has the same tokens in the same order.

    Parameters
    ----------
    keys
        Dims D.
    values
        Dims Dv; N of its own.
    """

    keys: DigitSlot
    values: DigitSlot

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of rows of each bucket."""
        return tuple(int(codes.shape[2]) for codes in self.keys.codes)


def digit_attention(
    queries: mx.array, sinks: Pair | None, packed: DigitRows, tail: Pair, scale: float, rows: int
) -> tuple[mx.array, mx.array]:
    """Return softmax(scale * queries . keys) . values of one token, accumulated in float32, and the attention that the tail gets.

    Parameters
    ----------
    queries
        `[B, Hq, 1, D]`, float32, float16 or bfloat16. Hq is a multiple of Hkv: query head h reads key/value head
        h // (Hq // Hkv).
    sinks
        Unquantized keys `[B, Hkv, n, D]` and values `[B, Hkv, n, Dv]` of one float type; None for none.
    packed
        Packed tokens.
    tail
        Unquantized keys `[B, Hkv, n, D]` and values `[B, Hkv, n, Dv]` of one float type: a buffer.
    scale
        Factor on the products, such as D**-0.5.
    rows
        How many rows of the tail count, 1 to n.

    Returns
    -------
    tuple of mx.array
        The output `[B, Hq, 1, Dv]` of queries' type, and `[B, Hkv, rows]` float32: the attention probability of each token of the
        tail, summed over the query heads that share its key/value head.

    Raises
    ------
    MismatchError
        For shapes that do not fit together.
    """
    return reference_digit_attention(queries, sinks, packed, tail, scale, rows)


def reference_digit_attention(
    queries: mx.array, sinks: Pair | None, packed: DigitRows, tail: Pair, scale: float, rows: int
) -> tuple[mx.array, mx.array]:
    """Attend by array operations; digits are widened, and rows are not put together.

    Parameters
    ----------
    queries, sinks, packed, tail, scale, rows
        See `digit_attention`.

    Returns
    -------
    tuple of mx.array
        See `digit_attention`.
    """
    check(queries, sinks, packed, tail, rows)
    B, Hq, _, D = queries.shape
    Hkv = tail[0].shape[1]
    grouped = (queries.astype(mx.float32) * scale).reshape(B, Hkv, Hq // Hkv, D)
    plain = [(k[:, :, :rows], v[:, :, :rows]) for k, v in ([] if sinks is None else [sinks])]
    plain.append((tail[0][:, :, :rows], tail[1][:, :, :rows]))
    scores = digit_scores(grouped, packed.keys)
    scores += [grouped @ k.astype(mx.float32).swapaxes(-1, -2) for k, _ in plain]
    weights = mx.softmax(mx.concatenate(scores, axis=-1), axis=-1, precise=True)
    count = sum(packed.counts)
    output, start = digit_sums(weights[..., :count], packed.values), count
    for _, v in plain:
        output = output + weights[..., start : start + v.shape[2]] @ v.astype(mx.float32)
        start += v.shape[2]
    mass = weights[..., start - rows :].sum(axis=-2)
    return output.reshape(B, Hq, 1, -1).astype(queries.dtype), mass


def check(queries: mx.array, sinks: Pair | None, packed: DigitRows, tail: Pair, rows: int) -> None:
    """Check that all shapes fit together.

    Parameters
    ----------
    queries, sinks, packed, tail, rows
        See `digit_attention`.

    Raises
    ------
    MismatchError
        When they do not.
    """
    B, Hq, L, D = queries.shape
    Hkv, Dv = packed.values.basis.shape[1], packed.values.basis.shape[-1]
    if L != 1 or Hq % Hkv:
        raise MismatchError(f"queries {queries.shape}: expected one token and a multiple of {Hkv} heads")
    for keys, values in (tail,) if sinks is None else (sinks, tail):
        if keys.shape != (B, Hkv, keys.shape[2], D) or values.shape != (B, Hkv, keys.shape[2], Dv):
            raise MismatchError(f"keys {keys.shape} and values {values.shape} do not fit queries {queries.shape}")
    if packed.keys.basis.shape != (B, Hkv, D, D) or not 0 < rows <= tail[0].shape[2]:
        raise MismatchError(
            f"a basis {packed.keys.basis.shape} and {rows} of {tail[0].shape[2]} rows do not fit queries {queries.shape}"
        )


def digit_scores(queries: mx.array, slot: DigitSlot) -> list[mx.array]:
    """Multiply queries by the transpose of packed keys.

    Parameters
    ----------
    queries
        `[B, Hkv, G, D]` float32.
    slot
        Keys.

    Returns
    -------
    list of mx.array
        `[B, Hkv, G, Tb]` float32 for each bucket.
    """
    B, H, G, _ = queries.shape
    turned = queries @ slot.basis.astype(mx.float32)
    constant = queries @ mx.expand_dims(slot.mean.astype(mx.float32), -1)  # [B, H, G, 1]
    found: list[mx.array] = []
    for b, codes in enumerate(slot.codes):
        T, N = codes.shape[2], slot.digits(b)
        if not N or not T:
            found.append(mx.broadcast_to(constant, (B, H, G, T)))
            continue
        factors = digit_factors(slot, b)  # [B, H, tiles, N]
        at = mx.broadcast_to(slot.order[:, :, None, :N].astype(mx.uint32), (B, H, G, N))
        expanded = mx.take_along_axis(turned, at, axis=-1)[:, :, None] * factors[:, :, :, None]  # [B, H, tiles, G, N]
        digits = _in_tiles(widen(codes))
        products = digits @ expanded.swapaxes(-1, -2) - MIDDLE * expanded.sum(axis=-1)[..., None, :]
        found.append(products.reshape(B, H, -1, G)[:, :, :T].swapaxes(-1, -2) + constant)
    return found


def digit_sums(weights: mx.array, slot: DigitSlot) -> mx.array:
    """Sum packed values with weights.

    Parameters
    ----------
    weights
        `[B, Hkv, G, T0 + T1 + T2]` float32, in the order of the buckets.
    slot
        Values.

    Returns
    -------
    mx.array
        `[B, Hkv, G, Dv]` float32.
    """
    B, H, G, _ = weights.shape
    D, start = slot.basis.shape[-1], 0
    sums = mx.zeros((B, H, G, D))
    for b, codes in enumerate(slot.codes):
        T, N = codes.shape[2], slot.digits(b)
        own, start = weights[..., start : start + T], start + T
        if N and T:
            tiled = _in_tiles(own.swapaxes(-1, -2)).swapaxes(-1, -2)  # [B, H, tiles, G, rows]
            digits = tiled @ _in_tiles(widen(codes)) - MIDDLE * tiled.sum(axis=-1, keepdims=True)
            total = (digits * digit_factors(slot, b)[:, :, :, None]).sum(axis=2)  # [B, H, G, N]
            at = mx.broadcast_to(slot.order[:, :, None, :N].astype(mx.uint32), (B, H, G, N))
            sums = sums + _added_at(at, total, D)
    turned = sums @ slot.basis.astype(mx.float32).swapaxes(-1, -2)
    return turned + weights.sum(axis=-1, keepdims=True) * slot.mean.astype(mx.float32)[:, :, None]


def digit_factors(slot: DigitSlot, bucket: int) -> mx.array:
    """Return what each digit of a bucket counts in each tile.

    Parameters
    ----------
    slot
        Keys or values.
    bucket
        0 to 2.

    Returns
    -------
    mx.array
        `[B, Hkv, tiles, Nb]` float32.
    """
    sigma = scales_of(slot.scales[bucket])
    at = slot.order[:, :, None, : slot.digits(bucket)].astype(mx.uint32)
    at = mx.broadcast_to(at, (*sigma.shape[:3], at.shape[-1]))
    return mx.take_along_axis(sigma, at, axis=-1) * slot.place[:, :, None, slot.places(bucket)].astype(mx.float32)


def scales_of(codes: mx.array) -> mx.array:
    """Return the scales that bytes stand for.

    Parameters
    ----------
    codes
        uint8, any shape.

    Returns
    -------
    mx.array
        float32, of the same shape.
    """
    return mx.take(_scale_table(), codes)


def widen(codes: mx.array) -> mx.array:
    """Return the digits of bytes.

    Parameters
    ----------
    codes
        uint8 `[..., n]`.

    Returns
    -------
    mx.array
        0, 1, 2 or 3 as float32, `[..., 4 n]`.
    """
    return mx.take(_digit_table(), codes, axis=0).reshape(*codes.shape[:-1], -1)


def _in_tiles(x: mx.array) -> mx.array:
    """Split `[B, H, T, n]` into tiles `[B, H, tiles, 128, n]`, with zeros after the last row."""
    B, H, T, n = x.shape
    if T % TILE_ROWS:
        x = mx.pad(x, [(0, 0), (0, 0), (0, -T % TILE_ROWS), (0, 0)])
    return x.reshape(B, H, -1, TILE_ROWS, n)


def _added_at(at: mx.array, values: mx.array, size: int) -> mx.array:
    """Add values `[..., N]` up by their channels, `[..., size]`."""
    chosen = at[..., 0, :, None] == mx.arange(size)
    return values @ chosen.astype(mx.float32)


@lru_cache
def _scale_table() -> mx.array:
    return mx.array(np.exp2((np.arange(256) - SCALE_ZERO) / SCALE_STEPS).astype(np.float32))


@lru_cache
def _digit_table() -> mx.array:
    return mx.array((np.arange(256)[:, None] >> 2 * np.arange(DIGITS) & 3).astype(np.float32))


def pack_digits(digits: mx.array) -> mx.array:
    """Pack digits into bytes.

    Parameters
    ----------
    digits
        0 to 3 of any integer type, `[..., N]`; N is a multiple of 4.

    Returns
    -------
    mx.array
        uint8 `[..., N / 4]`.
    """
    parts = [digits[..., j::DIGITS].astype(mx.uint8) << (2 * j) for j in range(DIGITS)]
    return parts[0] | parts[1] | parts[2] | parts[3]


__all__: Sequence[str] = (
    "DigitRows",
    "DigitSlot",
    "digit_attention",
    "pack_digits",
    "reference_digit_attention",
)

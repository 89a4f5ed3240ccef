"""Rows of digits from tokens, and tokens from rows of digits."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlxkv.kernels.digit_attention import (
    PLANES,
    STEPS,
    TILE,
    UNIT,
    DigitSlot,
    channels,
    deviations,
    masked_digits,
    middles,
)
from mlxkv.live.klt.learning import inverse, levels, places_of

SHARES = (1, 4, 11)  # sixteenths of the tokens packed at a time that each bucket gets, the most important first
_FARTHEST = 2.0**20  # units from the mean, more than scales reach
_PRIOR = 16  # tokens that the tile before counts as, where a tile begins with few
# Of the largest value of a tile, what a scale covers at least, by the digits of a channel.
_COVERED = (0.0, 0.85, 1.0, 1.0, 1.0)


def ranked(importance: mx.array) -> list[mx.array]:
    """Return the tokens of each bucket.

    Parameters
    ----------
    importance
        `[B, H, T]`, T a multiple of 16.

    Returns
    -------
    list of mx.array
        Indices `[B, H, rows]` of each bucket, in the order of the text.
    """
    order, total = mx.argsort(-importance, axis=-1), importance.shape[-1]
    stops = np.cumsum([total * share // sum(SHARES) for share in SHARES]).tolist()
    return [mx.sort(part, axis=-1) for part in mx.split(order, stops[:-1], axis=-1)]


def append(slot: DigitSlot, x: mx.array, indices: list[mx.array]) -> DigitSlot:
    """Code tokens, after those that are there.

    Parameters
    ----------
    slot
        What `learn` returned, or this.
    x
        Keys or values `[B, H, T, D]` float32.
    indices
        The tokens of each bucket, as `ranked` returns them.

    Returns
    -------
    DigitSlot
        With the new rows. What a tile's scale does not cover is clipped.
    """
    which = channels(slot)
    first = places_of(which[:, :, : 4 * slot.codes_a.shape[-1]])[..., :1]
    units = mx.expand_dims(first / slot.place[..., :1].astype(mx.float32), 2)
    apart = x * units - mx.expand_dims(slot.mean.astype(mx.float32), 2) * units  # in the unit that was learnt
    z = mx.clip(apart, -_FARTHEST, _FARTHEST) @ inverse(slot.basis).swapaxes(-1, -2)
    codes: list[mx.array] = []
    scales: list[mx.array] = []
    for (old, before, place), rows in zip(slot.buckets(), indices):
        own = which[:, :, : place.shape[-1]]
        part = mx.take_along_axis(z, mx.expand_dims(rows, -1), axis=2)
        counts = own.sum(axis=2)  # [B, H, D], digits of each channel
        grown = _scales(part, counts, before, old.shape[2])
        tiles = np.arange(old.shape[2], old.shape[2] + part.shape[2]) // TILE
        spread = deviations()[mx.take(grown, mx.array(tiles), axis=2)]  # [B, H, rows, D]
        codes.append(mx.concatenate([old, _digits(part / spread, counts, own)], axis=2))
        scales.append(grown)
    return slot._replace(
        codes_a=codes[0], codes_b=codes[1], codes_c=codes[2],
        scales_a=scales[0], scales_b=scales[1], scales_c=scales[2],
    )  # fmt: skip


def decoded(slot: DigitSlot) -> mx.array:
    """Return the tokens that rows stand for.

    Parameters
    ----------
    slot
        Packed keys or values.

    Returns
    -------
    mx.array
        `[B, H, rows of all buckets, D]` float32: the first bucket's, then the second's and the third's.
    """
    which, parts = channels(slot), []
    for codes, scales, place in slot.buckets():
        B, H, count, width = codes.shape
        own = which[:, :, : 4 * width]
        values = (masked_digits(codes) - middles(4 * width)) * place[:, :, None, None]
        z = (values @ own[:, :, None]) * mx.expand_dims(deviations()[scales], 3)
        parts.append(z.reshape(B, H, -1, own.shape[-1])[:, :, :count])
    basis = slot.basis.astype(mx.float32) * (1 / UNIT)
    together = mx.concatenate(parts, axis=2) @ basis.swapaxes(-1, -2)
    return together + mx.expand_dims(slot.mean.astype(mx.float32), 2)


def _scales(z: mx.array, counts: mx.array, before: mx.array, rows: int) -> mx.array:
    """Return the scales of all tiles, where coordinates `[B, H, n, D]` follow so many rows that have some already."""
    B, H, count, D = z.shape
    left = before.shape[2] * TILE - rows  # of the last tile, whose scale stays
    if count <= left:
        return before
    new = z[:, :, left:]
    tiles = -(-new.shape[2] // TILE)
    padded = mx.pad(new, [(0, 0), (0, 0), (0, tiles * TILE - new.shape[2]), (0, 0)]).reshape(B, H, tiles, TILE, D)
    held = np.full((tiles, 1), float(TILE), np.float32)
    held[-1] = new.shape[2] - (tiles - 1) * TILE
    variance = mx.square(padded).sum(axis=3) / mx.array(held)
    if held[-1] < _PRIOR and (tiles > 1 or before.shape[2]):
        earlier = variance[:, :, -2:-1] if tiles > 1 else mx.square(deviations()[before[:, :, -1:]])
        blended = (held[-1].item() * variance[:, :, -1:] + _PRIOR * earlier) / (held[-1].item() + _PRIOR)
        variance = mx.concatenate([variance[:, :, :-1], blended], axis=2)
    whole = counts.astype(mx.uint8)
    reach = mx.array(np.array([step * 2.0 ** (2 * n - 1) for n, step in enumerate(STEPS)], np.float32))[whole]
    share = mx.array(np.array(_COVERED, np.float32))[whole]
    largest = mx.abs(padded).max(axis=3) * mx.expand_dims(share / mx.maximum(reach, 1e-3), 2)
    spread = mx.maximum(mx.sqrt(variance), largest)
    steps = mx.clip(mx.round(mx.log2(mx.maximum(spread, 2.0**-17)) * 8) + 128, 0, 255)
    return mx.concatenate([before, steps.astype(mx.uint8)], axis=2)


def _digits(z: mx.array, counts: mx.array, own: mx.array) -> mx.array:
    """Return rows of digits, uint8 `[B, H, n, N / 4]`, of coordinates `[B, H, n, D]` in standard deviations."""
    B, H, count, _ = z.shape
    digits = own.shape[2]
    step = mx.array(np.array((1.0, *STEPS[1:]), np.float32))[counts.astype(mx.uint8)]
    half = mx.expand_dims(mx.power(2.0, 2 * counts - 1), 2)
    whole = mx.clip(mx.floor(z / mx.expand_dims(step, 2)), -half, half - 1) + half  # 0 to 4 ** digits - 1
    least = mx.power(4.0, own @ mx.expand_dims(counts, -1) - 1 - mx.expand_dims(levels(own), -1))  # [B, H, N, 1]
    each = mx.floor((whole @ own.swapaxes(-1, -2)) / least.swapaxes(-1, -2))
    each = (each - 4 * mx.floor(each / 4)).reshape(B, H, count, 4, digits // 4)
    return (each * mx.array(PLANES)[:, None]).sum(axis=3).astype(mx.uint8)

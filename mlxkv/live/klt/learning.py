"""Directions of a text's keys and values: a Karhunen-Loeve transform (KLT) a head, and which channels get how many digits."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from mlxkv.kernels.digit_attention import DIGITS, PLANES, STEPS, UNIT, DigitSlot, channels
from mlxkv.spec import Slot

POSITIONS = 64  # that keys are rotated to
AHEAD = 2  # times as many tokens as are there: positions that keys are to be coded at
_SMALLEST = 1e-12  # of a variance, beside the largest
_LEAST = 2.0**-16  # of the first variance, beside the square of the largest value


def learn(x: mx.array, slot: Slot, start: int, digits: tuple[int, int, int], dtype: mx.Dtype) -> DigitSlot:
    """Learn from tokens how to code them and those that follow.

    Keys turn with their position, and so do their directions. Half of the moments are the tokens' own; the other half those that
    the tokens would have at positions up to twice as far.

    Parameters
    ----------
    x
        Keys or values of consecutive tokens, `[B, H, T, D]` float32.
    slot
        Their description.
    start
        Position of the first one.
    digits
        Digits of a row of each bucket; multiples of 4.
    dtype
        Type that tokens are stored in.

    Returns
    -------
    DigitSlot
        Of no row. Nothing waits for the device.
    """
    size = _size(x)  # squares of large values would not be finite
    x = x / mx.expand_dims(size, -1)
    mean, second = _moments(x)
    if slot.rope is not None:
        moved_mean, moved = _moved(slot, x, start)
        mean, second = (mean + moved_mean) / 2, (second + moved) / 2
    covariance = second - mx.expand_dims(mean, -1) * mx.expand_dims(mean, -2)
    values, vectors = mx.linalg.eigh(covariance, stream=mx.cpu)
    values, vectors = values[..., ::-1], vectors[..., ::-1]  # largest first
    order = _order(values, max(digits))
    B, H, D = mean.shape
    basis = mx.round(vectors * UNIT).astype(mx.int8)
    unit = size * mx.power(2.0, mx.floor(mx.log2(mx.maximum(values[..., :1], _LEAST)) / 2))  # exact in bfloat16
    empty = [mx.zeros((B, H, 0, n // 4), mx.uint8) for n in digits]
    scales = [mx.zeros((B, H, 0, D), mx.uint8) for _ in digits]
    found = DigitSlot(basis, order, mx.zeros(0), (mean * size).astype(dtype), *empty, *scales)
    which = channels(found)
    places = mx.concatenate([places_of(which[:, :, :n]) for n in digits], axis=-1)
    return found._replace(place=(places * unit).astype(mx.bfloat16))


def inverse(basis: mx.array) -> mx.array:
    """Return what turns tokens into the coordinates of a basis, whose columns are nearly orthonormal.

    Parameters
    ----------
    basis
        int8 `[B, H, D, D]`.

    Returns
    -------
    mx.array
        float32 `[B, H, D, D]`, by two steps of Newton's method from the transpose.
    """
    matrix = basis.astype(mx.float32) * (1 / UNIT)
    found = matrix.swapaxes(-1, -2)
    twice = 2 * mx.eye(matrix.shape[-1])
    for _ in range(2):
        found = found @ (twice - matrix @ found)
    return found


def levels(which: mx.array) -> mx.array:
    """Return how many earlier digits each digit's channel has.

    Parameters
    ----------
    which
        As `channels` returns it, `[B, H, N, D]`.

    Returns
    -------
    mx.array
        float32 `[B, H, N]`: 0 for the most significant digit of a channel.
    """
    return (mx.cumsum(which, axis=-2) * which).sum(axis=-1) - 1


def places_of(which: mx.array) -> mx.array:
    """Return what each digit of a bucket counts for, of the byte with its other digits masked.

    Parameters
    ----------
    which
        Its channels, `[B, H, N, D]`.

    Returns
    -------
    mx.array
        float32 `[B, H, N]`, in deviations.
    """
    count = (which @ mx.expand_dims(which.sum(axis=-2), -1))[..., 0]  # digits of the digit's channel
    steps = mx.array(np.array(STEPS, np.float32))[count.astype(mx.uint8)]
    planes = mx.array(np.repeat(np.array(PLANES, np.float32), which.shape[2] // 4))
    return mx.power(4.0, count - 1 - levels(which)) * steps / planes


def _size(x: mx.array) -> mx.array:
    """Return a power of 2 a head, `[B, H, 1]`, that none of `[B, H, T, D]` is much larger than."""
    most = mx.abs(x).max(axis=(2, 3))[..., None]
    return mx.power(2.0, mx.ceil(mx.log2(mx.clip(most, 2.0**-100, 2.0**126))))


def _order(variances: mx.array, digits: int) -> mx.array:
    """Return the channels of so many digits, `[B, H, digits]`, by reverse water-filling: each digit takes 15/16 of the error."""
    D = variances.shape[-1]
    floor = mx.maximum(variances[..., :1] * _SMALLEST, 1e-30)
    logs = mx.log(mx.maximum(variances, floor))
    gains = mx.expand_dims(logs, -1) - mx.arange(DIGITS) * math.log(16)
    best = mx.argsort(-gains.reshape(*gains.shape[:2], -1), axis=-1)[..., :digits]
    return (best // DIGITS).astype(mx.uint8 if D <= 256 else mx.uint16)


def _moments(x: mx.array) -> tuple[mx.array, mx.array]:
    """Return mean `[B, H, D]` and second moments `[B, H, D, D]` of `[B, H, T, D]`."""
    return x.mean(axis=2), x.swapaxes(-1, -2) @ x / x.shape[2]


def _moved(slot: Slot, x: mx.array, start: int) -> tuple[mx.array, mx.array]:
    """Return the moments that keys would have at positions spread up to twice as far as they are."""
    assert slot.rope is not None
    mean, second = _moments(slot.rope.unrotate(x, start))
    last = AHEAD * (start + x.shape[2])
    turns = [_turn(slot, int(place)) for place in np.linspace(0, last, POSITIONS)]  # each [D, D]
    turned = mx.stack(turns)[:, None, None]
    moved = (turned @ second @ turned.swapaxes(-1, -2)).mean(axis=0)
    return (turned @ mx.expand_dims(mean, -1)).mean(axis=0)[..., 0], moved


def _turn(slot: Slot, position: int) -> mx.array:
    """Return the matrix that rotates a key of position 0 to another position, `[D, D]`."""
    assert slot.rope is not None
    rows = slot.rope.rotate(mx.eye(slot.dim)[None, :, None], position)  # one token of D heads, each a unit vector
    return rows[0, :, 0].T

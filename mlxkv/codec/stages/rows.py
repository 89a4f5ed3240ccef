"""Layers `[B, H, T, D]` to un-rotated token rows `[B*T, p]`, and back.

A row is one token: all layers, then all heads, then all dims, p = layers * heads * dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlxkv.kernels import rows as kernel
from mlxkv.spec import Stream


def to_rows(
    stream: Stream, layers: Sequence[np.ndarray] | Sequence[mx.array], start: int, stop: int, first: int = 0
) -> mx.array:
    """Return the token rows of one stream, with the rotation undone.

    Parameters
    ----------
    stream
        The stream.
    layers
        Its cached tensors `[B, H, T, D]`, one for each caching layer.
    start, stop
        Range of tokens, from `start` up to `stop`.
    first
        Position of the layers' first token.

    Returns
    -------
    mx.array
        Rows `[B * (stop - start), p]` float32, batch-major.
    """
    x = mx.stack([mx.array(layer[:, :, start:stop]) for layer in layers])  # [L, B, H, t, D]
    return kernel.to_rows(x, kernel.rotation_table(stream.ropes, stream.dim, first + start, stop - start, inverse=True))


def from_rows(stream: Stream, rows: mx.array, batch: int, start: int, dtype: mx.Dtype) -> mx.array:
    """Return the inverse of `to_rows`: rows rotated again and split into layers, within the range of their type.

    Parameters
    ----------
    stream
        The stream.
    rows
        Token rows `[B * t, p]` float32.
    batch
        Number of sequences B.
    start
        Position of the first token.
    dtype
        Type of the result.

    Returns
    -------
    mx.array
        Cached tensors `[layers, B, H, t, D]`, finite for finite rows.
    """
    tokens = rows.shape[0] // batch
    turn = kernel.rotation_table(stream.ropes, stream.dim, start, tokens, inverse=False)
    shape, limit = (stream.layers, batch, stream.heads, tokens, stream.dim), mx.finfo(dtype).max
    wide = kernel.from_rows(rows, shape, turn, mx.float32)
    # The error of a value near the end of its type's range, or its rotation, may carry it beyond.
    return mx.clip(wide, -limit, limit).astype(dtype)


def to_plain_rows(layers: Sequence[np.ndarray] | Sequence[mx.array], start: int, stop: int) -> mx.array:
    """Return the token rows of one stream as they are cached, rotation included.

    Parameters
    ----------
    layers
        Its cached tensors `[B, H, T, D]`, one for each caching layer.
    start, stop
        Range of tokens, from `start` up to `stop`.

    Returns
    -------
    mx.array
        Rows `[B * (stop - start), p]` of the layers' type, batch-major.
    """
    x = mx.stack([mx.array(layer[:, :, start:stop]) for layer in layers])  # [L, B, H, t, D]
    count, batch, heads, tokens, dim = x.shape
    return x.transpose(1, 3, 0, 2, 4).reshape(batch * tokens, count * heads * dim)


def from_plain_rows(stream: Stream, rows: mx.array, batch: int, dtype: mx.Dtype) -> mx.array:
    """Return the inverse of `to_plain_rows`.

    Parameters
    ----------
    stream
        The stream.
    rows
        Token rows `[B * t, p]`.
    batch
        Number of sequences B.
    dtype
        Type of the result.

    Returns
    -------
    mx.array
        Cached tensors `[layers, B, H, t, D]`.
    """
    shape = (batch, rows.shape[0] // batch, stream.layers, stream.heads, stream.dim)
    return rows.reshape(shape).transpose(2, 0, 3, 1, 4).astype(dtype)

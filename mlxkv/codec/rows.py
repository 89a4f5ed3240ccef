"""Stage 1: `[B, H, T, D]` layers to un-rotated token rows `[B*T, p]`, and back.

A row is one token: all layers, then all heads, then all dims, p = layers * heads * dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlxkv.cache import Stream


def to_rows(stream: Stream, layers: Sequence[np.ndarray] | Sequence[mx.array], start: int, stop: int) -> mx.array:
    """Tokens start..stop of every layer as float32 rows `[B * (stop - start), p]`, rotation undone."""
    x = mx.stack([mx.array(layer[:, :, start:stop]).astype(mx.float32) for layer in layers])  # [L, B, H, t, D]
    x = _each_rope(stream, x, lambda rope, part: rope.unrotate(part, start))
    return x.transpose(1, 3, 0, 2, 4).reshape(x.shape[1] * x.shape[3], stream.width)


def from_rows(stream: Stream, rows: mx.array, batch: int, start: int) -> mx.array:
    """Rows `[B * t, p]` of tokens from position `start` on, rotated again: `[layers, B, H, t, D]` float32."""
    x = rows.reshape(batch, -1, stream.layers, stream.heads, stream.dim).transpose(2, 0, 3, 1, 4)
    return _each_rope(stream, x, lambda rope, part: rope.rotate(part, start))


def _each_rope(stream: Stream, x: mx.array, turn: object) -> mx.array:
    """Apply `turn(rope, [n, H, t, D])` to every layer of x `[L, B, H, t, D]`, all layers of one rope at once."""
    if len(set(stream.ropes)) == 1:
        rope = stream.ropes[0]
        return x if rope is None else turn(rope, x.reshape(-1, *x.shape[2:])).reshape(x.shape)  # type: ignore[operator]
    parts = [part if rope is None else turn(rope, part) for rope, part in zip(stream.ropes, x)]  # type: ignore[operator]
    return mx.stack(parts)

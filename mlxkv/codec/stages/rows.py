"""Stage 1: `[B, H, T, D]` layers to un-rotated token rows `[B*T, p]`, and back.

A row is one token: all layers, then all heads, then all dims, p = layers * heads * dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlxkv.kernels import rows as kernel
from mlxkv.spec import Stream


def to_rows(stream: Stream, layers: Sequence[np.ndarray] | Sequence[mx.array], start: int, stop: int) -> mx.array:
    """Tokens start..stop of every layer as float32 rows `[B * (stop - start), p]`, rotation undone."""
    x = mx.stack([mx.array(layer[:, :, start:stop]) for layer in layers])  # [L, B, H, t, D]
    return kernel.to_rows(x, kernel.rotation_table(stream.ropes, stream.dim, start, stop - start, inverse=True))


def from_rows(stream: Stream, rows: mx.array, batch: int, start: int, dtype: mx.Dtype) -> mx.array:
    """Rows `[B * t, p]` of tokens from position `start` on, rotated again: `[layers, B, H, t, D]` of type dtype."""
    tokens = rows.shape[0] // batch
    turn = kernel.rotation_table(stream.ropes, stream.dim, start, tokens, inverse=False)
    return kernel.from_rows(rows, (stream.layers, batch, stream.heads, tokens, stream.dim), turn, dtype)

"""Products of one token's queries, and of its attention weights, with packed rows: the plain array operations of decode attention."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from mlxkv.kernels.bits import QuantizedArray, reference_unpack, slice_rows, unpack_codes

TILE_FLOATS = 2**18  # that the reference unpacks at a time: a megabyte, which fits a CPU's cache
# Running maxima start here, in the kernel's body too: finite, so that a fully masked row has weights 0 and not NaN.
LOWEST = -3.4e38


def softmax(scores: mx.array, sinks: mx.array | None) -> mx.array:
    """Return the softmax of `[B, H, G, T]` with the sinks in maximum and sum; zeros where every score is -inf."""
    top = mx.maximum(scores.max(axis=-1, keepdims=True), LOWEST)
    if sinks is None:
        weights = mx.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True)
    else:
        logits = sinks.astype(mx.float32).reshape(*scores.shape[1:3], 1)
        top = mx.maximum(top, logits)
        weights = mx.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True) + mx.exp(logits - top)
    return weights / mx.where(total == 0, 1, total)


def pieces_of(keys: QuantizedArray, values: QuantizedArray) -> Iterator[tuple[QuantizedArray, QuantizedArray]]:
    """Cut a bucket into pieces of TILE_FLOATS unpacked floats, at the edges of tiles of both keys and values."""
    tokens = math.lcm(keys.tile_tokens, values.tile_tokens)
    step = max(1, TILE_FLOATS // (math.prod(keys.shape[:-2]) * max(keys.dim, values.dim) * tokens)) * tokens
    for start in range(0, keys.shape[-2], step):
        yield slice_rows(keys, start, start + step), slice_rows(values, start, start + step)


def wait_for(packed: QuantizedArray, before: list[mx.array]) -> QuantizedArray:
    """Make a piece wait for the work on the piece before: MLX would else unpack many before it uses one."""
    return dataclasses.replace(packed, words=mx.depends(packed.words, before)) if before else packed


def scores_of(x: mx.array, packed: QuantizedArray) -> mx.array:
    """Multiply `[B, H, G, D]` float32 by the transpose of rows `[B, H, T, D]`, rotated if they are: `[B, H, G, T]`.

    A row is scale * code + bias. Scales shared by all of a token or all of a dim are factored out of the sum, so that the
    large array is never scaled. Other tiles are unpacked.
    """
    *lead, G, D = x.shape
    T = packed.shape[-2]
    if _scaled_by_token(packed):
        scale, bias = _scales(packed, "scale"), _scales(packed, "bias")  # [B, H, groups, T]
        split = x[..., None, :] * _groups(packed)  # [B, H, G, groups, D], each row zero outside its group
        products = split.reshape(*lead, -1, D) @ unpack_codes(packed).swapaxes(-1, -2)
        scaled = products.reshape(*split.shape[:-1], T) * scale[..., None, :, :]
        return scaled.sum(axis=-2) + split.sum(axis=-1) @ bias
    if _scaled_by_dim(packed):
        scale, bias = packed.scale.astype(mx.float32), packed.bias.astype(mx.float32)  # [B, H, tiles, D]
        tiles = unpack_codes(packed).reshape(*lead, -1, packed.tile_tokens, D)
        products = (x[..., None, :, :] * scale[..., None, :]) @ tiles.swapaxes(-1, -2)  # [B, H, tiles, G, tokens]
        products += (x @ bias.swapaxes(-1, -2)).swapaxes(-1, -2)[..., None]
        return products.swapaxes(-2, -3).reshape(*lead, G, T)
    return x @ _rows(packed).swapaxes(-1, -2)


def weighted_sum(weights: mx.array, packed: QuantizedArray) -> mx.array:
    """Multiply weights `[B, H, G, T]` float32 by rows `[B, H, T, D]`, rotated if they are: `[B, H, G, D]`."""
    *lead, G, T = weights.shape
    D = packed.dim
    if _scaled_by_token(packed):
        groups, scale, bias = _groups(packed), _scales(packed, "scale"), _scales(packed, "bias")
        split = weights[..., None, :] * scale[..., None, :, :]  # [B, H, G, groups, T]
        products = (split.reshape(*lead, -1, T) @ unpack_codes(packed)).reshape(*split.shape[:-1], D)
        return (products * groups).sum(axis=-2) + weights @ bias.swapaxes(-1, -2) @ groups
    if _scaled_by_dim(packed):
        scale, bias = packed.scale.astype(mx.float32), packed.bias.astype(mx.float32)
        tiles = unpack_codes(packed).reshape(*lead, -1, packed.tile_tokens, D)
        split = weights.reshape(*lead, G, -1, packed.tile_tokens).swapaxes(-2, -3)  # [B, H, tiles, G, tokens]
        products = (split @ tiles) * scale[..., None, :] + split.sum(axis=-1, keepdims=True) * bias[..., None, :]
        return products.sum(axis=-3)
    return weights @ _rows(packed)


def _rows(packed: QuantizedArray) -> mx.array:
    """Return the rows as they were packed, rotated or not, `[..., T, D]` float32."""
    return reference_unpack(dataclasses.replace(packed, rotated=False), mx.float32)


def _scaled_by_token(packed: QuantizedArray) -> bool:
    return (
        not packed.is_unquantized
        and packed.tile_tokens <= packed.tile_dims
        and packed.shape[-2] % packed.tile_tokens == 0
        and packed.shape[-2] > 0
        and packed.dim % packed.tile_dims == 0
    )


def _scaled_by_dim(packed: QuantizedArray) -> bool:
    return (
        not packed.is_unquantized
        and packed.tile_dims == 1
        and packed.shape[-2] > 0
        and packed.shape[-2] % packed.tile_tokens == 0
    )


def _groups(packed: QuantizedArray) -> mx.array:
    """Return which dims belong to which group of a token, float32 `[groups, D]`."""
    return mx.array(np.eye(packed.dim // packed.tile_dims, dtype=np.float32).repeat(packed.tile_dims, axis=1))


def _scales(packed: QuantizedArray, name: str) -> mx.array:
    """Return bias or scale of every token, `[B, H, groups, T]` float32."""
    part = getattr(packed, name).astype(mx.float32).swapaxes(-1, -2)
    return part if packed.tile_tokens == 1 else mx.repeat(part, packed.tile_tokens, axis=-1)

"""Attention of one token's queries over packed rows, by plain array operations: what decode attention means on a CPU.

Scales and biases are taken out of the products, so that codes are multiplied as they are; and the codes of a byte apart, so
that they need not be put in order. What is unpacked at a time is a piece that stays in a CPU's cache.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import mlx.core as mx
import numpy as np

from mlxkv.kernels._rotation import rotate, rotate_back
from mlxkv.kernels.bits import QuantizedArray, code_planes, reference_unpack

Rows = QuantizedArray | mx.array  # `[B, H, T, D]`, packed or of any float type

TILE_FLOATS = 2**20  # that are unpacked at a time
PRODUCT_ROWS = 4  # OpenBLAS multiplies 4 rows in 60% of the time of 3
# Running maxima start here, in the kernel's body too: finite, so that a fully masked row has weights 0 and not NaN.
LOWEST = -3.4e38


def attention_over(
    queries: mx.array,
    parts: Sequence[tuple[Rows, Rows]],
    bias: mx.array | None,
    sinks: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """Attend over keys and values in parts, with their token's key and value heads each.

    Parameters
    ----------
    queries
        `[B, H, G, D]` float32, times the factor of the scores: G query heads that share a key/value head.
    parts
        Keys `[B, H, Tp, D]` and values `[B, H, Tp, Dv]` of the same tokens, at least one token in all.
    bias
        Added to the scores, what broadcasts to `[B, H, G, T]`; None adds nothing.
    sinks
        `[H * G]`, a logit of each query head; None for none.

    Returns
    -------
    tuple[mx.array, mx.array]
        The output `[B, H, G, Dv]` float32, and what tokens get of all their heads' attention, `[B, H, T]` float32.
    """
    G = queries.shape[-2]
    filled = _filled(queries)
    turned = rotate(filled) if any(_is_rotated(k) for k, _ in parts) else filled
    parts = [pair for pair in parts if pair[0].shape[-2]]
    scores = [_in_turn(scores_of, turned if _is_rotated(k) else filled, k)[..., :G, :] for k, _ in parts]
    joined = scores[0] if len(scores) == 1 else mx.concatenate(scores, axis=-1)
    weights, total = exponentials(joined if bias is None else joined + bias, sinks)
    sums: dict[bool, mx.array] = {}
    start = 0
    for _, v in parts:
        stop, rotated = start + v.shape[-2], _is_rotated(v)
        part = _in_turn(weighted_sum, weights[..., start:stop], v)
        sums[rotated] = sums[rotated] + part if rotated in sums else part
        start = stop
    output = sums.get(False)
    if True in sums:
        back = rotate_back(sums[True])
        output = back if output is None else output + back
    shares = 1 / mx.where(total == 0, 1, total)
    assert output is not None
    return output * shares, (shares.swapaxes(-1, -2) @ weights)[..., 0, :]


def exponentials(scores: mx.array, sinks: mx.array | None) -> tuple[mx.array, mx.array]:
    """Return what a softmax divides, and by what: zeros where every score is -inf.

    Parameters
    ----------
    scores
        `[B, H, G, T]` float32.
    sinks
        Logits of the query heads, `[H * G]`, which count in maximum and sum; None for none.

    Returns
    -------
    tuple[mx.array, mx.array]
        Exponentials `[B, H, G, T]`, and their sums with those of the sinks, `[B, H, G, 1]`.
    """
    top = mx.maximum(scores.max(axis=-1, keepdims=True), LOWEST)
    if sinks is not None:
        logits = sinks.astype(mx.float32).reshape(*scores.shape[1:3], 1)
        top = mx.maximum(top, logits)
    weights = mx.power(math.e, scores - top)  # MLX's exp takes three times as long on an x86 CPU
    total = weights.sum(axis=-1, keepdims=True)
    return weights, total if sinks is None else total + mx.exp(logits - top)


def scores_of(x: mx.array, rows: Rows) -> mx.array:
    """Multiply queries by the transpose of rows.

    A row is scale * code + bias. Scales shared by all of a token or all of a dim are factored out of the sum, so that the
    large array is never scaled. Other tiles are unpacked.

    Parameters
    ----------
    x
        `[B, H, G, D]` float32, rotated if the rows are.
    rows
        `[B, H, T, D]`.

    Returns
    -------
    mx.array
        `[B, H, G, T]` float32.
    """
    if isinstance(rows, mx.array):
        return x @ rows.astype(mx.float32).swapaxes(-1, -2)
    *lead, G, D = x.shape
    T = rows.shape[-2]
    if _scaled_by_token(rows):
        scale, bias = _scales(rows, "scale"), _scales(rows, "bias")  # [B, H, groups, T]
        if rows.tile_dims == D:
            return _products(x, rows) * scale + x.sum(axis=-1, keepdims=True) * bias
        split = x[..., None, :] * _groups(D, rows.tile_dims)  # [B, H, G, groups, D], each row zero outside its group
        products = _products(split.reshape(*lead, -1, D), rows).reshape(*split.shape[:-1], T)
        return (products * scale[..., None, :, :]).sum(axis=-2) + split.sum(axis=-1) @ bias
    if _scaled_by_dim(rows):
        scale, bias = rows.scale.astype(mx.float32), rows.bias.astype(mx.float32)  # [B, H, tiles, D]
        scaled = x[..., None, :, :] * scale[..., None, :]  # [B, H, tiles, G, D]
        products = (bias @ x.swapaxes(-1, -2))[..., None, :]  # [B, H, tiles, 1, G]
        planes = code_planes(rows)
        for j, plane in enumerate(planes):
            codes = plane.reshape(*lead, -1, rows.tile_tokens, plane.shape[-1])
            products = mx.addmm(products, codes, scaled[..., j :: len(planes)].swapaxes(-1, -2))
        return products.reshape(*lead, T, G).swapaxes(-1, -2)
    return x @ _unpacked(rows).swapaxes(-1, -2)


def weighted_sum(weights: mx.array, rows: Rows) -> mx.array:
    """Sum rows with weights.

    Parameters
    ----------
    weights
        `[B, H, G, T]` float32.
    rows
        `[B, H, T, D]`.

    Returns
    -------
    mx.array
        `[B, H, G, D]` float32, rotated if the rows are.
    """
    if isinstance(rows, mx.array):
        return weights @ rows.astype(mx.float32)
    *lead, G, T = weights.shape
    D = rows.dim
    if _scaled_by_token(rows):
        scale, bias = _scales(rows, "scale"), _scales(rows, "bias")  # [B, H, groups, T]
        added = weights @ bias.swapaxes(-1, -2)  # [B, H, G, groups]
        if rows.tile_dims == D:
            return _sums(_filled(weights * scale), rows)[..., :G, :] + added
        groups = _groups(D, rows.tile_dims)
        split = (weights[..., None, :] * scale[..., None, :, :]).reshape(*lead, -1, T)  # [B, H, G * groups, T]
        sums = _sums(_filled(split), rows)[..., : split.shape[-2], :].reshape(*lead, G, -1, D)
        return (sums * groups).sum(axis=-2) + added @ groups
    if _scaled_by_dim(rows):
        scale, bias = rows.scale.astype(mx.float32), rows.bias.astype(mx.float32)
        split = weights.reshape(*lead, G, -1, rows.tile_tokens).swapaxes(-2, -3)  # [B, H, tiles, G, tokens]
        codes = [plane.reshape(*split.shape[:-2], rows.tile_tokens, -1) for plane in code_planes(rows)]
        sums = _interleaved([split @ part for part in codes])
        return (sums * scale[..., None, :] + split.sum(axis=-1, keepdims=True) * bias[..., None, :]).sum(axis=-3)
    return weights @ _unpacked(rows)


def _in_turn(product: Callable[[mx.array, Rows], mx.array], x: mx.array, rows: Rows) -> mx.array:
    """Compute a product piece by piece where rows are many: some heads at a time, or a part of the rows of each head."""
    *lead, T, D = rows.shape
    heads = math.prod(lead)
    if heads * T * D <= TILE_FLOATS:
        return product(x, rows)
    tile = 1 if isinstance(rows, mx.array) else rows.tile_tokens
    step, each = max(1, TILE_FLOATS // (D * tile)) * tile, max(1, TILE_FLOATS // (T * D))
    x = x.reshape(heads, *x.shape[-2:])
    done: list[mx.array] = []
    for head in range(0, heads, each):
        parts: list[mx.array] = []
        for start in range(0, T, step):
            piece = _piece(rows, (head, head + each), (start, min(start + step, T)), (done + parts)[-1:])
            queries = x[head : head + each]
            parts.append(product(queries if product is scores_of else queries[..., start : start + step], piece))
        done.append(mx.concatenate(parts, axis=-1) if product is scores_of else sum(parts[1:], parts[0]))
    return mx.concatenate(done).reshape(*lead, *done[0].shape[-2:])


def _piece(rows: Rows, heads: tuple[int, int], tokens: tuple[int, int], before: list[mx.array]) -> Rows:
    """Return some rows of some heads, `[heads, tokens, D]`; made after the piece before, or MLX would first unpack many."""

    def cut(x: mx.array, tile: int) -> mx.array:
        flat = x.reshape(-1, *x.shape[-2:])
        return flat[heads[0] : heads[1], tokens[0] // tile : -(-tokens[1] // tile)]

    def late(x: mx.array) -> mx.array:
        return mx.depends(x, before) if before else x

    if isinstance(rows, mx.array):
        return late(cut(rows, 1))
    bias, scale = (cut(part, rows.tile_tokens) for part in (rows.bias, rows.scale))
    return dataclasses.replace(rows, words=late(cut(rows.words, 1)), bias=bias, scale=scale)


def _products(x: mx.array, packed: QuantizedArray) -> mx.array:
    """Multiply `[..., G, D]` by the transpose of codes: `[..., G, T]`."""
    planes = code_planes(packed)
    products = x[..., :: len(planes)] @ planes[0].swapaxes(-1, -2)
    for j, plane in enumerate(planes[1:], 1):
        products = mx.addmm(products, x[..., j :: len(planes)], plane.swapaxes(-1, -2))
    return products


def _sums(weights: mx.array, packed: QuantizedArray) -> mx.array:
    """Multiply `[..., G, T]` by codes: `[..., G, D]`."""
    return _interleaved([weights @ plane for plane in code_planes(packed)])


def _interleaved(parts: list[mx.array]) -> mx.array:
    """Put the dims of planes in order."""
    if len(parts) == 1:
        return parts[0]
    return mx.stack(parts, axis=-1).reshape(*parts[0].shape[:-1], -1)


def _filled(x: mx.array) -> mx.array:
    """Add rows of zeros to `[..., G, n]` up to a number that is multiplied fast; a single row is."""
    G = x.shape[-2]
    if G == 1 or G % PRODUCT_ROWS == 0:
        return x
    return mx.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -G % PRODUCT_ROWS), (0, 0)])


def _unpacked(packed: QuantizedArray) -> mx.array:
    """Return the rows as they were packed, rotated or not, `[..., T, D]` float32."""
    return reference_unpack(dataclasses.replace(packed, rotated=False), mx.float32)


def _is_rotated(rows: Rows) -> bool:
    return isinstance(rows, QuantizedArray) and rows.rotated


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


@lru_cache
def _groups(dim: int, tile_dims: int) -> mx.array:
    """Return which dims belong to which group of a token, float32 `[groups, D]`."""
    return mx.array(np.eye(dim // tile_dims, dtype=np.float32).repeat(tile_dims, axis=1))


def _scales(packed: QuantizedArray, name: str) -> mx.array:
    """Return bias or scale of every token, `[B, H, groups, T]` float32."""
    part = getattr(packed, name).astype(mx.float32).swapaxes(-1, -2)
    return part if packed.tile_tokens == 1 else mx.repeat(part, packed.tile_tokens, axis=-1)

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
from mlxkv.kernels.bits import UNQUANTIZED, QuantizedArray, code_planes, reference_unpack

Rows = QuantizedArray | mx.array  # `[B, H, T, D]`, packed or of any float type

TILE_FLOATS = 2**20  # that are unpacked at a time
PRODUCT_ROWS = 4  # OpenBLAS multiplies 4 rows in 60% of the time of 3
# MLX's own product with quantized rows unpacks them again for each row of weights, into registers: faster for a few.
FEW_ROWS = {2: 4, 3: 4, 4: 8, 8: 8}
# Running maxima start here, in the kernel's body too: finite, so that a fully masked row has weights 0 and not NaN.
LOWEST = -3.4e38
_E = mx.array(math.e)


def attention_over(
    queries: mx.array,
    parts: Sequence[tuple[Rows, Rows]],
    bias: mx.array | None,
    sinks: mx.array | None,
) -> tuple[mx.array, mx.array, mx.array]:
    """Attend over keys and values in parts.

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
    tuple[mx.array, mx.array, mx.array]
        The output `[B, H, G, Dv]`, each token's weight `[B, H, G, T]`, and their sums `[B, H, G, 1]`, not 0, all float32.
    """
    filled = _filled(queries)
    turned: mx.array | None = None
    scores: list[mx.array] = []
    summed: list[Rows] = []
    bounds = [0]  # between parts
    for keys, values in parts:
        if not (length := _length(keys)):
            continue
        if _is_rotated(keys):
            turned = rotate(filled) if turned is None else turned
            scores.append(_in_turn(scores_of, turned, keys))
        else:
            scores.append(_in_turn(scores_of, filled, keys))
        summed.append(values)
        bounds.append(bounds[-1] + length)
    joined = scores[0] if len(scores) == 1 else mx.concatenate(scores, axis=-1)
    if filled is not queries:
        joined = joined[:, :, : queries.shape[2]]
    weights, total = exponentials(joined if bias is None else joined + bias, sinks, bias is not None)
    shares = [weights] if len(summed) == 1 else mx.split(weights, bounds[1:-1], axis=-1)
    plain: mx.array | None = None
    rotated: mx.array | None = None
    for share, values in zip(shares, summed):
        part = _in_turn(weighted_sum, share, values)
        if _is_rotated(values):
            rotated = part if rotated is None else rotated + part
        else:
            plain = part if plain is None else plain + part
    if rotated is not None:
        plain = rotate_back(rotated) if plain is None else plain + rotate_back(rotated)
    assert plain is not None
    return plain / total, weights, total


def exponentials(scores: mx.array, sinks: mx.array | None, masked: bool = True) -> tuple[mx.array, mx.array]:
    """Return what a softmax divides, and by what.

    Parameters
    ----------
    scores
        `[B, H, G, T]` float32.
    sinks
        Logits of the query heads, `[H * G]`, which count in maximum and sum; None for none.
    masked
        Whether every score of a query may be -inf, which gives zeros and a sum of 1.

    Returns
    -------
    tuple[mx.array, mx.array]
        Exponentials `[B, H, G, T]`, and their sums with those of the sinks, `[B, H, G, 1]`.
    """
    top = scores.max(axis=-1, keepdims=True)
    if masked or sinks is not None:
        top = mx.maximum(top, LOWEST)
    if sinks is not None:
        logits = sinks.astype(mx.float32).reshape(*scores.shape[1:3], 1)
        top = mx.maximum(top, logits)
    weights = mx.power(_E, scores - top)  # MLX's exp takes three times as long on an x86 CPU
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total += mx.exp(logits - top)
    return weights, mx.where(total == 0, 1, total) if masked or sinks is not None else total


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
    *lead, _, D = x.shape
    scaled_by = _scaled_by(rows.bits, D, rows.tile_tokens, rows.tile_dims, _length(rows))
    if scaled_by == "token":
        scale, bias = _scales(rows, "scale"), _scales(rows, "bias")  # [B, H, groups, T]
        if rows.tile_dims == D:
            return _products(x, rows) * scale + x.sum(axis=-1, keepdims=True) * bias
        split = mx.expand_dims(x, -2) * _groups(
            D, rows.tile_dims
        )  # [B, H, G, groups, D], each row zero outside its group
        products = _products(split.reshape(*lead, -1, D), rows).reshape(*split.shape[:-1], -1)
        return (products * mx.expand_dims(scale, -3)).sum(axis=-2) + split.sum(axis=-1) @ bias
    if scaled_by == "dim":
        turned = x.swapaxes(-1, -2)
        scaled = mx.expand_dims(turned, -3) * mx.expand_dims(rows.scale, -1)  # [B, H, tiles, D, G]
        products = mx.expand_dims(rows.bias @ turned, -2)  # [B, H, tiles, 1, G]
        planes = code_planes(rows)
        for j, plane in enumerate(planes):
            codes = mx.unflatten(plane, -2, (-1, rows.tile_tokens))
            own = scaled[..., j :: len(planes), :] if len(planes) > 1 else scaled
            products = mx.addmm(products, codes, own)
        return mx.flatten(products, -3, -2).swapaxes(-1, -2)
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
    scaled_by = _scaled_by(rows.bits, D, rows.tile_tokens, rows.tile_dims, T)
    if scaled_by == "token":
        if _summed_by_mlx(rows, G):
            scale, bias = (_repeated(x.astype(mx.float32), rows.tile_tokens, -2) for x in (rows.scale, rows.bias))
            return mx.quantized_matmul(
                weights, rows.words, scale, bias, transpose=False, group_size=rows.tile_dims, bits=rows.bits
            )
        scale, bias = _scales(rows, "scale"), _scales(rows, "bias")  # [B, H, groups, T]
        added = weights @ bias.swapaxes(-1, -2)  # [B, H, G, groups]
        if rows.tile_dims == D:
            sums = _sums(_filled(weights * scale), rows)
            return (sums[..., :G, :] if sums.shape[-2] > G else sums) + added
        groups = _groups(D, rows.tile_dims)
        split = (mx.expand_dims(weights, -2) * mx.expand_dims(scale, -3)).reshape(*lead, -1, T)  # [B, H, G * groups, T]
        sums = _sums(_filled(split), rows)[..., : split.shape[-2], :].reshape(*lead, G, -1, D)
        return (sums * groups).sum(axis=-2) + added @ groups
    if scaled_by == "dim":
        split = weights.reshape(*lead, G, -1, rows.tile_tokens).swapaxes(-2, -3)  # [B, H, tiles, G, tokens]
        codes = [plane.reshape(*split.shape[:-2], rows.tile_tokens, -1) for plane in code_planes(rows)]
        sums = _interleaved([split @ part for part in codes]) * mx.expand_dims(rows.scale, -2)
        return (sums + split.sum(axis=-1, keepdims=True) * mx.expand_dims(rows.bias, -2)).sum(axis=-3)
    return weights @ _unpacked(rows)


def _in_turn(product: Callable[[mx.array, Rows], mx.array], x: mx.array, rows: Rows) -> mx.array:
    """Compute a product piece by piece where rows are many: some heads at a time, or a part of the rows of each head."""
    if (rows.size if isinstance(rows, mx.array) else rows.words.size * (32 // rows.bits)) <= TILE_FLOATS:
        return product(x, rows)
    if product is weighted_sum and _summed_by_mlx(rows, x.shape[-2]):
        return product(x, rows)  # which unpacks nothing in memory
    *lead, T, D = rows.shape
    heads = math.prod(lead)
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
    products = (x[..., :: len(planes)] if len(planes) > 1 else x) @ planes[0].swapaxes(-1, -2)
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


def _length(rows: Rows) -> int:
    return rows.shape[-2] if isinstance(rows, mx.array) else rows.words.shape[-2]


def _scaled_by(bits: int, dim: int, tile_tokens: int, tile_dims: int, length: int) -> str | None:
    """Return what shares a scale, "token" or "dim", where tiles are such that it can be taken out of a product."""
    if bits >= UNQUANTIZED or not length or length % tile_tokens:
        return None
    if tile_dims == 1:
        return "dim"
    return "token" if tile_tokens <= tile_dims and dim % tile_dims == 0 else None


def _summed_by_mlx(rows: Rows, count: int) -> bool:
    """Return whether MLX's own product sums rows with this many rows of weights, in less time."""
    if isinstance(rows, mx.array) or rows.tile_dims not in (32, 64, 128) or count > FEW_ROWS.get(rows.bits, 0):
        return False
    return _scaled_by(rows.bits, rows.dim, rows.tile_tokens, rows.tile_dims, _length(rows)) == "token"


@lru_cache
def _groups(dim: int, tile_dims: int) -> mx.array:
    """Return which dims belong to which group of a token, float32 `[groups, D]`."""
    return mx.array(np.eye(dim // tile_dims, dtype=np.float32).repeat(tile_dims, axis=1))


def _scales(packed: QuantizedArray, name: str) -> mx.array:
    """Return bias or scale of every token, `[B, H, groups, T]` float32."""
    part: mx.array = getattr(packed, name).astype(mx.float32).swapaxes(-1, -2)
    return _repeated(part, packed.tile_tokens, -1)


def _repeated(x: mx.array, times: int, axis: int) -> mx.array:
    return x if times == 1 else mx.repeat(x, times, axis=axis)

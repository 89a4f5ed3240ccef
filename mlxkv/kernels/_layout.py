"""Array layouts of the reference in bits.py: tiles of tokens x dims, and codes packed into 32-bit words."""

from __future__ import annotations

import mlx.core as mx


def to_tiles(x: mx.array, tile_tokens: int, tile_dims: int) -> mx.array:
    """Cut an array into tiles.

    Parameters
    ----------
    x
        `[..., T, D]`.
    tile_tokens
        Tokens of a tile, at least 1.
    tile_dims
        Dims of a tile, at least 1.

    Returns
    -------
    mx.array
        `[..., ceil(T / tile_tokens), tile_tokens, ceil(D / tile_dims), tile_dims]`; the last row and the last column
        are repeated to fill the last tiles, which moves no minimum and no maximum.
    """
    *lead, length, dim = x.shape
    more = (-length % tile_tokens, -dim % tile_dims)
    if any(more):
        x = mx.pad(x, [(0, 0)] * len(lead) + [(0, n) for n in more], mode="edge")
    return x.reshape(*lead, (length + more[0]) // tile_tokens, tile_tokens, (dim + more[1]) // tile_dims, tile_dims)


def from_tiles(tiles: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Undo `to_tiles`.

    Parameters
    ----------
    tiles
        As `to_tiles` returns them.
    shape
        The array's, `[..., T, D]`.

    Returns
    -------
    mx.array
        `[..., T, D]`.
    """
    *lead, rows, tile_tokens, columns, tile_dims = tiles.shape
    return tiles.reshape(*lead, rows * tile_tokens, columns * tile_dims)[..., : shape[-2], : shape[-1]]


def codes_to_words(codes: mx.array, bits: int) -> mx.array:
    """Pack codes into little-endian 32-bit words. Eight codes fill `bits` bytes, so a uint64 holds any eight.

    Parameters
    ----------
    codes
        `[..., D]`, whole numbers below 2**bits.
    bits
        Bits of a code, 1 to 8.

    Returns
    -------
    mx.array
        uint32 `[..., ceil(D * bits / 32)]`, zeros at the end.
    """
    *lead, dim = codes.shape
    eights = -(-dim // 32) * 4
    padded = mx.pad(codes.astype(mx.uint64), [(0, 0)] * len(lead) + [(0, eights * 8 - dim)])
    joined = (padded.reshape(*lead, eights, 8) << _places(bits)).sum(axis=-1, keepdims=True)
    words = joined.view(mx.uint8)[..., :bits].reshape(*lead, eights * bits).view(mx.uint32)
    return words[..., : -(-dim * bits // 32)]


def words_to_codes(words: mx.array, bits: int, dim: int) -> mx.array:
    """Undo `codes_to_words`: adjacent codes are moved apart by halves until each has a byte of its own.

    Parameters
    ----------
    words
        uint32 `[..., ceil(dim * bits / 32)]`.
    bits
        Bits of a code: 2, 3, 4 or 8.
    dim
        D, the number of codes.

    Returns
    -------
    mx.array
        uint8 `[..., D]`.
    """
    *lead, count = words.shape
    data = words.view(mx.uint8)
    if 8 % bits == 0:
        together, total = 8 // bits, count * 32 // bits
        wide = data.astype({1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[together])
    else:
        together, total = 8, -(-dim // 8) * 8
        size = total // 8 * bits
        data = mx.pad(data, [(0, 0)] * len(lead) + [(0, max(0, size - 4 * count))])[..., :size]
        eights = data.reshape(*lead, total // 8, bits)
        wide = mx.pad(eights, [(0, 0)] * (len(lead) + 1) + [(0, 8 - bits)]).view(mx.uint64)
    half = together // 2
    while half:
        mask = sum((2 ** (half * bits) - 1) << place for place in range(0, 8 * together, 8 * half))
        wide = (wide | (wide << (half * (8 - bits)))) & mask
        half //= 2
    return wide.view(mx.uint8).reshape(*lead, total)[..., :dim]


def _places(bits: int) -> mx.array:
    return mx.arange(0, 8 * bits, bits, dtype=mx.uint64)

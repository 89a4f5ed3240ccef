"""What methods share that pack old tokens and keep the newest as they are."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import Any

import mlx.core as mx

from mlxkv.cache import CacheSpec
from mlxkv.kernels.bits import Packed, pack, unpack
from mlxkv.kernels.decode_attention import Bucket, piece
from mlxkv.live import LayerCache, narrowed, own, raw

BLOCK = 64  # tokens packed at a time: few enough to stay small, many enough that copying `packed` is rare


class PackingCache(LayerCache):
    """Old tokens packed, and a tail of the newest, at least `residual` and fewer than `residual + BLOCK` tokens.

    Blocks of BLOCK tokens leave the tail together, so what is stored depends on the tokens and not on their chunks.
    After `trim` the tokens of a block that is cut stay, at the values they had, in the tail. A method adds `pack`.
    """

    HELD = ("packed", "tail")
    residual = 0

    def __init__(self, settings: Any, spec: CacheSpec, layer: int) -> None:
        super().__init__(settings, spec, layer)
        self.packed: Bucket | None = None
        self.tail: tuple[mx.array, mx.array] | None = None

    @abstractmethod
    def pack(self, keys: mx.array, values: mx.array) -> Bucket:
        """Keys and values `[B, Hkv, n * BLOCK, D]`, packed in tiles that divide BLOCK."""

    def buckets(self) -> list[Bucket]:
        packed = [] if self.packed is None else [self.packed]
        return packed if self.tail is None else [*packed, (raw(self.tail[0]), raw(self.tail[1]))]

    def absorb(self, keys: mx.array, values: mx.array, mass: mx.array | None) -> None:
        keys, values = narrowed(keys), narrowed(values)
        old = (keys[..., :0, :], values[..., :0, :]) if self.tail is None else self.tail
        keys, values = mx.concatenate([old[0], keys], axis=-2), mx.concatenate([old[1], values], axis=-2)
        count = max(0, keys.shape[-2] - self.residual) // BLOCK * BLOCK
        if count:
            block = self.pack(keys[..., :count, :], values[..., :count, :])
            if self.packed is not None:
                block = joined(self.packed[0], block[0]), joined(self.packed[1], block[1])
            self.packed = block
            keys, values = own(keys[..., count:, :]), own(values[..., count:, :])
        self.tail = keys, values

    def cut(self, count: int) -> None:
        left = self.kept - count
        start = 0 if self.packed is None else self.packed[0].shape[-2]
        if self.packed is not None and left < start:
            keys, values = self.packed
            start = left // BLOCK * BLOCK
            self.tail = (
                unpack(part(keys, start, left), keys.dtype),
                unpack(part(values, start, left), values.dtype),
            )
            self.packed = part(keys, 0, start), part(values, 0, start)
        elif self.tail is not None:
            self.tail = own(self.tail[0][..., : left - start, :]), own(self.tail[1][..., : left - start, :])


def joined(first: Packed, second: Packed) -> Packed:
    """Packed rows `[..., T1, D]` and `[..., T2, D]` of one kind as `[..., T1 + T2, D]`; the first's tiles are whole."""
    words, shift, scale = (
        mx.concatenate([getattr(first, name), getattr(second, name)], axis=-2) for name in ("words", "shift", "scale")
    )
    return dataclasses.replace(first, words=words, shift=shift, scale=scale)


def part(packed: Packed, start: int, stop: int) -> Packed:
    """A copy of rows start..stop, start at the beginning of a tile."""
    rows = piece(packed, start, stop)
    return dataclasses.replace(rows, words=own(rows.words), shift=own(rows.shift), scale=own(rows.scale))


def per_token(x: mx.array, bits: int) -> Packed:
    """x `[..., T, D]` packed by token, in groups of 64 dims or, where 64 does not divide D, all D together."""
    dim = x.shape[-1]
    return pack(x, bits, 1, 64 if dim % 64 == 0 else dim)

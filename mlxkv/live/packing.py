"""What methods share that pack old tokens and keep the newest as they are."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod

import mlx.core as mx

from mlxkv.config import Config
from mlxkv.kernels.bits import QuantizedArray, pack, unpack
from mlxkv.kernels.decode_attention import Bucket, slice_rows
from mlxkv.live.base import LayerCache, copy_without_parent, to_storage_dtype, unquantized
from mlxkv.spec import CacheSpec

BLOCK = 64  # tokens packed at a time: few enough to stay small, many enough that copying `packed` is rare


class PackingCache(LayerCache):
    """Old tokens packed, and a tail of the newest, at least `recent` and fewer than `recent + BLOCK` tokens.

    Blocks of BLOCK tokens leave the tail together, so what is stored depends on the tokens and not on their chunks.
    After `trim` the tokens of a block that is cut stay, at the values they had, in the tail. A method adds `pack`.
    """

    state_fields = ("packed", "tail")
    recent = 0

    def __init__(self, config: Config, spec: CacheSpec, layer: int) -> None:
        super().__init__(config, spec, layer)
        self.packed: Bucket | None = None
        self.tail: tuple[mx.array, mx.array] | None = None

    @abstractmethod
    def pack(self, keys: mx.array, values: mx.array) -> Bucket:
        """Keys and values `[B, Hkv, n * BLOCK, D]`, packed in tiles that divide BLOCK."""

    def buckets(self) -> list[Bucket]:
        packed = [] if self.packed is None else [self.packed]
        return packed if self.tail is None else [*packed, (unquantized(self.tail[0]), unquantized(self.tail[1]))]

    def absorb(self, keys: mx.array, values: mx.array, mass: mx.array | None) -> None:
        keys, values = to_storage_dtype(keys), to_storage_dtype(values)
        old = (keys[..., :0, :], values[..., :0, :]) if self.tail is None else self.tail
        keys, values = mx.concatenate([old[0], keys], axis=-2), mx.concatenate([old[1], values], axis=-2)
        count = max(0, keys.shape[-2] - self.recent) // BLOCK * BLOCK
        if count:
            block = self.pack(keys[..., :count, :], values[..., :count, :])
            if self.packed is not None:
                block = concat_tokens(self.packed[0], block[0]), concat_tokens(self.packed[1], block[1])
            self.packed = block
            keys, values = copy_without_parent(keys[..., count:, :]), copy_without_parent(values[..., count:, :])
        self.tail = keys, values

    def _trim(self, count: int) -> None:
        left = self.kept - count
        start = 0 if self.packed is None else self.packed[0].shape[-2]
        if self.packed is not None and left < start:
            keys, values = self.packed
            start = left // BLOCK * BLOCK
            self.tail = (
                unpack(copy_rows(keys, start, left), keys.dtype),
                unpack(copy_rows(values, start, left), values.dtype),
            )
            self.packed = copy_rows(keys, 0, start), copy_rows(values, 0, start)
        elif self.tail is not None:
            self.tail = (
                copy_without_parent(self.tail[0][..., : left - start, :]),
                copy_without_parent(self.tail[1][..., : left - start, :]),
            )


def concat_tokens(first: QuantizedArray, second: QuantizedArray) -> QuantizedArray:
    """Packed rows `[..., T1, D]` and `[..., T2, D]` of one kind as `[..., T1 + T2, D]`; the first's tiles are whole."""
    words, bias, scale = (
        mx.concatenate([getattr(first, name), getattr(second, name)], axis=-2) for name in ("words", "bias", "scale")
    )
    return dataclasses.replace(first, words=words, bias=bias, scale=scale)


def copy_rows(packed: QuantizedArray, start: int, stop: int) -> QuantizedArray:
    """A copy of rows start..stop, start at the beginning of a tile."""
    rows = slice_rows(packed, start, stop)
    return dataclasses.replace(
        rows,
        words=copy_without_parent(rows.words),
        bias=copy_without_parent(rows.bias),
        scale=copy_without_parent(rows.scale),
    )


def quantize_per_token(x: mx.array, bits: int) -> QuantizedArray:
    """x `[..., T, D]` packed by token, in groups of 64 dims or, where 64 does not divide D, all D together."""
    dim = x.shape[-1]
    return pack(x, bits, 1, 64 if dim % 64 == 0 else dim)

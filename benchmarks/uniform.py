"""Uniform quantization at any number of bits, as the presets int8 and int4 do it: the curve that others must beat.

Written as a live method is, so that the benchmarks make its caches like any other's.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlxkv.kernels.decode_attention import Bucket
from mlxkv.live.packing import PackingCache, quantize_per_token

METHOD = "uniform"


@dataclass(frozen=True)
class Settings:
    """bits: of every value, 2, 3, 4 or 8, or 16 for float16."""

    bits: int


class Cache(PackingCache):
    """int4 and int8 with another number of bits."""

    settings: Settings

    def pack(self, keys: mx.array, values: mx.array) -> Bucket:
        return quantize_per_token(keys, self.settings.bits), quantize_per_token(values, self.settings.bits)

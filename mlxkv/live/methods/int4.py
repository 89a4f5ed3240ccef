"""4 bits a value: each token's dims in groups of 64 (or the whole head), from their minimum to their maximum."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlxkv.config import Config
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.live.base import live_methods
from mlxkv.live.packing import PackingCache, quantize_per_token


@dataclass(frozen=True, kw_only=True)
class Int4Config(Config):
    """Nothing to set."""


@live_methods.register("int4")
class Int4Cache(PackingCache):
    """Uniform: all tokens alike, but for the newest, which wait unpacked until there are 64 of them."""

    config_class = Int4Config
    config: Int4Config

    def pack(self, keys: mx.array, values: mx.array) -> Bucket:
        return quantize_per_token(keys, 4), quantize_per_token(values, 4)

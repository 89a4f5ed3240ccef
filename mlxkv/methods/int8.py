"""8 bits a value: each token's dims in groups of 64 (or the whole head), from their minimum to their maximum."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlxkv.kernels.decode_attention import Bucket
from mlxkv.methods._packing import PackingCache, per_token

METHOD = "int8"


@dataclass(frozen=True)
class Settings:
    """Nothing to set."""


class Cache(PackingCache):
    """Uniform: all tokens alike, but for the newest, which wait unpacked until there are 64 of them."""

    def pack(self, keys: mx.array, values: mx.array) -> Bucket:
        return per_token(keys, 8), per_token(values, 8)

"""KIVI: keys in few bits by channel, values in few bits by token, the newest tokens as they are.

https://arxiv.org/abs/2402.02750
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlxkv.cache import CacheSpec, is_whole
from mlxkv.errors import InputError
from mlxkv.kernels.bits import CODE_BITS, pack
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.methods._packing import BLOCK, PackingCache

METHOD = "kivi"


@dataclass(frozen=True)
class Settings:
    """bits: of each code. group: tokens of a key channel, and dims of a value token, that share a scale.
    residual: newest tokens that stay as they are, at least. Raises InputError for impossible ones."""

    bits: int = 2
    group: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        if self.bits not in CODE_BITS or type(self.bits) is not int:
            raise InputError(f"bits must be one of {CODE_BITS}, not {self.bits!r}")
        if not is_whole(self.group, least=1) or BLOCK % self.group:
            raise InputError(f"group must divide {BLOCK}, not be {self.group!r}")
        if not is_whole(self.residual):
            raise InputError(f"residual must be 0 or more, not {self.residual!r}")


class Cache(PackingCache):
    """Departs from the paper where the residual goes: keys and values leave it together, 64 tokens at a time, so it
    holds `residual` to `residual + 63` tokens (there: keys up to `residual`, values exactly so many). For MLA the
    latent, which is both key and value, is packed by channel, and k_pe by token."""

    settings: Settings

    def __init__(self, settings: Settings, spec: CacheSpec, layer: int) -> None:
        super().__init__(settings, spec, layer)
        self.residual = settings.residual

    def pack(self, keys: mx.array, values: mx.array) -> Bucket:
        bits, group = self.settings.bits, self.settings.group
        return pack(keys, bits, group, 1), pack(values, bits, 1, min(group, values.shape[-1]))

"""KIVI: keys quantized by channel, values by token, the newest tokens unquantized."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlxkv.config import Config, choice, integer
from mlxkv.kernels.bits import CODE_BITS, pack
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.live.base import live_methods
from mlxkv.live.packing import BLOCK, PackingCache
from mlxkv.spec import CacheSpec


@dataclass(frozen=True, kw_only=True)
class KIVIConfig(Config):
    """Settings of KIVI.

    Parameters
    ----------
    bits
        Bits of each quantized value: 2, 3, 4 or 8.
    group
        Tokens of a key channel, and dims of a value token, that share a minimum and a step; divides 64.
    recent
        Newest tokens that stay unquantized, at least.
    """

    bits: int = choice(2, CODE_BITS)
    group: int = choice(32, [size for size in range(1, BLOCK + 1) if BLOCK % size == 0])
    recent: int = integer(128, key="residual")


@live_methods.register("kivi")
class KIVICache(PackingCache):
    """KIVI: keys in few bits by channel, values in few bits by token, the newest tokens unquantized.

    A few channels of the keys have large values in all tokens, so keys are quantized by channel: each group of tokens
    of a channel has its own minimum and step. Values have no such channels and are quantized by token.

    Parameters
    ----------
    config
        Settings.
    spec
        Description of the model's cache.
    layer
        The layer's index in the model.

    Notes
    -----
    https://arxiv.org/abs/2402.02750. Departs from the paper in which tokens are unquantized: keys and values leave
    together, 64 tokens at a time, so there are `recent` to `recent + 63` of them (there: keys up to `recent`, values
    exactly as many). For MLA the latent, which is both key and value, is quantized by channel, and k_pe by token.
    """

    config_class = KIVIConfig
    config: KIVIConfig

    def __init__(self, config: KIVIConfig, spec: CacheSpec, layer: int) -> None:
        super().__init__(config, spec, layer)
        self.recent = config.recent

    def pack(self, keys: mx.array, values: mx.array) -> Bucket:
        """Quantize keys by channel and values by token."""
        bits, group = self.config.bits, self.config.group
        return pack(keys, bits, group, 1), pack(values, bits, 1, min(group, values.shape[-1]))

"""KIVI: keys quantized by channel, values by token, and the newest tokens unquantized."""

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
        Bits per quantized value: 2, 3, 4 or 8.
    group
        Group size: number of tokens in a key channel, and of dims in a token's value, that share a minimum and a step;
        divides 64.
    recent
        Minimal number of newest tokens that stay unquantized.
    sinks
        Number of first tokens that stay unquantized.
    rotate
        Whether values are quantized rotated; not in the paper.
    rotate_keys
        Whether keys are, too. With 2 bits it lowered the divergence much on SmolLM2 and raised it much on Gemma 3.
    """

    bits: int = choice(2, CODE_BITS)
    group: int = choice(32, [size for size in range(1, BLOCK + 1) if BLOCK % size == 0])
    recent: int = integer(124, key="residual")
    sinks: int = integer(4, absent=0)
    rotate: bool = choice(True, (True, False), absent=False)
    rotate_keys: bool = choice(False, (True, False))


@live_methods.register("kivi")
class KIVICache(PackingCache):
    """KIVI: quantize keys by channel and values by token, and leave sinks and the newest tokens unquantized.

    A few channels (dims) of the keys have large values in all tokens. So keys are quantized by channel: each group of
    consecutive tokens in a channel has its own minimum and step. Values have no such channels. They are quantized by
    token: each group of dims in a token has its own minimum and step.

    By default values are rotated before, by a fixed rotation that makes their dims alike.

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
    Paper: "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", https://arxiv.org/abs/2402.02750. It neither
    rotates nor keeps sinks: `rotate=False, sinks=0, recent=128`. Still it differs in which tokens stay unquantized. Here
    keys and values are quantized together, 64 tokens at a time, so `recent` to `recent + 63` tokens stay unquantized; in
    the paper up to `recent` keys and exactly `recent` values do. With multi-head latent attention, which the paper does
    not treat, the latent (both key and value) is quantized by channel, and k_pe by token, as it is.
    """

    config_class = KIVIConfig
    config: KIVIConfig

    def __init__(self, config: KIVIConfig, spec: CacheSpec, layer: int) -> None:
        super().__init__(config, spec, layer)
        self.recent, self.sinks = config.recent, config.sinks

    def pack(self, keys: mx.array, values: mx.array) -> Bucket:
        """Quantize keys by channel and values by token."""
        bits, group, rotated = self.config.bits, self.config.group, self.config.rotate
        packed = pack(keys, bits, group, 1, self.config.rotate_keys)
        # With multi-head latent attention k_pe is unpacked for every token, so that rotating it back would cost most there.
        return packed, pack(values, bits, 1, min(group, values.shape[-1]), rotated and not self.latent)

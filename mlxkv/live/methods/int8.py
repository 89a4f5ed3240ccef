"""Uniform quantization to 8 bits."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlxkv.config import Config, choice
from mlxkv.kernels.bits import pack
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.live.base import live_methods
from mlxkv.live.packing import PackingCache, quantize_per_token


@dataclass(frozen=True, kw_only=True)
class Int8Config(Config):
    """Settings of int8.

    Parameters
    ----------
    keys_by_channel
        Whether keys are quantized by channel.
    """

    keys_by_channel: bool = choice(True, (True, False), absent=False)


@live_methods.register("int8")
class Int8Cache(PackingCache):
    """int8: 8 bits per value. The newest tokens wait unquantized until there are 64 of them.

    Some channels (dims) of keys are large in all tokens, so each channel of keys is quantized by itself, over the 64 tokens
    of a block. The dims of each token's value are quantized in groups of 64 (or all dims in one group where 64 does not
    divide them). Both are as large as groups of 64 dims of keys would be. Steps are equal, from a group's minimum to its
    maximum; `mlxkv.kernels.bits.bias_and_scale` computes minimum and step.

    Without `keys_by_channel`, keys are quantized token by token, as values are.

    Parameters
    ----------
    config
        Settings.
    spec
        Description of the model's cache.
    layer
        The layer's index in the model.
    """

    config_class = Int8Config
    config: Int8Config

    def pack(self, keys: mx.array, values: mx.array) -> Bucket:
        """Quantize keys by channel, or token by token as values are."""
        packed = pack(keys, 8, self.block, 1) if self.config.keys_by_channel else quantize_per_token(keys, 8)
        return packed, quantize_per_token(values, 8)

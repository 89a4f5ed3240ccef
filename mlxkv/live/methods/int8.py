"""Uniform quantization to 8 bits."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlxkv.config import Config
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.live.base import live_methods
from mlxkv.live.packing import PackingCache, quantize_per_token


@dataclass(frozen=True, kw_only=True)
class Int8Config(Config):
    """Settings of int8: none."""


@live_methods.register("int8")
class Int8Cache(PackingCache):
    """int8: 8 bits per value. The newest tokens wait unquantized until there are 64 of them.

    The dims of each token are quantized in groups of 64 (or all dims in one group where 64 does not divide them), in
    equal steps from the group's minimum to its maximum. `mlxkv.kernels.bits.bias_and_scale` computes minimum and step.

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
        """Quantize keys and values token by token."""
        return quantize_per_token(keys, 8), quantize_per_token(values, 8)

"""Uniform quantization to 4 bits."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlxkv.config import Config
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.live.base import live_methods
from mlxkv.live.packing import PackingCache, quantize_per_token


@dataclass(frozen=True, kw_only=True)
class Int4Config(Config):
    """Settings of int4: none."""


@live_methods.register("int4")
class Int4Cache(PackingCache):
    """int4: 4 bits per value. The newest tokens wait unquantized until there are 64 of them.

    The dims of each token are quantized in groups of 64 (or all dims in one group where 64 does not divide them), in
    equal steps from the group's minimum to its maximum. `mlxkv.kernels.bits.bias_and_scale` computes minimum and step.
    The int4 of `mlxkv.kernels.groups` is another format, that of the KVTC codec.

    Parameters
    ----------
    config
        Settings.
    spec
        Description of the model's cache.
    layer
        The layer's index in the model.
    """

    config_class = Int4Config
    config: Int4Config

    def pack(self, keys: mx.array, values: mx.array) -> Bucket:
        """Quantize keys and values token by token."""
        return quantize_per_token(keys, 4), quantize_per_token(values, 4)

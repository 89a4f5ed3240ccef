"""Uniform quantization to 4 bits, of rotated tokens."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlxkv.config import Config, choice, integer
from mlxkv.kernels.bits import pack
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.live.base import live_methods
from mlxkv.live.packing import PackingCache, quantize_per_token
from mlxkv.spec import CacheSpec

ROTATED_BLOCK = 60  # with the 4 sinks 64: after 64 and after 1,024 tokens none is waiting


@dataclass(frozen=True, kw_only=True)
class Int4Config(Config):
    """Settings of int4.

    Parameters
    ----------
    sinks
        Number of first tokens that stay unquantized.
    rotate
        Whether tokens are quantized rotated.
    """

    sinks: int = integer(4, absent=0)
    rotate: bool = choice(True, (True, False), absent=False)


@live_methods.register("int4")
class Int4Cache(PackingCache):
    """int4: 4 bits per value, of rotated tokens. Sinks and the newest tokens stay unquantized.

    Keys have channels (dims) whose values are large in all tokens, and in some models a large constant mean. A fixed
    rotation spreads them over all dims (`mlxkv.kernels.bits.pack`). Attention rotates the query in place of the keys, and
    the output back in place of the values, so nothing else changes. Rotated keys are quantized by channel, 60 tokens at a
    time, which leaves out what these tokens have in common; most of the error came from keys. Rotated values are quantized
    by token. All steps are equal, from a group's minimum to its maximum. The newest tokens wait unquantized until there
    are 60 of them.

    Without `rotate`, the dims of each token's key and value are quantized in groups of 64 (or all dims in one group where
    64 does not divide them). The int4 of `mlxkv.kernels.groups` is another format, that of the KVTC codec.

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

    def __init__(self, config: Int4Config, spec: CacheSpec, layer: int) -> None:
        super().__init__(config, spec, layer)
        self.sinks = config.sinks
        if config.rotate:
            self.block = ROTATED_BLOCK

    def pack(self, keys: mx.array, values: mx.array) -> Bucket:
        """Quantize rotated keys by channel and rotated values by token, or both by token as they are."""
        if not self.config.rotate:
            return quantize_per_token(keys, 4), quantize_per_token(values, 4)
        packed = pack(keys, 4, self.block, 1, rotated=True)
        if self.latent:  # k_pe is unpacked for every token, so that rotating it back would cost most there
            return packed, quantize_per_token(values, 4)
        dim = values.shape[-1]
        # A rotated value's dims are alike: groups of 128 or more have half as many scales, which pay for the sinks.
        tile = (1, 128) if dim % 128 == 0 else (2, 64 if dim % 64 == 0 else dim)
        return packed, pack(values, 4, *tile, rotated=True)

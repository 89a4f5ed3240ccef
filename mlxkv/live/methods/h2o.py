"""H2O: the heavy hitters, tokens that have drawn most attention so far, and a window of the last tokens.

https://arxiv.org/abs/2306.14048
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import mlx.core as mx

from mlxkv.config import Config, integer
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.live.base import LayerCache, copy_without_parent, live_methods, to_storage_dtype, unquantized
from mlxkv.spec import CacheSpec


@dataclass(frozen=True, kw_only=True)
class H2OConfig(Config):
    """Settings of H2O.

    Parameters
    ----------
    heavy
        Tokens that each kv head keeps because they drew most attention.
    recent
        Newest tokens that stay besides.
    """

    heavy: int = integer(256, least=1)
    recent: int = integer(256)


@live_methods.register("h2o")
class H2OCache(LayerCache):
    """Each kv head keeps tokens of its own, in the order they came. `tokens` are keys, values and `[B, Hkv, kept]`
    float32: the attention that each has drawn from all queries since it came, its own included.

    Departs from the paper in grouped queries, whose attention is summed for their kv head, and in prefill, where tokens
    are given up once a chunk and not once a token. As there, tokens keep their own positions, first tokens are nothing
    special, and attention never fades. After `trim` what the trimmed tokens' queries paid attention to stays counted.
    """

    config_class = H2OConfig
    config: H2OConfig

    state_fields = ("tokens",)
    observation_window = sys.maxsize

    def __init__(self, config: H2OConfig, spec: CacheSpec, layer: int) -> None:
        super().__init__(config, spec, layer)
        self.tokens: tuple[mx.array, mx.array, mx.array] | None = None

    def buckets(self) -> list[Bucket]:
        return [] if self.tokens is None else [(unquantized(self.tokens[0]), unquantized(self.tokens[1]))]

    def absorb(self, keys: mx.array, values: mx.array, mass: mx.array | None) -> None:
        assert mass is not None  # observation_window asks for it
        keys, values, drawn = to_storage_dtype(keys), to_storage_dtype(values), mx.zeros(keys.shape[:3])
        if self.tokens is not None:
            keys, values, drawn = (mx.concatenate([*pair], axis=2) for pair in zip(self.tokens, (keys, values, drawn)))
        self.tokens = keys, values, drawn + mass
        if keys.shape[2] > self.config.heavy + self.config.recent:
            self.tokens = self._evict(*self.tokens)

    def _evict(self, keys: mx.array, values: mx.array, drawn: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """The recent tokens and, of those before them, each head's heaviest."""
        B, H, T = drawn.shape
        last = T - self.config.recent
        heavy = mx.argpartition(-drawn[..., :last], self.config.heavy - 1, axis=-1)[..., : self.config.heavy]
        recent = mx.broadcast_to(mx.arange(last, T, dtype=heavy.dtype), (B, H, T - last))
        kept = mx.concatenate([mx.sort(heavy, axis=-1), recent], axis=-1)
        rows = mx.arange(B)[:, None, None], mx.arange(H)[:, None], kept
        return keys[rows], values[rows], drawn[rows]

    def _trim(self, count: int) -> None:
        if self.tokens is not None:
            keys, values, drawn = (copy_without_parent(part[:, :, :-count]) for part in self.tokens)
            self.tokens = keys, values, drawn

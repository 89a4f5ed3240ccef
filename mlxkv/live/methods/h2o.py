"""H2O: the tokens that got most attention so far, and the newest."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import mlx.core as mx

from mlxkv.config import Config, integer
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.live.arrays import KeysValues, concat_pairs, copy_without_parent, to_storage_dtype
from mlxkv.live.base import LayerCache, live_methods
from mlxkv.spec import CacheSpec


@dataclass(frozen=True, kw_only=True)
class H2OConfig(Config):
    """Settings of H2O.

    Parameters
    ----------
    heavy
        Tokens that each kv head keeps because they got most attention.
    recent
        Newest tokens that stay besides.
    """

    heavy: int = integer(256, least=1)
    recent: int = integer(256)


class AttendedTokens(NamedTuple):
    """Tokens and the attention that each has got.

    Parameters
    ----------
    keys, values
        `[B, Hkv, T, D]` and `[B, Hkv, T, Dv]`.
    attention
        `[B, Hkv, T]` float32: attention probabilities, summed over all queries since a token came, its own included.
    """

    keys: mx.array
    values: mx.array
    attention: mx.array


@live_methods.register("h2o")
class H2OCache(LayerCache):
    """H2O: each kv head keeps its heavy hitters, the tokens that got most attention, and the newest tokens.

    Parameters
    ----------
    config
        Settings.
    spec
        Description of the model's cache.
    layer
        The layer's index in the model.

    Attributes
    ----------
    tokens
        The tokens kept, in the order they came; None before the first chunk.

    Notes
    -----
    https://arxiv.org/abs/2306.14048. Departs from the paper in grouped queries, whose attention is summed for their kv
    head, and in prefill, where tokens are evicted once a chunk and not once a token. As there, tokens keep their own
    positions, first tokens are nothing special, and attention never fades. After `trim` the attention of the trimmed
    tokens' queries stays counted.
    """

    config_class = H2OConfig
    config: H2OConfig

    state_fields = ("tokens",)
    state_types: ClassVar = {"tokens": AttendedTokens}
    observation_window = sys.maxsize

    def __init__(self, config: H2OConfig, spec: CacheSpec, layer: int) -> None:
        super().__init__(config, spec, layer)
        self.tokens: AttendedTokens | None = None

    def buckets(self) -> list[Bucket]:
        """Return the tokens kept."""
        return [] if self.tokens is None else [KeysValues(self.tokens.keys, self.tokens.values).as_bucket()]

    def absorb(self, keys: mx.array, values: mx.array, mass: mx.array | None) -> None:
        """Append the chunk, add the attention that all tokens got, and evict the lightest."""
        assert mass is not None  # since observation_window is never 0
        tokens = AttendedTokens(to_storage_dtype(keys), to_storage_dtype(values), mx.zeros(keys.shape[:3]))
        if self.tokens is not None:
            tokens = AttendedTokens(*concat_pairs(self.tokens, tokens))
        tokens = tokens._replace(attention=tokens.attention + mass)
        if tokens.keys.shape[2] > self.config.heavy + self.config.recent:
            tokens = self._evict_lightest(tokens)
        self.tokens = tokens

    def _evict_lightest(self, tokens: AttendedTokens) -> AttendedTokens:
        """Return the newest tokens and, of those before them, each head's heaviest."""
        B, H, T = tokens.attention.shape
        last, heavy = T - self.config.recent, self.config.heavy
        heaviest = mx.argpartition(-tokens.attention[..., :last], heavy - 1, axis=-1)[..., :heavy]
        recent = mx.broadcast_to(mx.arange(last, T, dtype=heaviest.dtype), (B, H, T - last))
        kept = mx.concatenate([mx.sort(heaviest, axis=-1), recent], axis=-1)
        rows = mx.arange(B)[:, None, None], mx.arange(H)[:, None], kept
        return AttendedTokens(*(part[rows] for part in tokens))

    def _trim(self, count: int) -> None:
        """Drop the last tokens."""
        if self.tokens is not None:
            self.tokens = AttendedTokens(*(copy_without_parent(part[:, :, :-count]) for part in self.tokens))

"""H2O: the tokens that have received most attention, and the newest."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import mlx.core as mx

from mlxkv.config import Config, integer
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.live.arrays import KeysValues, concat_pairs
from mlxkv.live.base import LayerCache, live_methods
from mlxkv.live.checks import check_array, check_kept
from mlxkv.live.storage import to_storage_dtype
from mlxkv.spec import CacheSpec


@dataclass(frozen=True, kw_only=True)
class H2OConfig(Config):
    """Settings of H2O.

    Parameters
    ----------
    heavy
        Number of tokens that each kv head keeps because they got most attention.
    recent
        Number of newest tokens that are kept in addition.
    """

    heavy: int = integer(256, least=1)
    recent: int = integer(256)


class AttendedTokens(NamedTuple):
    """Tokens and the attention that each has received.

    Parameters
    ----------
    keys, values
        `[B, Hkv, T, D]` and `[B, Hkv, T, Dv]`.
    attention
        `[B, Hkv, T]` float32: attention probabilities, summed over all queries from the token's own on.
    """

    keys: mx.array
    values: mx.array
    attention: mx.array


@live_methods.register("h2o")
class H2OCache(LayerCache):
    """H2O: each kv head keeps its heavy hitters, the tokens that got most attention, and the newest tokens.

    A small share of the tokens gets most of the attention, and tokens that got much so far tend to get much later. So
    each kv head sums the attention that each token receives. Once there are more than `heavy + recent` tokens, it keeps
    the `recent` newest and, of the others, the `heavy` with the largest sums.

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
    Paper: "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
    https://arxiv.org/abs/2306.14048. There are two departures. With grouped-query attention, the attention of all query
    heads that share a kv head is summed. In prefill, tokens are evicted once per chunk, not once per token. As in the
    paper, tokens keep their positions, the first tokens are not treated specially, and old attention does not fade.
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

    def check_state(self) -> None:
        """Check what every method has, then the sums of attention and how many tokens there are."""
        super().check_state()
        if self.tokens is not None:
            check_array(self.tokens.attention, "tokens.attention", self.tokens.keys.shape[:3], mx.float32)
        check_kept(self, min(self.offset, self.config.heavy + self.config.recent))

    def absorb(self, keys: mx.array, values: mx.array, mass: mx.array | None) -> None:
        """Append the chunk, add its attention to the sums, and evict the tokens with the smallest sums."""
        assert mass is not None  # since observation_window is never 0
        tokens = AttendedTokens(to_storage_dtype(keys), to_storage_dtype(values), mx.zeros(keys.shape[:3]))
        if self.tokens is not None:
            tokens = AttendedTokens(*concat_pairs(self.tokens, tokens))
        tokens = tokens._replace(attention=tokens.attention + mass)
        if tokens.keys.shape[2] > self.config.heavy + self.config.recent:
            tokens = self._evict_lightest(tokens)
        self.tokens = tokens

    def _evict_lightest(self, tokens: AttendedTokens) -> AttendedTokens:
        """Return the newest tokens and, of the others, those with the largest sums in each head."""
        B, H, T = tokens.attention.shape
        last, heavy = T - self.config.recent, self.config.heavy
        heaviest = mx.argpartition(-tokens.attention[..., :last], heavy - 1, axis=-1)[..., :heavy]
        recent = mx.broadcast_to(mx.arange(last, T, dtype=heaviest.dtype), (B, H, T - last))
        kept = mx.concatenate([mx.sort(heaviest, axis=-1), recent], axis=-1)
        rows = mx.arange(B)[:, None, None], mx.arange(H)[:, None], kept
        return AttendedTokens(*(part[rows] for part in tokens))

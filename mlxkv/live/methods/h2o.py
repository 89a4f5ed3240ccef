"""H2O: the tokens that have received most attention, and the newest."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx

from mlxkv.config import Config, integer
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.live.arrays import KeysValues, concat_pairs
from mlxkv.live.base import live_methods
from mlxkv.live.checks import check_array, check_kept
from mlxkv.live.counting import CountedRows, counted_attention
from mlxkv.live.in_place import Field, InPlaceCache, with_room
from mlxkv.live.storage import to_storage_dtype
from mlxkv.spec import CacheSpec

_STEP = 64  # rows by which the arrays grow of a cache that has not evicted a token yet
_ZERO = mx.array(0.0)


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
class H2OCache(InPlaceCache):
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
    tokens = Field[AttendedTokens | None]()

    def __init__(self, config: H2OConfig, spec: CacheSpec, layer: int) -> None:
        super().__init__(config, spec, layer)
        self.tokens = None

    def buckets(self) -> list[Bucket]:
        """Return the tokens kept."""
        tokens = self.tokens
        return [] if tokens is None else [KeysValues(tokens.keys, tokens.values).as_bucket()]

    def check_state(self) -> None:
        """Check what every method has, then the sums of attention and how many tokens there are."""
        super().check_state()
        tokens = self.tokens
        if tokens is not None:
            check_array(tokens.attention, "tokens.attention", tokens.keys.shape[:3], mx.float32)
        check_kept(self, min(self.offset, self.config.heavy + self.config.recent))

    def absorb(self, keys: mx.array, values: mx.array, mass: mx.array | None) -> None:
        """Append the chunk, add its attention to the sums, and evict the tokens with the smallest sums."""
        assert mass is not None  # since observation_window is never 0
        old, new = (
            self.tokens,
            AttendedTokens(to_storage_dtype(keys), to_storage_dtype(values), mx.zeros(keys.shape[:3])),
        )
        tokens = new if old is None else AttendedTokens(*concat_pairs(old, new))
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
        return _gathered(tokens, mx.concatenate([mx.sort(heaviest, axis=-1), recent], axis=-1))

    def _open_rows(self) -> CountedRows | H2ORows | None:
        """Return rows of the tokens kept: with room for more, or where one a head is evicted for each that comes."""
        if isinstance(self._rows, H2ORows) or (self._rows is not None and self._rows.used < self._rows.room):
            return self._rows
        self._settle()
        if (tokens := self.tokens) is None:
            return None
        self.tokens = None
        kept, most = tokens.keys.shape[2], self.config.heavy + self.config.recent
        if kept == most:
            return H2ORows(tokens, self.config.recent, self._offset - 1)
        return CountedRows(KeysValues(*tokens[:2]), tokens.attention, min(most, kept + _STEP))

    def _attend_rows(
        self, rows: CountedRows | H2ORows, queries: mx.array, token: KeysValues, scale: float, sinks: mx.array | None
    ) -> mx.array:
        """Attend to all tokens, and count."""
        if isinstance(rows, H2ORows):
            return rows.attend(queries, token, scale, sinks)
        output, mass = rows.attend(queries, token, scale, sinks)
        rows.attention = rows.attention + mass
        return mx.depends(output, [rows.attention])

    def _settled(self, rows: CountedRows | H2ORows) -> dict[str, Any]:
        """Return the tokens kept, in the order they came."""
        if isinstance(rows, H2ORows):
            return {"tokens": rows.tokens()}
        return {"tokens": AttendedTokens(*rows.tokens(0, rows.used), rows.attention[..., : rows.used])}


class H2ORows:
    """Tokens of which one a head is evicted for each that comes, which takes its row: nothing is sorted or moved.

    Parameters
    ----------
    tokens
        The tokens kept, in the order they came.
    recent
        Number of newest tokens, which stay.
    seen
        Number of tokens seen.

    Attributes
    ----------
    keys, values
        `[B, Hkv, kept + 1, D]` and `[B, Hkv, kept + 1, Dv]`; in one row of each head is an evicted token.
    """

    def __init__(self, tokens: AttendedTokens, recent: int, seen: int) -> None:
        batch, heads, kept, _ = tokens.keys.shape
        self.kept, self._recent, self._seen = kept, recent, seen
        self.keys, self.values, self._sums = (with_room(part, kept + 1) for part in tokens)
        # When tokens came: in the right order for all, and exactly for the newest.
        came = mx.arange(seen - kept, seen + 1, dtype=mx.int32)
        self._came = mx.contiguous(mx.broadcast_to(came, (batch, heads, kept + 1)))
        self._free = mx.full((batch, heads, 1), kept, mx.uint32)

    def arrays(self) -> list[mx.array]:
        """Return all arrays held.

        Returns
        -------
        list of mx.array
            Keys and values, then sums of attention, when tokens came, and the row that is free.
        """
        return [self.keys, self.values, self._sums, self._came, self._free]

    def attend(self, queries: mx.array, token: KeysValues, scale: float, sinks: mx.array | None) -> mx.array:
        """Write a token into the free row, attend to all tokens, and evict the lightest that is not recent.

        Parameters
        ----------
        queries
            `[B, Hq, 1, D]`.
        token
            `[B, Hkv, 1, D]` and `[B, Hkv, 1, Dv]`, in the type of the rows.
        scale
            Factor of the scores.
        sinks
            `[Hq]`, logits of attention sinks, or None.

        Returns
        -------
        mx.array
            `[B, Hq, 1, Dv]`.
        """
        free, put = self._free, mx.put_along_axis
        at = mx.expand_dims(free, -1)
        self.keys = put(self.keys, at, token.keys, 2)
        self.values = put(self.values, at, token.values, 2)
        output, mass = counted_attention(queries, self.keys, self.values, scale, None, sinks)
        self._came = came = put(self._came, free, mx.array(self._seen), 2)
        self._sums = sums = put(self._sums, free, _ZERO, 2) + mass
        self._seen += 1
        self._free = mx.argmin(mx.where(came < self._seen - self._recent, sums, mx.inf), axis=-1, keepdims=True)
        return mx.depends(output, [self._free])

    def tokens(self) -> AttendedTokens:
        """Return the tokens kept.

        Returns
        -------
        AttendedTokens
            `kept` tokens a head, in the order they came.
        """
        order = mx.argsort(mx.put_along_axis(self._came, self._free, mx.array(self._seen), 2), axis=-1)
        tokens = AttendedTokens(self.keys, self.values, self._sums)
        return _gathered(tokens, order[..., : self.kept])


def _gathered(tokens: AttendedTokens, rows: mx.array) -> AttendedTokens:
    """Return the tokens in some rows, `[B, Hkv, n]`, of each head."""
    B, H = rows.shape[:2]
    at = mx.arange(B)[:, None, None], mx.arange(H)[:, None], rows
    return AttendedTokens(*(part[at] for part in tokens))

"""H2O: the tokens that have received most attention, and the newest."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx

from mlxkv.config import Config, integer
from mlxkv.errors import FormatError
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.live.arrays import KeysValues, concat_pairs
from mlxkv.live.base import live_methods
from mlxkv.live.checks import check_array, check_ascending, check_kept, check_values
from mlxkv.live.counting import CountedRows, counted_attention
from mlxkv.live.in_place import Field, InPlaceCache
from mlxkv.live.storage import to_storage_dtype
from mlxkv.spec import CacheSpec

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
    came
        `[B, Hkv, T]` int32: when tokens came that are in no order; of the newest their positions in the text.
    free
        `[B, Hkv, 1]` uint32: the row before which an evicted token was left out. It and `came` are None where tokens are in
        the order they came.
    """

    keys: mx.array
    values: mx.array
    attention: mx.array
    came: mx.array | None = None
    free: mx.array | None = None


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
        The tokens kept, None before the first chunk. Once decoded tokens have taken the rows of others, they are in the order
        of their rows, which differs from head to head.

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

    def expected_bytes(self, tokens: int, batch: int = 1) -> int:
        """Return the bytes of the tokens kept, and of when each of them came once a decoded one took another's row."""
        most, rows = self.config.heavy + self.config.recent, 0
        if tokens > most and not self.latent:
            rows = most + 1
        return super().expected_bytes(tokens, batch) + 4 * batch * self.slots[0].heads * rows

    def check_state(self) -> None:
        """Check what every method has, then the sums of attention and how many tokens there are."""
        super().check_state()
        tokens = self.tokens
        if tokens is not None:
            check_array(tokens.attention, "tokens.attention", tokens.keys.shape[:3], mx.float32)
        check_kept(self, min(self.offset, self.config.heavy + self.config.recent))
        if tokens is not None and (tokens.came is not None or tokens.free is not None):
            self._check_rows(tokens)

    def _check_rows(self, tokens: AttendedTokens) -> None:
        """Check when tokens came, and the row that was left out."""
        *heads, kept, _ = tokens.keys.shape
        check_array(tokens.came, "tokens.came", (*heads, kept), mx.int32)
        check_array(tokens.free, "tokens.free", (*heads, 1), mx.uint32)
        assert tokens.came is not None
        assert tokens.free is not None
        check_values(tokens.free, "tokens.free", 0, kept)
        order, newest = mx.sort(tokens.came, axis=-1), self.offset - self.config.recent
        check_ascending(order, "tokens.came, sorted,")
        check_values(order, "tokens.came", 0, self.offset - 1)
        old = kept - self.config.recent
        if (
            kept != self.config.heavy + self.config.recent
            or not mx.all((order >= newest) == (mx.arange(kept) >= old)).item()
        ):
            raise FormatError(f"tokens.came does not name the newest of {self.offset} tokens")

    def absorb(self, keys: mx.array, values: mx.array, mass: mx.array | None) -> None:
        """Append the chunk, add its attention to the sums, and evict the tokens with the smallest sums."""
        assert mass is not None  # since observation_window is never 0
        tokens = AttendedTokens(to_storage_dtype(keys), to_storage_dtype(values), mx.zeros(keys.shape[:3]))
        old = self.tokens
        if old is not None:
            tokens = AttendedTokens(*concat_pairs(old[:3], tokens[:3]))
        tokens = tokens._replace(attention=tokens.attention + mass)
        if old is not None and old.came is not None:
            last = mx.broadcast_to(mx.arange(self.offset - keys.shape[2], self.offset), keys.shape[:3])
            tokens = _gathered(tokens, mx.argsort(mx.concatenate([old.came, last], axis=-1), axis=-1))
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
        return CountedRows(KeysValues(*tokens[:2]), tokens.attention, most)

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
        """Return the tokens kept."""
        if isinstance(rows, H2ORows):
            return {"tokens": rows.tokens()}
        return {"tokens": AttendedTokens(*rows.tokens(0, rows.used), rows.attention[..., : rows.used])}


class H2ORows:
    """Tokens of which one a head is evicted for each that comes, which takes its row: nothing is sorted or moved.

    Parameters
    ----------
    tokens
        The tokens kept.
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
        *heads, kept, _ = tokens.keys.shape
        self.kept, self._recent, self._seen = kept, recent, seen
        came, free = tokens.came, tokens.free
        if came is None or free is None:
            came = mx.broadcast_to(mx.arange(seen - kept, seen, dtype=mx.int32), (*heads, kept))
            free = mx.full((*heads, 1), kept, mx.uint32)
        rows = mx.arange(kept + 1)
        # The free row gets any token.
        tokens = _gathered(tokens._replace(came=came), mx.minimum(rows - (rows > free), kept - 1))
        assert tokens.came is not None
        self.keys, self.values, self._sums, self._came, self._free = *tokens[:3], tokens.came, free

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
            `kept` tokens a head, in the order of their rows.
        """
        rows = mx.arange(self.kept)
        tokens = AttendedTokens(self.keys, self.values, self._sums, self._came)
        return _gathered(tokens, rows + (rows >= self._free))._replace(free=self._free)


def _gathered(tokens: AttendedTokens, rows: mx.array) -> AttendedTokens:
    """Return the tokens in some rows, `[B, Hkv, n]`, of each head."""
    B, H = rows.shape[:2]
    at = mx.arange(B)[:, None, None], mx.arange(H)[:, None], rows
    return AttendedTokens(*(part[at] for part in tokens if part is not None))

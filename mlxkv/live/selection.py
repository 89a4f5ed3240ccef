"""Base class of methods that keep some tokens unchanged and evict the others, the same tokens in all heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from mlxkv.config import Config
from mlxkv.kernels import metal
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.live.base import KeysValues, append_chunk
from mlxkv.live.counting import counted_attention
from mlxkv.live.in_place import Field, InPlaceCache
from mlxkv.spec import CacheSpec

_ENOUGH = 1024  # tokens of a text to begin with


class AttendedRows:
    """Tokens that a query has attended to, in the order of the text; one of them may have been evicted since.

    Parameters
    ----------
    tokens
        The tokens.

    Attributes
    ----------
    keys, values
        `[B, Hkv, T, D]` and `[B, Hkv, T, Dv]`.
    evicted
        Index of the evicted token, None for none.
    """

    def __init__(self, tokens: KeysValues) -> None:
        self.keys, self.values = tokens
        self.evicted: int | None = None
        self._tokens = tokens.tokens

    @property
    def kept(self) -> int:
        """Number of tokens kept."""
        return self._tokens - (self.evicted is not None)

    def arrays(self) -> list[mx.array]:
        """Return all arrays held.

        Returns
        -------
        list of mx.array
            Keys and values.
        """
        return [self.keys, self.values]

    def append(self, token: KeysValues) -> KeysValues:
        """Add a token in place of the evicted one, as the last.

        Parameters
        ----------
        token
            Its key and value, `[B, Hkv, 1, D]` and `[B, Hkv, 1, Dv]`.

        Returns
        -------
        KeysValues
            All tokens.
        """
        self.keys, self.values = (mx.concatenate([*parts, new], axis=2) for parts, new in zip(self._parts(), token))
        self._tokens, self.evicted = self.kept + 1, None
        return KeysValues(self.keys, self.values)

    def tokens(self) -> KeysValues:
        """Return the tokens kept.

        Returns
        -------
        KeysValues
            The tokens, in the order of the text.
        """
        return KeysValues(*(mx.concatenate(parts, axis=2) for parts in self._parts()))

    def _parts(self) -> list[list[mx.array]]:
        """Return keys and values before and after the evicted token."""
        at = self.evicted
        if at is None:
            return [[self.keys], [self.values]]
        return [[part[:, :, :at], part[:, :, at + 1 :]] if at else [part[:, :, 1:]] for part in self.arrays()]


class SelectingCache(InPlaceCache):
    """Base class of methods that keep some tokens unchanged, the same tokens in all heads.

    Kept tokens stay in the order of the text, and their keys keep the rotary embedding of their position in the text. A
    method implements `kept_indices` or, where that is less work for a single token, `evicted_indices`.

    Parameters
    ----------
    config
        Settings, of the method's `config_class`.
    spec
        Description of the model's cache.
    layer
        The layer's index in the model.

    Attributes
    ----------
    tokens
        The tokens kept, None before the first chunk.
    """

    state_fields = ("tokens",)
    state_types: ClassVar = {"tokens": KeysValues}
    tokens = Field[KeysValues | None]()

    def __init__(self, config: Config, spec: CacheSpec, layer: int) -> None:
        super().__init__(config, spec, layer)
        self.tokens = None

    def kept_indices(self, count: int) -> np.ndarray:
        """Choose the tokens to keep.

        Parameters
        ----------
        count
            Number of candidates: the tokens kept so far, then the new ones. `offset` already includes the new ones.

        Returns
        -------
        np.ndarray
            Indices below `count` of the tokens to keep, in ascending order.
        """
        return np.delete(np.arange(count, dtype=np.int32), self.evicted_indices(count))

    def evicted_indices(self, count: int) -> Sequence[int]:
        """Choose the tokens to evict: all but those to keep.

        Parameters
        ----------
        count
            Number of candidates, as for `kept_indices`.

        Returns
        -------
        sequence of int
            Indices below `count`, in any order.
        """
        evicted: list[int] = np.setdiff1d(np.arange(count), self.kept_indices(count)).tolist()
        return evicted

    def tokens_as_large(self, tokens: int) -> int:
        """Return a text that is twice as long as one of which no more tokens are kept."""
        count = _ENOUGH
        while count < tokens and self._kept_of(count) < self._kept_of(2 * count):
            count *= 2
        return min(tokens, 2 * count)

    def _kept_of(self, count: int) -> int:
        """Return how many tokens are kept of the first chunk of a text."""
        cache = type(self)(*self._arguments)
        cache.offset = count
        return len(cache.kept_indices(count))

    def buckets(self) -> list[Bucket]:
        """Return the tokens kept."""
        return [] if self.tokens is None else [self.tokens.as_bucket()]

    def absorb(self, keys: mx.array, values: mx.array, mass: mx.array | None) -> None:
        """Append the chunk, then keep the tokens that the method chooses."""
        tokens = append_chunk(self.tokens, keys, values)
        kept = self.kept_indices(tokens.tokens)
        if len(kept) < tokens.tokens:
            # Indexing is far faster than mx.take on a CPU.
            tokens = KeysValues(*(part[:, :, mx.array(kept)] for part in tokens))
        self.tokens = tokens

    def _trim(self, count: int) -> None:
        """Drop the last tokens."""
        if self.tokens is not None:
            self.tokens = self.tokens.copy_tokens(0, -count)

    def _open_rows(self) -> Any:
        """Return rows of the tokens kept."""
        if self._rows is not None or self.tokens is None:
            return self._rows
        tokens, self.tokens = self.tokens, None
        return AttendedRows(tokens)

    def _attend_rows(
        self, rows: Any, queries: mx.array, token: KeysValues, scale: float, sinks: mx.array | None
    ) -> mx.array:
        """Attend to all tokens, then evict."""
        evicted = self.evicted_indices(rows.kept + 1)
        output = attention(queries, rows.append(token), scale, sinks)
        if len(evicted) > 1:
            kept = mx.array(np.delete(np.arange(rows.kept, dtype=np.int32), evicted))
            self.tokens = KeysValues(*(part[:, :, kept] for part in rows.arrays()))
        elif len(evicted):
            rows.evicted = evicted[0]
        return output

    def _settled(self, rows: Any) -> dict[str, Any]:
        """Return the tokens kept, in the order of the text."""
        return {"tokens": rows.tokens()}


def attention(queries: mx.array, tokens: KeysValues, scale: float, sinks: mx.array | None) -> mx.array:
    """Return the attention of one query over tokens in the type they are stored in.

    Parameters
    ----------
    queries
        `[B, Hq, 1, D]`.
    tokens
        All that it sees.
    scale
        Factor of the scores.
    sinks
        `[Hq]`, logits of attention sinks, or None.

    Returns
    -------
    mx.array
        `[B, Hq, 1, Dv]`.
    """
    keys, values = tokens
    if keys.dtype == mx.float16 and queries.dtype == mx.float32 and sinks is None and not metal.available():
        return counted_attention(queries, keys, values, scale, None, None)[0]
    if keys.dtype != queries.dtype:
        keys, values = keys.astype(queries.dtype), values.astype(queries.dtype)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, sinks=sinks)

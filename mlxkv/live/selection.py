"""Base class of methods that keep some tokens unchanged and evict the others, the same tokens in all heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from mlxkv.config import Config
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.live.base import KeysValues, append_chunk
from mlxkv.live.in_place import Field, InPlaceCache, with_room
from mlxkv.spec import CacheSpec

_ENOUGH = 1024  # tokens of a text to begin with
_STEP = 16  # rows by which the arrays of a cache grow that has not evicted a token yet


class SelectedRows:
    """Tokens in arrays with room for one more at least: a new token takes the row of one that was evicted.

    Parameters
    ----------
    tokens
        The tokens, in the order of the text.

    Attributes
    ----------
    keys, values
        `[B, Hkv, R, D]` and `[B, Hkv, R, Dv]`.
    order
        The rows of the tokens kept, in the order of the text.
    free
        A row without a token, whose turn is next; None where the next token takes a row that none had yet.
    """

    def __init__(self, tokens: KeysValues) -> None:
        self.keys, self.values = (with_room(part, tokens.tokens + 1) for part in tokens)
        self.order = list(range(tokens.tokens))
        self.free: int | None = None
        self._used, self._allocated = tokens.tokens, tokens.tokens + 1

    @property
    def kept(self) -> int:
        """Number of tokens kept."""
        return len(self.order)

    def arrays(self) -> list[mx.array]:
        """Return all arrays held.

        Returns
        -------
        list of mx.array
            Keys and values.
        """
        return [self.keys, self.values]

    def write(self, token: KeysValues) -> tuple[mx.array, mx.array]:
        """Add a token.

        Parameters
        ----------
        token
            Its key and value, `[B, Hkv, 1, D]` and `[B, Hkv, 1, Dv]`.

        Returns
        -------
        tuple of mx.array
            Keys and values of all tokens, in any order.
        """
        row = self.free
        if row is None:
            row = self._used
            if row == self._allocated:
                self._allocated += _STEP
                self.keys, self.values = (with_room(part, self._allocated) for part in self.arrays())
            self._used += 1
        self.keys[:, :, row : row + 1] = token.keys
        self.values[:, :, row : row + 1] = token.values
        self.order.append(row)
        if self._used == self._allocated:
            return self.keys, self.values
        return self.keys[:, :, : self._used], self.values[:, :, : self._used]

    def evict(self, indices: Sequence[int]) -> None:
        """Give up at most one token.

        Parameters
        ----------
        indices
            Its index in the order of the text, or none.
        """
        self.free = self.order.pop(indices[0]) if len(indices) else None


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

    def _open_rows(self) -> SelectedRows | None:
        """Return rows of the tokens kept."""
        if self._rows is not None or self.tokens is None:
            return self._rows
        tokens, self.tokens = self.tokens, None
        return SelectedRows(tokens)

    def _attend_rows(
        self, rows: SelectedRows, queries: mx.array, token: KeysValues, scale: float, sinks: mx.array | None
    ) -> mx.array:
        """Attend to all tokens, then evict one."""
        evicted = self.evicted_indices(rows.kept + 1)
        keys, values = rows.write(token)
        if keys.dtype != queries.dtype:
            keys, values = keys.astype(queries.dtype), values.astype(queries.dtype)
        output = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, sinks=sinks)
        if len(evicted) > 1:
            self.tokens = self._selected(rows, np.delete(rows.order, evicted).tolist())
        else:
            rows.evict(evicted)
        return output

    def _settled(self, rows: SelectedRows) -> dict[str, Any]:
        """Return the tokens kept, in the order of the text."""
        return {"tokens": self._selected(rows, rows.order)}

    def _selected(self, rows: SelectedRows, order: list[int]) -> KeysValues:
        """Return the tokens in some rows."""
        return KeysValues(*(part[:, :, mx.array(order, mx.int32)] for part in rows.arrays()))

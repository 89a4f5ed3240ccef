"""Base class of methods that keep the first tokens and the newest: decoding writes into a ring."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlxkv.live.arrays import KeysValues
from mlxkv.live.checks import check_kept
from mlxkv.live.in_place import with_room
from mlxkv.live.selection import SelectingCache, attention

_STEP = 64  # rows by which the arrays grow while no token has been evicted


class RingRows:
    """The first tokens, then a ring of the newest, in which a token takes the row of the one that is evicted for it.

    The row of a token depends on its position alone: a cache that was saved and loaded computes the same numbers.

    Parameters
    ----------
    tokens
        The tokens kept, in the order of the text.
    sinks
        Number of first tokens.
    recent
        Number of newest tokens. The ring has a row more, so that all of them are there when the next token attends.
    seen
        Number of tokens seen.

    Attributes
    ----------
    keys, values
        `[B, Hkv, R, D]` and `[B, Hkv, R, Dv]`.
    """

    def __init__(self, tokens: KeysValues, sinks: int, recent: int, seen: int) -> None:
        self._sinks, self._recent, self._seen = sinks, recent, seen
        self._most = sinks + recent + 1
        self.keys, self.values = self._grown(*tokens) if seen < self._most else self._wound(*tokens)

    @property
    def kept(self) -> int:
        """Number of tokens kept."""
        return min(self._seen, self._most - 1)

    def arrays(self) -> list[mx.array]:
        """Return all arrays held.

        Returns
        -------
        list of mx.array
            Keys and values.
        """
        return [self.keys, self.values]

    def write(self, token: KeysValues) -> KeysValues:
        """Add a token.

        Parameters
        ----------
        token
            Its key and value, `[B, Hkv, 1, D]` and `[B, Hkv, 1, Dv]`.

        Returns
        -------
        KeysValues
            All tokens, in the order of their rows.
        """
        row = self._row()
        if row == self.keys.shape[2]:
            self.keys, self.values = self._grown(self.keys, self.values)
        self.keys[:, :, row : row + 1] = token.keys
        self.values[:, :, row : row + 1] = token.values
        self._seen += 1
        if self._seen >= self._most:
            return KeysValues(self.keys, self.values)
        return KeysValues(self.keys[:, :, : self._seen], self.values[:, :, : self._seen])

    def tokens(self) -> KeysValues:
        """Return the tokens kept.

        Returns
        -------
        KeysValues
            Copies, in the order of the text.
        """
        sinks, free = self._sinks, self._row()
        keys, values = (
            mx.concatenate([part[:, :, :sinks], part[:, :, free + 1 : self._most], part[:, :, sinks:free]], axis=2)
            if self._seen >= self._most
            else part[:, :, : self._seen]
            for part in self.arrays()
        )
        return KeysValues(keys, values)

    def _row(self) -> int:
        """Return the row of the next token."""
        row = self._seen
        return row if row < self._most else self._sinks + (row - self._sinks) % (self._recent + 1)

    def _grown(self, *parts: mx.array) -> list[mx.array]:
        """Return arrays with room for a step more, as far as needed."""
        rows = min(self._most, (parts[0].shape[2] // _STEP + 1) * _STEP)
        return [with_room(part, rows) for part in parts]

    def _wound(self, *parts: mx.array) -> list[mx.array]:
        """Return tokens in the order of the text as a ring, with a row that is free."""
        split = self._most + self._sinks - 1 - self._row()  # of the newest, those before it are at the ring's end
        return [
            mx.concatenate(
                [part[:, :, : self._sinks], part[:, :, split:], part[:, :, :1], part[:, :, self._sinks : split]], axis=2
            )
            for part in parts
        ]


class RingCache(SelectingCache):
    """Base class of methods that keep the first tokens and the newest.

    Parameters
    ----------
    config
        Settings, of the method's `config_class`; their `recent` is the number of newest tokens.
    spec
        Description of the model's cache.
    layer
        The layer's index in the model.

    Attributes
    ----------
    sinks
        Number of first tokens.
    """

    config: Any
    sinks = 0

    def evicted_indices(self, count: int) -> range:
        """Choose the tokens between the first and the newest."""
        return range(self.sinks, count - self.config.recent)

    def check_state(self) -> None:
        """Check what every method has, then how many tokens there are."""
        super().check_state()
        check_kept(self, min(self.offset, self.sinks + self.config.recent))

    def _open_rows(self) -> RingRows | None:
        """Return a ring of the tokens kept."""
        if self._rows is None:
            if self.tokens is None:
                return None
            tokens, self.tokens = self.tokens, None
            return RingRows(tokens, self.sinks, self.config.recent, self._offset - 1)
        rows: RingRows = self._rows
        return rows

    def _attend_rows(
        self, rows: RingRows, queries: mx.array, token: KeysValues, scale: float, sinks: mx.array | None
    ) -> mx.array:
        """Attend to all tokens; the oldest after the first is evicted."""
        return attention(queries, rows.write(token), scale, sinks)

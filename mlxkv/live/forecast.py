"""Bytes that a live cache will hold after a text of any length: shapes are followed, and nothing is computed."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlxkv.live.arrays import KeysValues, iter_arrays
from mlxkv.live.rewinding import Rewinding
from mlxkv.spec import Slot


class Forecasting(Rewinding):
    """Base of `LayerCache` that says how large it will be.

    Attributes
    ----------
    slots
        Heads and dims of the keys, and of the values.
    observation_window
        Number of queries whose attention `absorb` gets; 0 for none.
    """

    slots: tuple[Slot, Slot]
    observation_window: int

    def expected_bytes(self, tokens: int, batch: int = 1) -> int:
        """Return the bytes that a cache with these settings holds after a text, in a type of 2 bytes.

        A method overrides it where its bytes follow from its settings; else arrays of the text's shape, which are never
        computed, are stored as a prompt and its last token are.

        Parameters
        ----------
        tokens
            The text's length, 1 or more.
        batch
            Number of texts.

        Returns
        -------
        int
            Bytes of one layer, without rows that are only allocated.
        """
        cache = type(self)(*self._arguments)
        count = self.tokens_as_large(tokens)
        for part in (count - 1, 1) if count > 1 else (1,):
            cache._take_shapes(part)
        return batch * sum(array.nbytes for array in iter_arrays(list(cache.state_to_save().values())))

    def tokens_as_large(self, tokens: int) -> int:
        """Return a shorter text after which the cache is as large, for methods whose work grows with the text.

        Parameters
        ----------
        tokens
            The text's length.

        Returns
        -------
        int
            1 to `tokens`; a method that stores every token returns `tokens`.
        """
        return tokens

    def _take_shapes(self, count: int) -> None:
        """Take in a chunk of zeros that nothing computes."""
        shapes = [(1, slot.heads, count, slot.dim) for slot in self.slots]
        chunk = self._begin(*(mx.zeros(shape, mx.bfloat16) for shape in shapes))
        if self._fetching:
            self._fetch(chunk)
            return
        kept = self.kept if self.observation_window else 0
        mass = mx.zeros((1, self.slots[0].heads, kept + count)) if self.observation_window else None
        self._store(chunk, mass)
        self._end()

    def _begin(self, keys: mx.array, values: mx.array) -> KeysValues:
        """Check that a chunk can follow, and hold it."""
        raise NotImplementedError

    def _fetch(self, chunk: KeysValues) -> Any:
        """Store a chunk at once."""
        raise NotImplementedError

    def _store(self, chunk: KeysValues, mass: mx.array | None) -> None:
        """Let the method absorb a chunk."""
        raise NotImplementedError

    def _end(self) -> None:
        """Forget the chunk that is stored now."""
        raise NotImplementedError

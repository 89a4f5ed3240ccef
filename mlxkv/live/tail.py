"""The newest tokens of a cache that packs old ones, in a buffer that is written in place."""

from __future__ import annotations

import mlx.core as mx

from mlxkv.live.arrays import KeysValues, held

STEP = 16  # rows that a full buffer grows by


class Tail:
    """Buffer of the newest tokens, unquantized, which grows in steps of 16 rows and is written in place.

    MLX writes in place only while nothing else holds a buffer: arrays taken from it before, copies of a cache and
    graphs that were not computed yet keep the values they had.

    Parameters
    ----------
    keys, values
        The tokens `[B, Hkv, T, D]` and `[B, Hkv, T, Dv]`.

    Attributes
    ----------
    keys, values
        The buffer: `[B, Hkv, allocated, D]` and `[B, Hkv, allocated, Dv]`.
    rows
        Number of tokens in it.
    allocated
        Number of rows that it has room for.
    """

    __slots__ = ("allocated", "keys", "rows", "values")

    def __init__(self, keys: mx.array, values: mx.array) -> None:
        # Writing changes the array object itself, which others may hold.
        self.keys, self.values = held(keys), held(values)
        # Of a damaged file one may be shorter, which is seen where states are checked.
        self.rows = self.allocated = max(keys.shape[-2], values.shape[-2])

    @classmethod
    def copy_of(cls, tokens: KeysValues) -> Tail:
        """Make a tail that owns its memory, without a row in advance.

        Parameters
        ----------
        tokens
            Tokens, which may be views of larger arrays.

        Returns
        -------
        Tail
            Their copies.
        """
        return cls(*tokens.copy_tokens())

    def append(self, keys: mx.array, values: mx.array) -> None:
        """Append a chunk.

        Parameters
        ----------
        keys, values
            `[B, Hkv, L, D]` and `[B, Hkv, L, Dv]`.
        """
        start, stop = self.rows, self.rows + keys.shape[2]
        if stop > self.allocated:
            self._grow(keys, values)
        else:
            self.keys[:, :, start:stop] = keys
            self.values[:, :, start:stop] = values
            self.rows = stop

    def tokens(self) -> KeysValues:
        """Return all tokens.

        Returns
        -------
        KeysValues
            Views of the buffer.
        """
        rows = self.rows
        return KeysValues(self.keys[:, :, :rows], self.values[:, :, :rows])

    def _grow(self, keys: mx.array, values: mx.array) -> None:
        """Append a chunk to a buffer that has no room for it."""
        stop = self.rows + keys.shape[2]
        allocated = -(-stop // STEP) * STEP
        more = allocated - stop
        self.keys, self.values = (
            mx.concatenate(
                [old[:, :, : self.rows], new, mx.zeros((*new.shape[:2], more, new.shape[3]), new.dtype)], axis=2
            )
            for old, new in ((self.keys, keys), (self.values, values))
        )
        self.rows, self.allocated = stop, allocated

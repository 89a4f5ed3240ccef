"""Tokens in arrays written in place, and the attention that each of them gets while a text is decoded."""

from __future__ import annotations

import math

import mlx.core as mx

from mlxkv.kernels import metal
from mlxkv.kernels.decode_attention import decode_attention
from mlxkv.live.arrays import KeysValues, unquantized
from mlxkv.live.in_place import with_room

_HIDDEN = -math.inf
_SHIFTED = 2.0**112
_PLACES = mx.array(13, mx.int32)  # that float32's mantissa is longer
_NO_SIGNS = mx.array(
    0x8FFFE000 - 2**32, mx.int32
)  # all bits but those between sign and exponent that the sign was copied to
_STEP = 64  # rows are allocated in multiples of it


class CountedRows:
    """Tokens in arrays with room for more, which are hidden by their bias, and the attention that each has got.

    Parameters
    ----------
    tokens
        The entries so far.
    attention
        What they have got, `[B, 1 or Hkv, T]` float32.
    most
        Number of rows that there may ever be, more than T.
    bias
        `[B, 1 or Hkv, T]` float32, added to the scores of the entries; None for 0.

    Attributes
    ----------
    keys, values
        `[B, Hkv, R, D]` and `[B, Hkv, R, Dv]`.
    attention
        `[B, 1 or Hkv, R]` float32.
    used
        Number of rows that hold an entry.
    room
        Number of rows.
    """

    def __init__(self, tokens: KeysValues, attention: mx.array, most: int, bias: mx.array | None = None) -> None:
        # Not of what came before: a cache that was saved and loaded computes the same numbers.
        room = min(most, (tokens.tokens // _STEP + 1) * _STEP)
        self.keys, self.values = (with_room(part, room) for part in tokens)
        self.attention = with_room(attention, room)
        self.used, self.room = tokens.tokens, room
        bias = mx.zeros((len(attention), 1, self.used)) if bias is None else bias
        self._bias = mx.concatenate([bias, mx.full((*bias.shape[:2], room - self.used), _HIDDEN)], axis=-1)

    @property
    def kept(self) -> int:
        """Number of entries."""
        return self.used

    def arrays(self) -> list[mx.array]:
        """Return all arrays held.

        Returns
        -------
        list of mx.array
            Keys, values, attention and bias.
        """
        return [self.keys, self.values, self.attention, self._bias]

    def attend(
        self, queries: mx.array, token: KeysValues, scale: float, sinks: mx.array | None
    ) -> tuple[mx.array, mx.array]:
        """Write a token into the next row, and attend to all entries.

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
        tuple of mx.array
            The output `[B, Hq, 1, Dv]`, and the attention that each row gets now, `[B, Hkv, R]` float32.
        """
        row = self.used
        self.keys[:, :, row : row + 1] = token.keys
        self.values[:, :, row : row + 1] = token.values
        self._bias[:, :, row : row + 1] = 0.0
        self.used = row + 1
        return counted_attention(queries, self.keys, self.values, scale, self._bias, sinks)

    def tokens(self, start: int, stop: int) -> KeysValues:
        """Return some of the entries.

        Parameters
        ----------
        start, stop
            Bounds of their rows.

        Returns
        -------
        KeysValues
            Copies, which own their memory.
        """
        return KeysValues(self.keys, self.values).copy_tokens(start, stop)


def counted_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    bias: mx.array | None,
    sinks: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """Return the attention of one query over unquantized tokens, and what each token gets of it.

    Parameters
    ----------
    queries
        `[B, Hq, 1, D]`.
    keys, values
        `[B, Hkv, T, D]` and `[B, Hkv, T, Dv]`.
    scale
        Factor of the scores.
    bias
        `[B, 1 or Hkv, T]` float32, added to the scores, or None.
    sinks
        `[Hq]`, logits of attention sinks, or None.

    Returns
    -------
    tuple of mx.array
        The output `[B, Hq, 1, Dv]`, and `[B, Hkv, T]` float32, summed over the query heads that share a kv head.
    """
    if sinks is not None or metal.available():
        return decode_attention(queries, [(unquantized(keys), unquantized(values))], scale, bias, sinks)
    B, H, _, D = keys.shape
    times = _SHIFTED if keys.dtype == mx.float16 and queries.dtype == mx.float32 else 1.0
    if times == 1:
        keys, values = keys.astype(mx.float32), values.astype(mx.float32)
    else:
        keys, values = _shifted(keys), _shifted(values)
    grouped = queries.astype(mx.float32).reshape(B, H, -1, D) * (scale * times)
    scores = grouped @ keys.swapaxes(-1, -2)
    if bias is not None:
        scores = scores + mx.expand_dims(bias, 2)
    weights = mx.softmax(scores, axis=-1)
    output = ((weights if times == 1 else weights * times) @ values).reshape(B, queries.shape[1], 1, -1)
    return output.astype(queries.dtype), weights.sum(axis=2)


def _shifted(x: mx.array) -> mx.array:
    """Return finite float16 values, divided by `_SHIFTED`, in float32: their bits in place, which takes a third of the time.

    An exponent means 2**112 less in float32. Factors of the other side make up for it, before the product: no product becomes
    so small that it would be rounded.
    """
    return mx.bitwise_and(mx.left_shift(x.view(mx.int16).astype(mx.int32), _PLACES), _NO_SIGNS).view(mx.float32)

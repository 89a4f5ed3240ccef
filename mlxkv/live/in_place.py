"""Caches that decode into arrays written in place: their state has a second form, from the first decoded token on."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Generic, Protocol, Self, TypeVar, overload

import mlx.core as mx

from mlxkv.live.arrays import KeysValues
from mlxkv.live.base import LayerCache
from mlxkv.live.storage import to_storage_dtype

T = TypeVar("T")


class Rows(Protocol):
    """The second form of a cache's state: arrays that a token is written into before its query attends to them."""

    keys: mx.array
    values: mx.array

    @property
    def kept(self) -> int:
        """Number of entries stored."""

    def arrays(self) -> list[mx.array]:
        """Return all arrays held.

        Returns
        -------
        list of mx.array
            Keys, values and what else there is, with allocated rows.
        """


class Field(Generic[T]):
    """Field of a state that has a second form: reading gives what the rows hold, writing ends that form."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, cache: None, owner: type) -> Self: ...

    @overload
    def __get__(self, cache: InPlaceCache, owner: type) -> T: ...

    def __get__(self, cache: InPlaceCache | None, owner: type) -> Self | T:
        if cache is None:
            return self
        fields = cache.__dict__ if cache._rows is None else cache._settled(cache._rows)
        value: T = fields[self._name]
        return value

    def __set__(self, cache: InPlaceCache, value: T) -> None:
        cache._settle()
        cache.__dict__[self._name] = value


class InPlaceCache(LayerCache):
    """Base class of methods whose state has a second form, for decoding.

    A chunk of several tokens finds and leaves the state as its fields say, in arrays of exact sizes. The first token that
    is decoded copies what is stored into arrays with room for more. Such tokens are written into these in place, and only
    then attended to, in the type they are stored in. Saved files know the first form alone.

    The fields of the state are declared as `Field`. A method implements `_open_rows`, `_attend_rows` and `_settled`.

    Parameters
    ----------
    config
        Settings, of the method's `config_class`.
    spec
        Description of the model's cache.
    layer
        The layer's index in the model.
    """

    _rows: Any = None

    @abstractmethod
    def _open_rows(self) -> Rows | None:
        """Return the rows to decode the next token with; None where it is taken in as a chunk."""

    @abstractmethod
    def _attend_rows(
        self, rows: Any, queries: mx.array, token: KeysValues, scale: float, sinks: mx.array | None
    ) -> mx.array:
        """Write a token into the rows, and return the attention `[B, Hq, 1, Dv]` over them."""

    @abstractmethod
    def _settled(self, rows: Any) -> dict[str, Any]:
        """Return the fields of the state, by name, that the rows stand for; the rows stay as they are."""

    def _settle(self) -> None:
        """Go back to the first form."""
        if self._rows is not None:
            fields = self._settled(self._rows)
            self._rows = None
            self.__dict__.update(fields)

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Return the attention over the stored tokens and the chunk, and store the chunk."""
        chunk = self._pending_chunk
        if mask is None and chunk is not None and chunk.keys.shape[2] == 1 and not self.latent:
            rows = self._open_rows()
            if rows is not None and (token := _stored_as(rows.keys.dtype, chunk)) is not None:
                self._rows = rows
                output = self._attend_rows(rows, queries, token, scale, sinks)
                self._end()
                return output
        self._settle()
        return super().attend(queries, keys, values, scale, mask, sinks)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays held, with rows that are only allocated."""
        return super().nbytes if self._rows is None else sum(array.nbytes for array in self._rows.arrays())

    @property
    def kept(self) -> int:
        """Number of entries stored; the number of tokens seen is `offset`."""
        return super().kept if self._rows is None else int(self._rows.kept)


def _stored_as(dtype: mx.Dtype, token: KeysValues) -> KeysValues | None:
    """Return a token in the type of those stored; None where that has to be decided anew."""
    if token.keys.dtype == dtype:
        return token
    if token.keys.dtype != mx.float32:
        return None
    return KeysValues(to_storage_dtype(token.keys, dtype), to_storage_dtype(token.values, dtype))


def with_room(array: mx.array, rows: int, axis: int = 2) -> mx.array:
    """Return a copy with more rows, which are 0.

    Parameters
    ----------
    array
        Any shape.
    rows
        Number of rows that the copy has, at least those of the array.
    axis
        The axis of the rows.

    Returns
    -------
    mx.array
        The rows of the array, then zeros.
    """
    shape = list(array.shape)
    shape[axis] = rows - shape[axis]
    return mx.concatenate([array, mx.zeros(shape, array.dtype)], axis=axis)

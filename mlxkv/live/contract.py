"""The part of mlx-lm's cache contract that follows from a method's state: what every entry of a prompt cache answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import mlx.core as mx

from mlxkv.errors import InputError, UnsupportedError
from mlxkv.kernels.bits import unpack
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.live.arrays import KeysValues, held, iter_arrays, map_arrays
from mlxkv.live.checks import check_buckets, check_fields
from mlxkv.live.group import CacheGroup


class StateForm:
    """The last item of a live cache's `state`: what the arrays before it are.

    mlx-lm's `save_prompt_cache` refuses it and prints it, since a file of the arrays alone could not be read back.

    Parameters
    ----------
    kind
        The class of the cache.
    arguments
        What the class is called with.
    offset
        Tokens seen.
    fields
        The state as it is, by the names of its fields.
    """

    def __init__(self, kind: type, arguments: tuple[Any, ...], offset: int, fields: dict[str, Any]) -> None:
        self.kind, self.arguments, self.offset, self.fields = kind, arguments, offset, fields

    def __repr__(self) -> str:
        return f"a {self.kind.__name__}, which only mlxkv.save_cache(path, model, prompt_cache) can save"


class StateContract:
    """Base of `LayerCache` with what mlx-lm asks of any cache and a method's state answers.

    Attributes
    ----------
    state_fields
        Names of the attributes that hold the method's state.
    offset
        Tokens seen so far.
    """

    state_fields: ClassVar[tuple[str, ...]] = ()
    offset: int
    _pending_chunk: KeysValues | None
    _fetching: bool
    _ties: list[mx.array]  # what models tied to a layer whose chunk is stored already
    _arguments: tuple[Any, ...]
    _group: CacheGroup | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Leave `keys` and `values` to methods that have them in their state."""
        super().__init_subclass__(**kwargs)
        for name in ("keys", "values"):
            if name in cls.state_fields and isinstance(getattr(cls, name, None), property):
                setattr(cls, name, None)

    def buckets(self) -> list[Bucket]:
        """Return all stored tokens.

        Returns
        -------
        list of Bucket
            As `LayerCache.buckets` describes them.

        Raises
        ------
        NotImplementedError
            Unless a method implements it.
        """
        raise NotImplementedError

    def score_bias(self) -> mx.array | None:
        """Return the bias of the scores of stored entries.

        Returns
        -------
        mx.array or None
            As `LayerCache.score_bias` describes it.

        Raises
        ------
        NotImplementedError
            Unless a method implements it.
        """
        raise NotImplementedError

    def _arrays(self) -> list[mx.array]:
        """Return all arrays held."""
        return list(iter_arrays([getattr(self, name) for name in self.state_fields]))

    @property
    def state(self) -> list[Any]:
        """All arrays held, for `mx.eval`, then a description of them: `mlxkv.save_cache` saves, mlx-lm refuses to."""
        fields = {name: getattr(self, name) for name in self.state_fields}
        return [*iter_arrays(list(fields.values())), StateForm(type(self), self._arguments, self.offset, fields)]

    @state.setter
    def state(self, state: Sequence[Any]) -> None:
        *arrays, form = state or (None,)
        if not isinstance(form, StateForm) or form.kind is not type(self):
            raise InputError(
                f"this is no state of a {type(self).__name__}: give what the `state` of one returned; files are read by "
                "mlxkv.load_cache"
            )
        if len(arrays) != len(list(iter_arrays(list(form.fields.values())))):
            raise InputError(f"a state of {len(arrays)} arrays does not fit its description")
        source = iter(arrays)
        for name, field in form.fields.items():
            setattr(self, name, map_arrays(field, lambda _: held(next(source))))  # which caches write in place
        self.offset = form.offset

    @classmethod
    def from_state(cls, state: Sequence[Any]) -> Self:
        """Make a cache from the state of another.

        Parameters
        ----------
        state
            What `state` returned; its arrays may have been replaced by others of the same shapes.

        Returns
        -------
        LayerCache
            A cache that goes on as the other one; it belongs to no prompt cache yet.

        Raises
        ------
        InputError
            For anything else, such as a state that was read from a file of mlx-lm's.
        """
        form = state[-1] if state else None
        cache = cls(*form.arguments) if isinstance(form, StateForm) and form.kind is cls else cls.__new__(cls)
        cache.state = list(state)
        return cache

    @property
    def group(self) -> CacheGroup | None:
        """The group that the entries of a prompt cache share; None for an entry that belongs to none."""
        return self._group

    def state_to_save(self) -> dict[str, Any]:
        """Return what a file has to hold of the state.

        Returns
        -------
        dict
            The state by the names of its fields. A method overrides it where its arrays have more in them than `offset`
            covers, such as tokens that were taken back.
        """
        return {name: getattr(self, name) for name in self.state_fields}

    def check_state(self) -> None:
        """Check that a state that was set from outside, such as a file's, is one that this method has after `offset` tokens.

        The default checks the offset, the types of the fields, the shapes of keys and values, the buckets and the bias of
        scores. A method whose state has more to it (packed tokens, other arrays, indices) extends the check with
        `mlxkv.live.checks`; it may wait for the device.

        Raises
        ------
        FormatError
            When it is not.
        """
        check_fields(self)
        check_buckets(self)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays held."""
        return sum(array.nbytes for array in self._arrays())

    @property
    def kept(self) -> int:
        """Number of entries stored; the number of tokens seen is `offset`."""
        return sum(keys.shape[-2] for keys, _ in self.buckets())

    def size(self) -> int:
        """Return `kept`, under the name that mlx-lm uses.

        Returns
        -------
        int
            Number of entries stored.
        """
        return self.kept

    def empty(self) -> bool:
        """Return whether no token has been seen.

        Returns
        -------
        bool
            True before the first chunk.
        """
        return self.offset == 0

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Return all stored tokens, unpacked.

        Returns
        -------
        tuple of mx.array
            Keys `[B, Hkv, kept, D]` and values `[B, Hkv, kept, Dv]` in the type they are stored in and the order of
            `buckets`, which is that of the text where a method neither sorts nor selects by head.

        Raises
        ------
        UnsupportedError
            Where an entry stands for several tokens, so that keys and values alone do not say what is stored.
        InputError
            Before the first chunk.
        """
        if self.score_bias() is not None:
            raise UnsupportedError("entries of this cache stand for several tokens: read `buckets` and `score_bias`")
        stored = self.buckets()
        if not stored:
            raise InputError("this cache has seen no token yet")
        keys, values = ([unpack(pair[slot], pair[slot].dtype) for pair in stored] for slot in (0, 1))
        return mx.concatenate(keys, axis=-2), mx.concatenate(values, axis=-2)

    @property
    def keys(self) -> Any:
        """Keys of the chunk between `update_and_fetch` and `attend`, where models attach what has to be computed."""
        return self._chunk_for_model().keys

    @keys.setter
    def keys(self, keys: mx.array) -> None:
        self._tie("keys", keys)

    @property
    def values(self) -> Any:
        """Values of the chunk between `update_and_fetch` and `attend`."""
        return self._chunk_for_model().values

    @values.setter
    def values(self, values: mx.array) -> None:
        self._tie("values", values)

    def _tie(self, name: str, array: mx.array) -> None:
        """Keep what a model attached to the chunk."""
        chunk = self._chunk_for_model()
        if self._fetching:
            self._ties.append(array)
        else:
            self._pending_chunk = chunk._replace(**{name: array})

    def _chunk_for_model(self) -> KeysValues:
        if self._fetching and self.offset:  # the chunk is stored: anything stands for it
            return KeysValues(mx.zeros(1), mx.zeros(1))
        if self._pending_chunk is None:
            raise UnsupportedError(
                "a live cache has `keys` and `values` only of the chunk between update_and_fetch and attention: call "
                "keys_and_values() for what it stores"
            )
        return self._pending_chunk

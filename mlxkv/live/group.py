"""Groups of the entries of one prompt cache: whether they have all seen the same tokens."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Collection, Hashable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import BatchRotatingKVCache, ChunkedKVCache, KVCache, RotatingKVCache

from mlxkv import stock
from mlxkv.errors import MismatchError

_DROPPING = (RotatingKVCache, BatchRotatingKVCache, ChunkedKVCache)


class CacheGroup:
    """Group of the live entries of one prompt cache, so that a call that was interrupted between layers is noticed.

    Live entries are not held, only their offsets: a prompt cache that is no longer used is freed at once. Copying a
    prompt cache with `copy.deepcopy` copies its group with it.

    Parameters
    ----------
    others
        mlx-lm's own entries of the prompt cache, by layer.
    model
        The model that the prompt cache is for; only a weak reference is kept.
    beside
        Layers in one list of caches with the first live one, which the model may fill before it.

    Attributes
    ----------
    offsets
        Tokens that each live layer has completely taken in, by layer.
    drops
        Whether an entry gives tokens up by itself, since it has a window.
    model
        Weak reference to the model.
    """

    def __init__(self, others: dict[int, Any], model: Any, beside: Collection[int] = ()) -> None:
        self.others = others
        self.model = weakref.ref(model)
        self.beside = frozenset(beside)
        self.offsets: dict[int, int] = {}
        self.drops = any(isinstance(entry, _DROPPING) for entry in others.values())
        self._hiding: tuple[tuple[int, int], mx.array] | None = None
        self._copies: dict[Hashable, CacheGroup] = {}  # while they are made

    @property
    def first(self) -> int:
        """The first live layer."""
        return next(iter(self.offsets))

    @property
    def can_trim(self) -> bool:
        """Whether live entries may lose tokens: all are equally far, and no entry drops any."""
        return not self.drops and len(set(self.offsets.values())) == 1

    def mask_hiding(self, hidden: int, tokens: int) -> mx.array:
        """Return the mask of one query that does not see the first tokens; layers with equal windows share it.

        Parameters
        ----------
        hidden
            Number of tokens that it does not see.
        tokens
            Number of all tokens.

        Returns
        -------
        mx.array
            Bool `[tokens]`.
        """
        if self._hiding is None or self._hiding[0] != (hidden, tokens):
            self._hiding = (hidden, tokens), mask_hiding(hidden, tokens)
        return self._hiding[1]

    def copied(self, layer: int, place: Hashable) -> CacheGroup:
        """Return the group of copies of the live entries, which are made one by one, in the order of the layers.

        Parameters
        ----------
        layer
            The layer that is copied: the first live one begins a new group.
        place
            What tells these copies from others.

        Returns
        -------
        CacheGroup
            A group that does not look at entries of other kinds, whose copies it cannot know.
        """
        if layer == self.first or place not in self._copies:
            self._copies[place] = new = copy.copy(self)
            new.others, new.offsets, new._copies = {}, {}, {}
        return self._copies.pop(place) if layer == next(reversed(self.offsets)) else self._copies[place]

    def check(self, layer: int, offset: int, count: int) -> None:
        """Check, before the first live layer takes a chunk in, that all layers are equally far.

        Parameters
        ----------
        layer
            The first live layer, which is about to take a chunk in.
        offset
            Its offset before the chunk.
        count
            Tokens in the chunk.

        Raises
        ------
        MismatchError
            When a layer has seen more or fewer tokens than others.
        """
        seen = set(self.offsets.values())
        for index, entry in self.others.items():
            found = _offset_of(entry)
            if found is not None and index not in self.beside:
                seen.add(found - count if index < layer else found)
        if seen != {offset}:
            raise _unequal(seen | {offset})


def mask_hiding(hidden: int, tokens: int) -> mx.array:
    """Return the mask of one query that does not see the first tokens.

    Parameters
    ----------
    hidden
        Number of tokens that it does not see.
    tokens
        Number of all tokens.

    Returns
    -------
    mx.array
        Bool `[tokens]`, there at once: any thread can use it.
    """
    return mx.array(np.arange(tokens) >= hidden)


def check_consistent(caches: Sequence[Any]) -> None:
    """Check that all entries of a prompt cache have completely seen the same tokens.

    Parameters
    ----------
    caches
        Entries of one prompt cache, live ones or mlx-lm's own, or lists of them. Only integers are compared; nothing waits for
        the device.

    Raises
    ------
    MismatchError
        When entries have seen different numbers of tokens, or a chunk was not attended: a call of the model was
        interrupted.
    """
    caches = stock.entries(caches)
    if any(getattr(entry, "_pending_chunk", None) is not None for entry in caches):
        raise MismatchError(
            "a layer of this prompt cache holds a chunk whose attention was not computed: a call of the model was "
            "interrupted; start again with a new cache"
        )
    seen = {found for found in map(_offset_of, caches) if found is not None}
    if len(seen) > 1:
        raise _unequal(seen)


def _offset_of(entry: Any) -> int | None:
    """Return the tokens that an entry has seen, None where it does not count them (batches, convolutions)."""
    if type(entry) is KVCache and entry.keys is None:
        return None  # some models make caches for layers without attention, and never fill them
    found = getattr(entry, "offset", None)
    return found if isinstance(found, int) else None


def _unequal(seen: set[int]) -> MismatchError:
    return MismatchError(
        f"the layers of this prompt cache have seen {' and '.join(map(str, sorted(seen)))} tokens: a call of the model "
        "was interrupted between layers, or entries of several caches were mixed; start again with a new cache"
    )

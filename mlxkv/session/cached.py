"""A prompt cache and the tokens that are in it: fed, taken back, or read again from the first one on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from mlx_lm.models.cache import ArraysCache, ChunkedKVCache, RotatingKVCache

from mlxkv import stock
from mlxkv.errors import MismatchError
from mlxkv.live.base import LayerCache
from mlxkv.live.group import check_consistent
from mlxkv.session.templates import common_length

_ONE_WAY = (ArraysCache, RotatingKVCache, ChunkedKVCache)  # of mlx-lm's, those that cannot always take tokens back


class _Checkpoint(NamedTuple):
    """Entries that cannot take tokens back, as they were after so many tokens."""

    tokens: int
    entries: dict[int, Any]


class CachedTokens:
    """A prompt cache that knows its tokens.

    Parameters
    ----------
    make
        Makes a new prompt cache.
    cache
        One that has read something; None for a new one.
    tokens
        Token ids that it has read.

    Attributes
    ----------
    cache
        The prompt cache, for mlx-lm's `prompt_cache=`.
    tokens
        Token ids that are in it.
    """

    def __init__(
        self, make: Callable[[], list[Any]], cache: list[Any] | None = None, tokens: Sequence[int] = ()
    ) -> None:
        self._make = make
        self.cache: list[Any] = make() if cache is None else cache
        self.tokens = list(tokens)
        self._checkpoint: _Checkpoint | None = None

    def remember(self, tokens: int) -> None:
        """Remember what cannot be taken back, so that `go_to` can come back here; of live caches nothing.

        Parameters
        ----------
        tokens
            Number of tokens that the cache has read.
        """
        entries = stock.entries(self.cache)
        one_way = {i: entry for i, entry in enumerate(entries) if isinstance(entry, _ONE_WAY)}
        if one_way and not any(isinstance(entry, LayerCache) for entry in entries):
            self._checkpoint = _Checkpoint(tokens, copy.deepcopy(one_way))

    def go_to(self, text: Sequence[int], *, unread: int = 1) -> int:
        """Leave in the cache what it shares with a text.

        Parameters
        ----------
        text
            Token ids that are to be read next, from the text's first.
        unread
            How many of the text's last tokens are left to read, at least.

        Returns
        -------
        int
            Number of tokens that the cache has lost, all of it where it cannot take tokens back.
        """
        keep = max(0, min(common_length(self.tokens, text), len(text) - unread))
        lost = len(self.tokens) - keep
        if not lost:
            return 0
        before = len(self.tokens)
        if not (keep and self._trim(lost)) and not self._go_to_checkpoint(keep):
            self.reset()
        if self._checkpoint is not None and self._checkpoint.tokens > len(self.tokens):
            self._checkpoint = None
        return before - len(self.tokens)

    def _trim(self, count: int, but: Collection[int] = ()) -> bool:
        """Take the last tokens out of all entries that are not left out; return whether they can."""
        kept = {i: entry for i, entry in enumerate(stock.entries(self.cache)) if entry is not None and i not in but}
        if not all(_can_lose(entry, count) for entry in kept.values()):
            return False
        for entry in kept.values():
            entry.trim(count)
        del self.tokens[len(self.tokens) - count :]
        return True

    def _go_to_checkpoint(self, most: int) -> bool:
        """Go back to the checkpoint if it is of no more tokens than these."""
        point = self._checkpoint
        if point is None or point.tokens > most or not self._trim(len(self.tokens) - point.tokens, point.entries):
            return False
        self.cache = stock.with_entries(self.cache, copy.deepcopy(point.entries))
        return True

    def reset(self) -> None:
        """Begin with an empty cache."""
        self.cache, self.tokens, self._checkpoint = self._make(), [], None

    def settle(self, text: Sequence[int], *, interrupted: bool = False) -> None:
        """Find out how much of a text has been read into the cache.

        Parameters
        ----------
        text
            Token ids that were being read and written.
        interrupted
            Whether the model may have been stopped in the middle of a call. What layers without keys and values hold then
            cannot be told, nor whether those that have seen nothing should have.
        """
        entries = stock.entries(self.cache)
        counted = [entry for entry in entries if isinstance(getattr(entry, "offset", None), int)]
        seen = max((entry.offset for entry in counted), default=0)
        try:
            check_consistent(entries)
        except MismatchError:
            self.reset()
            return
        # Layers that do not count may have read more, and those that have seen nothing less.
        if interrupted and sum(entry.offset == seen for entry in counted) < len(entries):
            self.reset()
            return
        unknown = [-1] * (seen - len(text))  # the model runs one token ahead of what it shows
        self.tokens = [*text[:seen], *unknown]
        self.go_to(text, unread=0)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays that are held, steps allocated in advance included."""
        return sum(entry.nbytes for entry in stock.entries(self.cache) if entry is not None)


def _can_lose(entry: Any, count: int) -> bool:
    """Return whether an entry can take back so many tokens now."""
    if hasattr(entry, "can_take_back"):
        return bool(entry.can_take_back(count))
    if (
        isinstance(entry, ChunkedKVCache) and entry.start_position
    ):  # it says that it can: what it dropped would be missing
        return False
    return bool(entry.is_trimmable())

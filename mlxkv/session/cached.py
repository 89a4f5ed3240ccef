"""A prompt cache and the tokens that are in it: fed, taken back, or read again from the first one on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mlxkv import stock
from mlxkv.errors import MismatchError
from mlxkv.live.group import check_consistent
from mlxkv.session.templates import common_length


class CachedTokens:
    """A prompt cache that knows its tokens.

    Parameters
    ----------
    make
        Makes a new prompt cache.

    Attributes
    ----------
    cache
        The prompt cache, for mlx-lm's `prompt_cache=`.
    tokens
        Token ids that are in it.
    """

    def __init__(self, make: Callable[[], list[Any]]) -> None:
        self._make = make
        self.cache: list[Any] = make()
        self.tokens: list[int] = []

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
        entries = [entry for entry in stock.entries(self.cache) if entry is not None]
        if keep and all(_can_lose(entry, lost) for entry in entries):
            for entry in entries:
                entry.trim(lost)
            del self.tokens[keep:]
            return lost
        lost = len(self.tokens)
        self.reset()
        return lost

    def reset(self) -> None:
        """Begin with an empty cache."""
        self.cache, self.tokens = self._make(), []

    def settle(self, text: Sequence[int], *, interrupted: bool = False) -> None:
        """Find out how much of a text has been read into the cache.

        Parameters
        ----------
        text
            Token ids that were being read and written.
        interrupted
            Whether the model may have been stopped in the middle of a call. What layers without keys and values hold then
            cannot be told.
        """
        entries = stock.entries(self.cache)
        counted = [entry for entry in entries if isinstance(getattr(entry, "offset", None), int)]
        seen = max((entry.offset for entry in counted), default=0)
        try:
            check_consistent(entries)
        except MismatchError:
            self.reset()
            return
        if interrupted and len(counted) < len(entries):
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
    return bool(entry.is_trimmable())

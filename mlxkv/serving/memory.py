"""Prompt caches that stay in RAM: those that were used last, as many as fit."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import can_trim_prompt_cache

from mlxkv import stock

KINDS = ("assistant", "user", "system")
_STRETCH = 1024  # tokens compared at a time, so that texts that differ early cost little


class Recent(NamedTuple):
    """A cache that answers a prompt, and belongs to the caller alone.

    Attributes
    ----------
    cache
        The prompt cache.
    length
        Tokens of the prompt that it holds.
    size
        Its bytes.
    """

    cache: list[Any]
    length: int
    size: int


class _Entry(NamedTuple):
    model: Any
    tokens: np.ndarray  # [T] int64, those that all layers hold
    cache: list[Any]
    size: int
    kind: str
    exact: bool  # no layer holds more than these tokens


class RecentCaches:
    """Caches of prompts and answers by their tokens. What was used longest ago goes first.

    Arrays are never copied here: what is handed out shares them, and MLX copies an array when either side writes into it.

    Parameters
    ----------
    most
        Number of caches.
    limit
        Their bytes together; None for any.
    spares_newest
        Whether the newest one stays even if it is larger than the limit.
    """

    def __init__(self, most: int, limit: int | None = None, spares_newest: bool = False) -> None:
        self.most, self.limit, self.spares_newest = most, limit, spares_newest
        self._entries: OrderedDict[int, _Entry] = OrderedDict()  # by use, the newest last
        self._next = 0
        self._lock = threading.Lock()  # statistics are read by other threads
        self.size = 0

    def __len__(self) -> int:
        return len(self._entries)

    def length(self, model: Any, tokens: np.ndarray, most: int) -> int:
        """Return how many tokens of a prompt `fetch` would find.

        Parameters
        ----------
        model
            What the caches are of.
        tokens
            The prompt `[T]`, int64.
        most
            Tokens that may come from a cache.

        Returns
        -------
        int
            0 to `most`.
        """
        return self._nearest(model, tokens, most)[0]

    def fetch(self, model: Any, tokens: np.ndarray, most: int) -> Recent | None:
        """Return a cache of the longest beginning of a prompt, and count its entry as used.

        Parameters
        ----------
        model
            What the caches are of.
        tokens
            The prompt `[T]`, int64.
        most
            Tokens that may come from a cache.

        Returns
        -------
        Recent or None
            None where no cache begins like the prompt.
        """
        length, key = self._nearest(model, tokens, most)
        if key is None:
            return None
        entry = self._entries[key]
        self._entries.move_to_end(key)
        cache = copy.deepcopy(entry.cache)
        if not (entry.exact and length == len(entry.tokens)) and not _cut(cache, length):
            return None
        return Recent(cache, length, entry.size)

    def insert(self, model: Any, tokens: np.ndarray, cache: list[Any], kind: str) -> None:
        """Keep a cache, which nobody may change any more.

        Parameters
        ----------
        model
            What the cache is of.
        tokens
            What it holds `[T]`, int64. Where a layer holds fewer, as after drafts, only those count.
        cache
            The prompt cache.
        kind
            "system", "user" or "assistant": what the text ends with.
        """
        offsets = _offsets(cache)
        tokens = tokens[: min(offsets, default=len(tokens))]
        if not len(tokens):
            return
        entry = _Entry(model, tokens, cache, _bytes(cache), kind, set(offsets) <= {len(tokens)})
        if self.limit is not None and entry.size > self.limit and not self.spares_newest:
            return
        trimmable = can_trim_prompt_cache(cache)
        with self._lock:
            for key, other in list(self._entries.items()):
                covered = other.model == model and len(other.tokens) <= len(tokens) and (
                    trimmable or len(other.tokens) == len(tokens)
                )  # fmt: skip
                if covered and common_prefix(other.tokens, tokens) == len(other.tokens):
                    self._remove(key)
            self._entries[self._next] = entry
            self._next += 1
            self.size += entry.size
        self.shrink(self.most, self.limit)

    def shrink(self, most: int | None = None, limit: int | None = None) -> None:
        """Give up what was used longest ago.

        Parameters
        ----------
        most
            Number of caches that may stay; None for all.
        limit
            Bytes that may stay; None for all.
        """
        with self._lock:
            while self._entries and (
                (most is not None and len(self._entries) > most)
                or (limit is not None and self.size > limit and len(self._entries) > self.spares_newest)
            ):
                self._remove(next(iter(self._entries)))

    def by_kind(self) -> dict[str, dict[str, int]]:
        """Return the number and the bytes of the caches of each kind.

        Returns
        -------
        dict
            By kind, `n_sequences` and `n_bytes`, as mlx-lm names them.
        """
        found = {kind: {"n_sequences": 0, "n_bytes": 0} for kind in KINDS}
        with self._lock:
            for entry in self._entries.values():
                kind = found.setdefault(entry.kind, {"n_sequences": 0, "n_bytes": 0})
                kind["n_sequences"] += 1
                kind["n_bytes"] += entry.size
        return found

    def _nearest(self, model: Any, tokens: np.ndarray, most: int) -> tuple[int, int | None]:
        """Return the longest beginning that a cache holds, and the key of the smallest one that does."""
        best, best_key, best_size = 0, None, 0
        for key, entry in self._entries.items():
            if entry.model != model:
                continue
            length = min(common_prefix(entry.tokens, tokens), most)
            whole = entry.exact and length == len(entry.tokens)
            if length < max(best, 1) or not (whole or can_trim_prompt_cache(entry.cache)):
                continue
            if length > best or len(entry.tokens) <= best_size:
                best, best_key, best_size = length, key, len(entry.tokens)
        return best, best_key

    def _remove(self, key: int) -> None:
        self.size -= self._entries.pop(key).size


def common_prefix(one: np.ndarray, other: np.ndarray) -> int:
    """Return how many tokens two texts begin with alike.

    Parameters
    ----------
    one, other
        Token ids `[T]`.

    Returns
    -------
    int
        0 to the length of the shorter one.
    """
    most = min(len(one), len(other))
    for start in range(0, most, _STRETCH):
        stop = min(start + _STRETCH, most)
        differing = np.flatnonzero(one[start:stop] != other[start:stop])
        if len(differing):
            return start + int(differing[0])
    return most


def begin_computing(cache: Sequence[Any]) -> None:
    """Let the arrays of a prompt cache be computed without waiting, so that they hold no others that they are made of.

    Parameters
    ----------
    cache
        A prompt cache.
    """
    mx.async_eval([entry.state for entry in cache])  # type: ignore[no-untyped-call]


def _offsets(cache: Sequence[Any]) -> list[int]:
    """Return how many tokens the entries hold that count them; some models leave entries empty."""
    found = [getattr(entry, "offset", 0) for entry in stock.entries(cache)]
    return [offset for offset in found if isinstance(offset, int) and offset > 0]


def _cut(cache: Sequence[Any], length: int) -> bool:
    """Take all tokens after the first ones out of a prompt cache; False where an entry cannot."""
    return all(_cut_entry(entry, length) for entry in stock.entries(cache))


def _cut_entry(entry: Any, length: int) -> bool:
    offset = getattr(entry, "offset", 0)
    return offset <= length or entry.trim(offset - length) == offset - length


def _bytes(cache: Sequence[Any]) -> int:
    return sum(entry.nbytes for entry in cache)

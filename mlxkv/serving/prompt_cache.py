"""The prompt cache of the server: caches in RAM, and the store on disk behind them."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxkv.errors import MlxkvError
from mlxkv.serving.memory import RecentCaches, begin_computing, common_prefix
from mlxkv.serving.speeds import LEAST_GAIN, Speeds

if TYPE_CHECKING:
    from mlxkv.store import PromptStore

log = logging.getLogger("mlxkv.serving")

LEAST_TOKENS = 64  # of a text that is worth storing
REPORT_SECONDS = 30.0  # between lines about what was stored, while more waits
_PROMPTS = 128  # requests whose ends are remembered until their answers come


class PromptCache:
    """What mlx-lm's server asks of its `LRUPromptCache`, with a store behind it.

    All methods but `statistics`, `computed` and `flush` belong to the thread that generates. A cache that is handed out belongs to its request alone,
    and at least one token of a prompt is left to compute.

    Parameters
    ----------
    max_size
        Number of caches in RAM.
    max_bytes
        Their bytes; None for any.
    spares_newest
        Whether the newest one stays even if it has more bytes.
    """

    def __init__(self, max_size: int = 10, max_bytes: int | None = None, spares_newest: bool = False) -> None:
        self.memory = RecentCaches(max_size, max_bytes, spares_newest)
        self._store: PromptStore | None = None
        self._stored_model: Any = None
        self._asked: deque[tuple[Any, np.ndarray]] = deque(maxlen=_PROMPTS)
        self._inserted: PromptStore | None = None  # where something waits that was not reported yet
        self._told: tuple[int, int] = (0, 0)
        self._told_at = time.monotonic()
        self._speeds, self._found_at = Speeds(), 0.0
        self._counts = dict.fromkeys(("requests", "prompt_tokens", "from_memory", "from_disk"), 0)

    def __len__(self) -> int:
        return len(self.memory)

    @property
    def nbytes(self) -> int:
        """Bytes of the caches in RAM."""
        return self.memory.size

    def keep_on_disk(self, model: Any, store: PromptStore | None) -> None:
        """Name the store of a model, from now on.

        Parameters
        ----------
        model
            The key of the model in `fetch_nearest_cache` and `insert_cache`.
        store
            Its store; None for RAM alone.
        """
        self._stored_model, self._store = model, store
        if store is not None:
            self._inserted, self._told, self._speeds = None, (0, 0), Speeds()

    def fetch_nearest_cache(self, model: Any, tokens: Sequence[int]) -> tuple[list[Any] | None, Sequence[int]]:
        """Return a cache of the longest beginning of a prompt, and the tokens that are left to compute.

        Parameters
        ----------
        model
            The key of the model.
        tokens
            The prompt. Negative ones stand for images.

        Returns
        -------
        tuple
            The cache, None where nothing begins like the prompt, and 1 token or more.
        """
        start = time.perf_counter()
        prompt = np.array(tokens, dtype=np.int64)
        most = len(prompt) - 1
        in_memory = self.memory.length(model, prompt, most)
        found, source = self._from_disk(model, prompt, in_memory), "disk"
        if found is None:
            recent = self.memory.fetch(model, prompt, most)
            found, source = recent and (recent.cache, recent.length, recent.size), "memory"
        self._asked.append((model, prompt))
        cache, length, size = found or (None, 0, 0)
        self._count(len(prompt), length, source)
        milliseconds = 1e3 * (time.perf_counter() - start)
        came = f"{length:,} from {source} ({megabytes(size)}, {milliseconds:.1f} ms)" if length else "none kept"
        log.info("prompt of %s tokens: %s, %s to compute", f"{len(prompt):,}", came, f"{len(prompt) - length:,}")
        self._found_at = time.perf_counter()
        return cache, tokens[length:]

    def computed(self, tokens: int) -> None:
        """Take note that what the last `fetch_nearest_cache` left is computed now, and nothing else was meanwhile.

        Parameters
        ----------
        tokens
            Their number.
        """
        self._speeds.computed(tokens, time.perf_counter() - self._found_at)

    def insert_cache(
        self, model: Any, tokens: Sequence[int], prompt_cache: list[Any], *, cache_type: str = "assistant"
    ) -> None:
        """Keep a cache, in RAM and on disk.

        Parameters
        ----------
        model
            The key of the model.
        tokens
            What the cache holds.
        prompt_cache
            The cache, which nobody changes any more.
        cache_type
            "system", "user" or "assistant": what the text ends with.
        """
        text = np.array(tokens, dtype=np.int64)
        begin_computing(prompt_cache)
        self.memory.insert(model, text, prompt_cache, cache_type)
        ends = self._ends(model, text)
        if self._store is not None and len(text) >= LEAST_TOKENS and self._has_store(model, text):
            self._store.insert(text, prompt_cache, kind=cache_type, cuts=ends)
            self._inserted = self._store

    def trim_to(self, *, n_sequences: int | None = None, n_bytes: int | None = None) -> None:
        """Give up caches in RAM.

        Parameters
        ----------
        n_sequences
            Number of caches that may stay; None for all.
        n_bytes
            Bytes that may stay; None for all.
        """
        self.memory.shrink(n_sequences, n_bytes)

    def stats_by_type(self) -> dict[str, dict[str, int]]:
        """Return the number and the bytes of the caches in RAM of each kind.

        Returns
        -------
        dict
            By kind, `n_sequences` and `n_bytes`.
        """
        return self.memory.by_kind()

    def statistics(self) -> dict[str, Any]:
        """Return what was asked and where it came from; any thread may.

        Returns
        -------
        dict
            Of JSON's types: tokens of prompts by where they came from, how fast they were computed and read, caches in RAM,
            and the store's own numbers, None without a store.
        """
        memory = {"caches": len(self), "bytes": self.nbytes, "limit_bytes": self.memory.limit}
        return {**self._counts, **self._speeds.statistics(), "memory": memory, "store": self._on_disk()}

    def report(self) -> None:
        """Log what was stored since the last time, once nothing waits or a while has passed."""
        if (store := self._inserted) is None:
            return
        try:
            found = store.statistics()
        except MlxkvError:  # the index is busy: the next time tells
            return
        if found["waiting"] and time.monotonic() - self._told_at < REPORT_SECONDS:
            return
        now = found["tokens_written"], found["bytes_written"]
        tokens, size = (after - before for after, before in zip(now, self._told))
        self._inserted = store if found["waiting"] else None
        self._told, self._told_at = now, time.monotonic()
        if tokens:
            log.info("stored %s tokens in %s (%s)", f"{tokens:,}", megabytes(size), found["coding"])

    def flush(self, seconds: float) -> bool:
        """Wait until everything is on disk.

        Parameters
        ----------
        seconds
            How long at most.

        Returns
        -------
        bool
            Whether it is.
        """
        store = self._store or self._inserted  # which writes for all models, those that were given up as well
        return store is None or store.flush(seconds)

    def _from_disk(self, model: Any, prompt: np.ndarray, in_memory: int) -> tuple[list[Any], int, int] | None:
        """Return cache, tokens and bytes read where reading them takes less time than computing them."""
        most = len(prompt) - 1
        if most - in_memory < LEAST_GAIN or not self._has_store(model, prompt):
            return None
        store, start = self._store, time.perf_counter()
        assert store is not None
        try:
            matched = store.match(prompt)
        except MlxkvError as error:  # whatever is wrong with a disk is a miss
            log.warning("the store cannot be read: %s", error)
            return None
        if not self._speeds.is_worth(matched, in_memory):
            return None
        fetched = store.fetch(prompt)
        if fetched is None or fetched.length <= in_memory:
            return None
        self._speeds.read(fetched.length, time.perf_counter() - start)
        # Others may begin so too: from now on it is in RAM, and the request gets what shares its arrays.
        self.memory.insert(model, prompt[: fetched.length], fetched.cache, "user")
        again = self.memory.fetch(model, prompt, most)
        if again is not None and again.length > in_memory:
            return again.cache, again.length, fetched.bytes
        return (fetched.cache, fetched.length, fetched.bytes) if fetched.length <= most else None  # too large to stay

    def _on_disk(self) -> dict[str, Any] | None:
        """Return the store's numbers, without the name of its folder, which is no business of those who may ask."""
        if (store := self._store) is None:
            return None
        try:
            found = store.statistics()
        except MlxkvError as error:
            return {"error": error.message}
        sizes = {key: value for key, value in found.get("store", {}).items() if key != "folder"}
        return {**found, "store": sizes}

    def _has_store(self, model: Any, tokens: np.ndarray) -> bool:
        """Return whether a text of a model can be in the store, which images cannot."""
        return self._store is not None and model == self._stored_model and len(tokens) > 0 and int(tokens.min()) >= 0

    def _ends(self, model: Any, text: np.ndarray) -> list[int]:
        """Return where prompts end within a text, and forget those prompts."""
        ends, others = set(), []
        for asked, prompt in self._asked:
            if asked == model and common_prefix(prompt, text) == len(prompt):
                ends.add(len(prompt))
            else:
                others.append((asked, prompt))
        self._asked = deque(others, maxlen=_PROMPTS)
        return sorted(ends)

    def _count(self, tokens: int, length: int, source: str) -> None:
        self._counts["requests"] += 1
        self._counts["prompt_tokens"] += tokens
        self._counts[f"from_{source}"] += length


def megabytes(size: int) -> str:
    """Return a number of bytes as people read it.

    Parameters
    ----------
    size
        Bytes.

    Returns
    -------
    str
        In MB, or in kB where there are few.
    """
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"

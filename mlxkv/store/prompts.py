"""The prompts of one model: which of them the store has, read back as caches, and new ones handed to the writing thread."""

from __future__ import annotations

import json
import logging
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from mlxkv.config import Config
from mlxkv.errors import MlxkvError
from mlxkv.live.exchange import live_cache
from mlxkv.store.chain import Chain, root_name
from mlxkv.store.codings import AGAIN_TOKENS, Codings
from mlxkv.store.form import LEAST_TOKENS, CacheForm
from mlxkv.store.index import BlockStore
from mlxkv.store.insertion import Insertion
from mlxkv.store.reading import Plan, Reading, Unusable, timed
from mlxkv.store.snapshot import Snapshot
from mlxkv.store.texts import texts
from mlxkv.store.writer import Job, Stopped, Writer

log = logging.getLogger("mlxkv.store")
_COUNTS = (
    "hits", "misses", "tokens_read", "bytes_read", "tokens_written", "blocks_written", "bytes_written", "skipped", "errors",
)  # fmt: skip
_LONGEST_NAME = 200
_MOST_KINDS = 100  # of messages that are logged once each


class Fetched(NamedTuple):
    """A prompt cache read from the store.

    Parameters
    ----------
    cache
        A fresh prompt cache for `generate(..., prompt_cache=...)`, all computed: any thread can use it.
    length
        Tokens in it: the first ones of the prompt, of which at least one is left to be computed.
    bytes
        Bytes that were read.
    seconds
        Seconds of "index", "reading", "decoding" and "filling", and "total".
    """

    cache: list[Any]
    length: int
    bytes: int
    seconds: dict[str, float]


class PromptStore:
    """Prompts of one model. `fetch` and `insert` are called on the thread that runs the model, everything else on any.

    Made by `mlxkv.Store.for_model`.

    Parameters
    ----------
    blocks
        Index and files.
    writer
        The writing thread.
    model
        The model.
    form
        Form of its cache.
    name, fingerprint
        Its name, for people, and its fingerprint.
    quality
        Quality of its blocks; None for bit-exact ones.
    method
        Live caches that it runs with; None for mlx-lm's own.

    Attributes
    ----------
    form
        Form of the model's cache.
    codings
        What blocks are coded with.
    """

    def __init__(
        self, blocks: BlockStore, writer: Writer, model: Any, form: CacheForm, *, name: str, fingerprint: str,
        quality: float | None, method: str | Config | None,
    ) -> None:  # fmt: skip
        self.form, self.name, self.fingerprint = form, name[:_LONGEST_NAME], fingerprint
        self.codings = Codings(form.spec, fingerprint, quality, name)
        self._blocks, self._writer, self._method = blocks, writer, method
        self._model = weakref.ref(model)
        self._exact = quality is None
        # Bits are those of one type, and a quality is one of what a plain cache would hold.
        grade = f"exact {form.dtype}" if quality is None else f"{quality:g}"
        spec = json.dumps(form.spec.to_json(), sort_keys=True)
        self._root = root_name(fingerprint, spec, " ".join(filter(None, (grade, form.live))))
        self._counts: Counter[str] = Counter()
        self._seconds: Counter[str] = Counter()
        self._lock = Lock()
        self._said: set[str] = set()

    def match(self, tokens: Sequence[int] | np.ndarray) -> int:
        """Return how many tokens `fetch` would bring, by the index alone.

        Parameters
        ----------
        tokens
            Token ids of a prompt.

        Returns
        -------
        int
            0 where nothing is stored that the prompt begins with.
        """
        ids = _as_ids(tokens)
        plan = None if ids is None else self._plan(Chain(self._root, ids), len(ids))
        return 0 if plan is None else plan.stop

    def fetch(self, tokens: Sequence[int] | np.ndarray) -> Fetched | None:
        """Read the longest beginning of a prompt that is stored.

        Parameters
        ----------
        tokens
            Token ids of the prompt.

        Returns
        -------
        Fetched or None
            None where nothing is stored that it begins with, or nothing that can be read.
        """
        began = time.perf_counter()
        try:
            found = self._fetch(tokens, began)
        except Exception as error:  # noqa: BLE001  # whatever it is, the prompt can be computed
            self._failed(f"a prompt could not be read: {error!r}")
            found = None
        if found is None:
            self._count(misses=1)
        else:
            self._count(hits=1, tokens_read=found.length, bytes_read=found.bytes)
            self._spend(reading=found.seconds["total"])
        return found

    def insert(
        self,
        tokens: Sequence[int] | np.ndarray,
        cache: Sequence[Any],
        kind: str = "assistant",
        cuts: Sequence[int] = (),
    ) -> None:
        """Let a prompt be stored, later and on another thread. What cannot be stored is counted and logged.

        Parameters
        ----------
        tokens
            Token ids that are in the cache.
        cache
            The model's prompt cache, mlx-lm's own or live. Its arrays are held until they are written, and must not be changed
            in place meanwhile; mlx-lm's caches do so only where nobody else holds them.
        kind
            Of whom the tokens end with: "system", "user" or "assistant".
        cuts
            Places in the text where prompts ended, from which other conversations may go on.
        """
        try:
            if (ids := _as_ids(tokens)) is None:
                self._skip("tokens that are no int32 are not stored, such as those of images")
                return
            snapshot = Snapshot(cache, self.form, ids)
        except MlxkvError as error:
            self._skip(f"a prompt is not stored: {error}")
            return
        if snapshot.length < LEAST_TOKENS:
            self._count(skipped=1)  # nothing to say: it is computed sooner than read
            return
        ends = {cut: "user" for cut in cuts if 0 < cut < snapshot.length}
        self._writer.add(_Insertion(self, snapshot, {**ends, snapshot.length: kind}))

    def texts(self) -> Iterator[np.ndarray]:
        """Read what stored prompts said, the one used last first.

        Returns
        -------
        Iterator[np.ndarray]
            Token ids `[T]`, int32, of one text after the other.
        """
        return texts(self._blocks, self._root)

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything is written that was inserted.

        Parameters
        ----------
        timeout
            Seconds; None for no bound.

        Returns
        -------
        bool
            Whether all was written in that time.
        """
        return self._writer.flush(timeout)

    def statistics(self) -> dict[str, Any]:
        """Return what was read and written since the store was opened.

        Returns
        -------
        dict
            Counts of `hits`, `misses`, `tokens_read`, `bytes_read`, `tokens_written`, `blocks_written`, `bytes_written`,
            `skipped` (insertions) and `errors`; `seconds_reading` and `seconds_writing`; `waiting` insertions with their
            `waiting_bytes` of memory; `coding` of new blocks, and `store`, the sizes of the whole folder.
        """
        waiting, waiting_bytes = self._writer.waiting
        with self._lock:
            counts = {key: self._counts[key] for key in _COUNTS}
            seconds = {f"seconds_{key}": round(self._seconds[key], 6) for key in ("reading", "writing")}
        sizes = {
            key: str(value) if key == "folder" else value for key, value in self._blocks.statistics()._asdict().items()
        }
        queue = {"waiting": waiting, "waiting_bytes": waiting_bytes}
        return {**counts, **seconds, **queue, "coding": self.codings.current.name, "store": sizes}

    def close(self) -> None:
        """Write what waits."""
        self.flush()

    def _plan(self, chain: Chain, most: int) -> Plan | None:
        """Return what to read of the blocks up to `most` tokens, by the index."""
        left = len(chain) - 1  # one token at least is computed, so that there is something to predict from
        kept = left if self._exact else len(chain) - AGAIN_TOKENS
        window, states = self.form.window, self.form.states
        while most > 0:
            path = self._blocks.longest(chain, min(most, left) if states else most, window=window, needs_state=states)
            if not path:
                return None
            last = path[-1]
            for stop in (last.stop,) if states else (min(last.stop, kept), min(last.stop, left)):
                if stop > 0 and (not window or last.rows_from <= max(0, stop - window)):
                    return Plan([block for block in path if block.start < stop], stop)
            most = last.stop - 1
        return None

    def _fetch(self, tokens: Sequence[int] | np.ndarray, began: float) -> Fetched | None:
        """Read the longest beginning that can be read."""
        model, ids = self._model(), _as_ids(tokens)
        if model is None or ids is None:
            return None
        chain, most = Chain(self._root, ids), len(ids)
        seconds = {"index": 0.0, "reading": 0.0, "decoding": 0.0, "filling": 0.0}
        while (plan := timed(seconds, "index", partial(self._plan, chain, most))) is not None:
            try:
                reading = Reading(self._blocks, self.codings, self.form, ids, plan, seconds)
                cache = reading.cache(model)
            except Unusable as bad:
                self._give_up(bad)
                most = bad.block.stop - 1 if bad.state else bad.block.start
                continue
            self._blocks.touch(plan.path[-1].name)
            if self._method is not None:
                cache = timed(seconds, "filling", partial(live_cache, model, self._method, cache))
            seconds["total"] = time.perf_counter() - began
            return Fetched(cache, plan.stop, reading.bytes, seconds)
        return None

    def _give_up(self, bad: Unusable) -> None:
        """Set a damaged file aside, so that it is made anew; one that made room for others meanwhile is forgotten already."""
        if self._blocks.find(bad.block.name) != bad.block:
            return
        where = f"tokens {bad.block.start} to {bad.block.stop}"
        self._failed(f"stored {where} of {self.name or 'a model'} cannot be used: {bad}")
        if bad.damaged:
            self._blocks.quarantine(bad.block.name, str(bad), seen=bad.block, state=bad.state)

    def _write(self, snapshot: Snapshot, ends: dict[int, str], pause: Callable[[], None]) -> None:
        """Write a snapshot, on the writing thread; whatever goes wrong is counted."""
        insertion = Insertion(
            self._blocks, self.form, self.codings, Chain(self._root, snapshot.tokens), snapshot, self.name
        )
        try:
            entered = 0
            for end in sorted(ends):
                entered += insertion.enter(end, ends[end], pause)
            if not entered:
                self._skip(f"a prompt of {snapshot.length} tokens is not stored: the store has no room for it")
        except Stopped:
            raise
        except Exception as error:  # noqa: BLE001  # a full disk, values that are not finite: generation goes on
            self._failed(f"a prompt could not be stored: {error}")
        finally:
            done = insertion.written
            self._count(tokens_written=done.tokens, blocks_written=done.blocks, bytes_written=done.bytes)
            self._spend(writing=done.seconds)

    def _count(self, **changes: int) -> None:
        with self._lock:
            self._counts.update(changes)

    def _spend(self, **seconds: float) -> None:
        with self._lock:
            self._seconds.update(seconds)  # type: ignore[arg-type]  # a Counter adds floats as well

    def _skip(self, reason: str) -> None:
        self._count(skipped=1)
        self._say(reason)

    def _failed(self, reason: str) -> None:
        self._count(errors=1)
        self._say(reason)

    def _say(self, reason: str) -> None:
        """Log a reason, each kind once."""
        kind = "".join(letter for letter in reason if not letter.isdigit())[:80]
        with self._lock:
            known = kind in self._said or len(self._said) >= _MOST_KINDS
            self._said.add(kind)
        log.log(logging.DEBUG if known else logging.WARNING, "%s", reason)


@dataclass
class _Insertion(Job):
    """A snapshot that waits to be written, and where texts end in it."""

    store: PromptStore
    snapshot: Snapshot
    ends: dict[int, str]

    @property
    def nbytes(self) -> int:
        """Bytes that it keeps in memory."""
        return self.snapshot.nbytes

    def merged(self, other: Job) -> Job | None:
        """Return the longer one of two that begin alike, with the ends of both."""
        if not isinstance(other, _Insertion) or other.store is not self.store or not self.store.form.cut_anywhere:
            return None
        first, second = sorted((other, self), key=lambda job: job.snapshot.length)
        if not np.array_equal(first.snapshot.tokens, second.snapshot.tokens[: first.snapshot.length]):
            return None
        second.ends = {**first.ends, **second.ends}
        return second

    def write(self, pause: Callable[[], None]) -> None:
        """Write what is not there yet."""
        self.store._write(self.snapshot, self.ends, pause)

    def dropped(self) -> None:
        """Count that it was not written."""
        self.store._skip("prompts are not stored that came faster than they could be written, or before the end")


def _as_ids(tokens: Sequence[int] | np.ndarray) -> np.ndarray | None:
    """Return tokens as int32; None where they are none, or do not fit."""
    try:
        wide = np.asarray(tokens)
        ids = wide.astype(np.int32)
    except (OverflowError, ValueError, TypeError):
        return None
    return ids if wide.ndim == 1 and len(wide) and np.array_equal(ids, wide) else None

"""A synthetic day replayed on the store's index, without a model: what is found again, written and removed within a bound of bytes.

The store's own index, files, cuts and bound are used; only what a block holds is made up, a number of bytes for each token. Beside it is a
model of what others do: a raw file for each conversation, written anew after each answer, the one used last longest ago removed first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np

from benchmarks.traces import Request
from mlxkv.store.chain import Block, Chain, root_name
from mlxkv.store.codings import FINE_TOKENS, Codings
from mlxkv.store.form import CacheForm
from mlxkv.store.index import BlockStore
from mlxkv.store.insertion import Insertion, Step
from mlxkv.store.snapshot import Snapshot

BYTES = 200  # of each token in the files of a replay; bounds are scaled alike
GEOMETRY = 147_456  # bytes of a token's keys and values at 16 bits: 36 layers of 8 heads of 128, as Qwen3-8B has
LONG = 2_048  # tokens to compute that one waits for
ROOT = root_name("a model", "{}", "38")


class Found(NamedTuple):
    """What a replay found.

    Parameters
    ----------
    hits
        Tokens of each prompt that need not be computed.
    written, stored
        Tokens in all that was written, and in what was there in the end.
    removed
        Blocks, or files, that were written and are gone.
    lookups, blocks
        Seconds of each lookup, and of each block that was written, waiting for the disk included; empty where it is a model.
    """

    hits: list[int]
    written: float
    stored: float
    removed: int
    lookups: list[float]
    blocks: list[float]


def through_store(requests: Sequence[Request], folder: Path, tokens: float) -> Found:
    """Replay a day through a store whose bound is that of so many tokens."""
    hits, lookups, blocks, written = [], [], [], 0
    with BlockStore(folder, int(tokens * BYTES)) as store:
        for request in requests:
            text = np.concatenate([*request.parts, request.answer])
            length = len(text) - len(request.answer)
            start = perf_counter()
            path = store.longest(Chain(ROOT, text[:length]), length)
            lookups.append(perf_counter() - start)
            hits.append(min(path[-1].stop - FINE_TOKENS, length - 1) if path else 0)
            if path:
                store.touch(path[-1].name)
            insertion = _MadeUp.of(store, text)
            instructions = len(request.parts[0]) + len(request.parts[1])
            for end, kind in ((instructions, "system"), (length, "user"), (len(text), "assistant")):
                if end > hits[-1]:
                    insertion.enter(end, kind, lambda: None)
            if insertion.written.blocks:
                blocks += [insertion.written.seconds / insertion.written.blocks] * insertion.written.blocks
            written += insertion.written.blocks
        now = store.statistics()
    return Found(hits, now.written / BYTES, now.stored / BYTES, written - now.blocks, lookups, blocks)


class _MadeUp(Insertion):
    """An insertion whose blocks hold nothing."""

    @classmethod
    def of(cls, store: BlockStore, text: np.ndarray) -> _MadeUp:
        """Return one of a text."""
        codings = SimpleNamespace(current=None, artifacts=lambda _: True)
        form = SimpleNamespace(cut_anywhere=True, states=False, window=0)
        snapshot = SimpleNamespace(length=len(text), rows_from=0, rings={})
        return cls(
            store, cast(CacheForm, form), cast(Codings, codings), Chain(ROOT, text), cast(Snapshot, snapshot), "a model"
        )

    def _encode(self, step: Step, coding: Any, place: int) -> tuple[Block, bytes]:
        names = (self.chain.name(step.stop), self.chain.name(step.start), self.chain.slot(step.stop))
        size = BYTES * (step.stop - step.start)
        return Block(*names, step.start, step.stop, 0, size, "made up", "", "a model"), bytes(size)


class _File(NamedTuple):
    tokens: np.ndarray
    used: int


def through_files(requests: Sequence[Request], tokens: float) -> Found:
    """Replay a day through raw files of conversations, of so many tokens together; one may be cut anywhere when it is read."""
    files: list[_File] = []
    hits, written, removed = [], 0, 0
    for turn, request in enumerate(requests):
        text = np.concatenate([*request.parts, request.answer])
        length = len(text) - len(request.answer)
        shared = [common(file.tokens, text[:length]) for file in files]
        best = max(range(len(files)), key=lambda place: shared[place], default=None)
        hits.append(min(shared[best], length - 1) if best is not None else 0)
        if best is not None and shared[best]:
            files[best] = files[best]._replace(used=turn)
        # A conversation's own file is written anew, longer by this turn.
        files = [file for file, same in zip(files, shared) if same < len(file.tokens)]
        if len(text) <= tokens:
            files.append(_File(text, turn))
            written += len(text)
        while sum(len(file.tokens) for file in files) > tokens:
            files.pop(min(range(len(files)), key=lambda place: files[place].used))
            removed += 1
    return Found(hits, written, sum(len(file.tokens) for file in files), removed, [], [])


def common(a: np.ndarray, b: np.ndarray) -> int:
    """Return how many tokens two texts begin with alike."""
    size = min(len(a), len(b))
    different = a[:size] != b[:size]
    first = int(different.argmax()) if size else 0
    return first if size and different[first] else size


def row(name: str, found: Found, requests: Sequence[Request], gigabytes: float, ratio: float) -> dict[str, Any]:
    """Return a row of a table: what a store of so many gigabytes found, its blocks coded at this ratio, for a model of `GEOMETRY`."""
    size, asked = GEOMETRY / ratio / 1e9, sum(len(part) for request in requests for part in request.parts)
    long = sum(sum(map(len, request.parts)) - hits > LONG for request, hits in zip(requests, found.hits))
    times = {
        f"{what}_{name}": round(1000 * float(np.quantile(seconds, share)), 3)
        for what, seconds in (("lookup", found.lookups), ("block", found.blocks))
        for name, share in (("median_ms", 0.5), ("95_ms", 0.95))
        if seconds
    }
    return {
        "store": name, "limit_gb": gigabytes, "long": long, "hit_share": round(sum(found.hits) / asked, 4),
        "written_gb": round(found.written * size, 2), "stored_gb": round(found.stored * size, 2), "removed": found.removed, **times,
    }  # fmt: skip


def compare(
    requests: Sequence[Request], bounds: Sequence[float], ratios: dict[str, float], work: Path
) -> list[dict[str, Any]]:
    """Replay a day through blocks coded at each ratio, and through raw files, within each bound in gigabytes."""
    rows = []
    for gigabytes in bounds:
        for name, ratio in ratios.items():
            found = through_store(requests, work / f"{name} {gigabytes}", gigabytes * 1e9 * ratio / GEOMETRY)
            rows.append(row(name, found, requests, gigabytes, ratio))
        rows.append(
            row(
                "a raw file a conversation", through_files(requests, gigabytes * 1e9 / GEOMETRY), requests, gigabytes, 1
            )
        )
    return rows

"""An index of a million blocks: how long a store takes to open, to find a prompt of 32K tokens, and to add one.

The rows are made by the store's own statements, many to a transaction and without files: writing a million of those would say more about
the disk. Where the system has a file system in memory the index is there, so that what is timed is the index.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from mlxkv.store import rows
from mlxkv.store.chain import SLOT, Block, Chain, root_name
from mlxkv.store.index import BlockStore
from mlxkv.store.rows import Db

TEXT, SHARED = 64, 8  # blocks of a text, and those of them that all texts begin with
AT_ONCE = 20  # texts in a transaction that makes rows
TRIES = 50
LIMIT = 10**12
ROOT = root_name("a model", "{}", "38")


def measure(blocks: int) -> dict[str, Any]:
    """Make an index of so many blocks and time what a server does with one."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        path = Path(folder) / "store"
        with BlockStore(path, LIMIT) as store:
            texts = -(-(blocks - SHARED) // (TEXT - SHARED))
            start = time.perf_counter()
            for first in range(0, texts, AT_ONCE):
                store._changes.make(partial(add_texts, numbers=range(first, min(first + AT_ONCE, texts))))
            made = time.perf_counter() - start
        opening = [timed(lambda: BlockStore(path, LIMIT).close()) for _ in range(5)]
        known = np.random.default_rng(0).integers(texts, size=TRIES)
        with BlockStore(path, LIMIT) as store:
            count = store.statistics().blocks
            found = [timed(partial(find, store, tokens(int(number)), TEXT)) for number in known]
            missed = [timed(partial(find, store, tokens(texts + place), SHARED)) for place in range(TRIES)]
            added = [timed(partial(add, store, tokens(2 * texts + place)[::-1])) for place in range(TRIES // 2)]
        size = sum(file.stat().st_size for file in path.glob("index.sqlite*"))
    times = {"open": opening, "find": found, "miss": missed, "add": added}
    values = {
        f"{name}_{what}_ms": round(1000 * pick(row), 2) for name, row in times.items() for what, pick in PICKS.items()
    }
    return {
        "blocks": count, "index_bytes": size, "made_seconds": round(made, 1), "tokens": TEXT * SLOT,
        "text_blocks": TEXT,
        "in_memory": memory.is_dir(), **values,
    }  # fmt: skip


PICKS: dict[str, Callable[[list[float]], float]] = {"median": median, "worst": max}


def tokens(number: int) -> np.ndarray:
    """Return a text of 32K tokens; all begin with the same ones."""
    shared = np.random.default_rng(0).integers(2**31 - 1, size=SHARED * SLOT)
    own = np.random.default_rng([1, number]).integers(2**31 - 1, size=(TEXT - SHARED) * SLOT)
    return np.concatenate([shared, own])


def block(chain: Chain, stop: int) -> Block:
    """Return the block of a text that reaches to a multiple of 512."""
    names = chain.name(stop), chain.name(stop - SLOT), chain.slot(stop)
    return Block(*names, stop - SLOT, stop, 0, 1_000_000, "kvtc-rd 38", "0" * 32, "a model")


def add_texts(db: Db, numbers: range) -> None:
    """Add the rows of texts and their entries, in a transaction."""
    for number in numbers:
        chain, parent = Chain(ROOT, tokens(number)), 0
        for stop in range(SLOT, len(chain) + 1, SLOT):
            there = rows.row_named(db, chain.name(stop)) if stop <= SHARED * SLOT else None
            parent = there.id if there else rows.add_block(db, block(chain, stop), parent)
        rows.enter(db, parent, "assistant", 0.0)


def find(store: BlockStore, text: np.ndarray, blocks: int) -> None:
    """Find a text's first blocks, its tokens hashed as well."""
    path = store.longest(Chain(ROOT, text), len(text))
    if len(path) != blocks:
        raise RuntimeError(f"found {len(path)} blocks of {blocks}")


def add(store: BlockStore, text: np.ndarray) -> None:
    """Add all blocks of a text, of a thousand bytes each."""
    chain = Chain(ROOT, text)
    with store.growing() as growth:
        for stop in range(SLOT, len(chain) + 1, SLOT):
            if not growth.put(block(chain, stop), bytes(1_000)):
                raise RuntimeError("the store has no room")


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that something takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start

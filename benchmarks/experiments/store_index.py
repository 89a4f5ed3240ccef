"""The store's index over a synthetic day of an agent: what is found again, written and removed within a bound, and how fast.

Thousands of requests, drawn from a seed by `benchmarks/traces.py`, are replayed on the store's own index, files, cuts and bound; only what
a block holds is made up. Bytes are those of a model with Qwen3-8B's keys and values, of 147 KB a token at 16 bits: of blocks coded at a
twentieth and a quarter of that, of raw blocks, and, modelled, of what others do, a raw file for each conversation that is written
anew after each answer. Then an index of a million blocks is opened, asked and added to. Quick: 8 of 160 sessions, one bound, 5,000 blocks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import million, replayed, traces
from benchmarks.schema import Outcome, Result
from benchmarks.tables import megabytes, percent, table

PHASE = 8
SEED = 0
RATIOS: dict[str, float] = {"blocks at a twentieth": 20, "blocks at a quarter": 4, "raw blocks": 1}
BOUNDS, QUICK_BOUNDS = (20, 64), (1,)  # gigabytes
QUICK_SESSIONS = 8
BLOCKS, QUICK_BLOCKS = 1_000_000, 5_000


def run(quick: bool) -> Outcome:
    requests = traces.day(SEED, QUICK_SESSIONS if quick else traces.SESSIONS)
    bounds = QUICK_BOUNDS if quick else BOUNDS
    with tempfile.TemporaryDirectory() as folder:
        rows = replayed.compare(requests, bounds, RATIOS, Path(folder))
    index = million.measure(QUICK_BLOCKS if quick else BLOCKS)
    config = {"seed": SEED, "bounds_gb": bounds, "ratios": RATIOS, "bytes_a_token": replayed.GEOMETRY}
    return Outcome(config, rows, {"trace": traces.summary(requests), "day": rows, "index": index})


def section(result: Result) -> str:
    """Show the day, and what stores made of it."""
    trace, rows = result["summary"]["trace"], result["summary"]["day"]
    return (
        f"A day of {trace['requests']:,} requests in {trace['sessions']} sessions, {trace['prompt_tokens'] / 1e6:.1f} million tokens of"
        f" prompts, of which {trace['different_tokens'] / 1e6:.1f} million are different ones; at 16 bits those would take"
        f" {trace['different_tokens'] * result['config']['bytes_a_token'] / 1e9:,.0f} GB. Found: tokens of prompts that need not be"
        f" computed. Long: prompts of which more than {replayed.LONG:,} tokens must be. Removed: blocks or files that were written"
        " and had to go. Milliseconds of the index, median and 95 %; those of a block include waiting for the disk.\n\n"
        + table(("store", "bound", "found", "long", "written", "in the end", "removed", "ms a lookup", "ms a block"), map(cells, rows))
        + "\n\n"
        + index_said(result["summary"]["index"])
    )  # fmt: skip


def cells(row: Mapping[str, Any]) -> list[str]:
    """Return a row of the table."""
    times = [
        f"{row[f'{what}_median_ms']:.2f}, {row[f'{what}_95_ms']:.2f}" if f"{what}_median_ms" in row else "-"
        for what in ("lookup", "block")
    ]
    return [
        row["store"], f"{row['limit_gb']:g} GB", percent(row["hit_share"]), f"{row['long']:,}", f"{row['written_gb']:,.1f} GB",
        f"{row['stored_gb']:,.1f} GB", f"{row['removed']:,}", *times,
    ]  # fmt: skip


def index_said(found: Mapping[str, Any]) -> str:
    """Show what a large index takes."""
    what = {
        "open": "open the store and close it", "find": f"find a prompt of {found['tokens']:,} tokens, all stored",
        "miss": "find where one goes another way, early on", "add": f"add {found['text_blocks']} blocks, their files included",
    }  # fmt: skip
    rows = [(said, f"{found[f'{key}_median_ms']:.1f}", f"{found[f'{key}_worst_ms']:.1f}") for key, said in what.items()]
    where = "in memory, so that no time is the disk's" if found["in_memory"] else "on disk"
    return (
        f"An index of {found['blocks']:,} blocks, {megabytes(found['index_bytes'])}, {where}:\n\n"
        + table(("to", "ms, median", "ms, worst"), rows)
    )  # fmt: skip

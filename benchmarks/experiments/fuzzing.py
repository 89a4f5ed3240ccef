"""Forged and damaged files of every format, and what their readers make of them.

Each case is an intact file of a tiny model with one to three edits: of its JSON, its arrays or its bytes, signed again with the
right checksums where a format has them (`damage` leaves the old ones). It goes through the real readers: `inspect`, decoding,
appending, restoring and two tokens. A case counts as silent where other values come back than were written, although
checksums say so; as untyped where anything but an error of mlxkv comes out; and it may take ten seconds and 256 MiB.
Quick: 400 cases.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.schema import Outcome, Result
from benchmarks.tables import megabytes, table

PHASE = 8
FORMATS = ("container", "damage", "artifacts", "npz", "live", "journal", "eval journal", "preset")
FAULTS = ("silent", "untyped", "over_seconds", "over_bytes")
TESTS = Path(__file__).parents[2] / "tests"


def run(quick: bool) -> Outcome:
    cases, seed = (50 if quick else 1250), 1
    with ThreadPoolExecutor(2) as pool:
        samples = list(pool.map(lambda name: campaign(name, cases, seed), FORMATS))
    summary = [{key: value for key, value in sample.items() if key != "recipes"} for sample in samples]
    return Outcome({"cases": cases * len(FORMATS), "seed": seed, "seconds": 10, "bytes": 256 * 2**20}, samples, summary)


def campaign(name: str, cases: int, seed: int) -> dict[str, Any]:
    """Run the cases of one format in a process of its own, since what one has peaked at cannot be taken back."""
    words = [sys.executable, "-m", "fuzz.campaign", name, str(cases), str(seed)]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return {"format": name, **json.loads(done.stdout.splitlines()[-1])}


def section(result: Result) -> str:
    rows = [
        [
            row["format"],
            f"{row['cases']:,}",
            f"{row['read']:,}",
            f"{row['refused']:,}",
            *(str(row[key]) for key in FAULTS),
            f"{row['slowest_seconds']:.1f} s",
            megabytes(row["largest_growth_bytes"]),
        ]
        for row in result["summary"]
    ]
    heads = [
        "format",
        "cases",
        "read",
        "refused",
        "silent",
        "untyped",
        "over 10 s",
        "over 256 MiB",
        "slowest",
        "most memory",
    ]
    total = sum(row["cases"] for row in result["summary"])
    wrong = sum(row[key] for row in result["summary"] for key in FAULTS)
    return f"{total:,} cases, {wrong} of them wrong.\n\n" + table(heads, rows)

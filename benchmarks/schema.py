"""What a benchmark is, and the shared shape of every result file.

A benchmark is a module of this package with PHASE, the number of the plans' phase it belongs to, and

    run(quick) -> Outcome           measures; quick means minutes on two cores
    section(result) -> str          Markdown of the report, from the result file's content alone
    figure(result) -> Figure        a matplotlib figure from the same, for those that have something to draw
    brief(result) -> str            Markdown for the README, for those whose numbers it shows

Its name is the file's, its title the first line of its docstring. `benchmarks.run` finds, runs and writes it;
`benchmarks.report` shows it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlxkv.evaluate.machine import describe
from mlxkv.io.atomic import atomic_write

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
QUICK = RESULTS / "quick"

Result = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """config: what was run. samples: one record for each measurement, nothing left out. summary: what follows from them."""

    config: dict[str, Any]
    samples: list[dict[str, Any]]
    summary: Any


def write_result(name: str, outcome: Outcome, seconds: float, quick: bool = False) -> Path:
    """Write results/<name>.json, or results/quick/<name>.json, and return its path."""
    result = {
        "benchmark": name,
        "quick": quick,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "machine": describe(),
        "config": outcome.config,
        "summary": outcome.summary,
        "samples": outcome.samples,
    }
    path = (QUICK if quick else RESULTS) / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as file:
        file.write(json.dumps(result, indent=1).encode() + b"\n")
    return path


def read_result(name: str) -> Result | None:
    """A benchmark's result: the full one, or else the quick one, or None."""
    for folder in (RESULTS, QUICK):
        if (path := folder / f"{name}.json").exists():
            return json.loads(path.read_text())
    return None

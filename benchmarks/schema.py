"""The shared shape of every result file: what was run, where, on what commit, every sample, and a summary."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlxkv.evaluate.machine import describe
from mlxkv.files import atomic_write

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"


def write_result(name: str, config: dict[str, Any], samples: list[dict[str, Any]], summary: Any) -> Path:
    """Write results/<name>.json and return its path. samples: one record for each measurement, nothing left out."""
    result = {
        "benchmark": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe(),
        "config": config,
        "summary": summary,
        "samples": samples,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    with atomic_write(path) as file:
        file.write(json.dumps(result, indent=1).encode() + b"\n")
    return path

"""What an experiment is, and the shared shape of every result file.

An experiment is a module of `benchmarks.experiments` with PHASE, the number of its chapter in the report, and

    run(quick) -> Outcome           measures; quick means minutes on two cores. Those that decide things take a second
                                    argument, `model`, and write their result on another one beside that on MODEL
    section(result) -> str          Markdown of the report, from the result file's content alone
    figure(result) -> Figure        a matplotlib figure from the same, for those that have something to draw
    brief(result) -> str            Markdown for the README, for those whose numbers it may show

Its name is the file's, its title the first line of its docstring. `benchmarks.run` finds, runs and writes it;
`benchmarks.report` shows it. A result file is a summary; the samples that it was made from lie beside it, in a folder
that git ignores.
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
EXPERIMENTS = FOLDER / "experiments"
RESULTS = FOLDER / "results"
QUICK = RESULTS / "quick"

MODEL = "smollm2-135m"  # the language model of the experiments
HYBRID = "miniature/lfm2"  # half of its layers keep a state instead of tokens
NAMED = {MODEL: "SmolLM2", "gemma3-270m": "Gemma 3 270M", HYBRID: "the hybrid miniature"}  # models in sentences
ENDINGS = {MODEL: "", "gemma3-270m": "_gemma", HYBRID: "_hybrid"}  # of the names of results on them

Result = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What an experiment found.

    Parameters
    ----------
    config
        What was run: model, sizes, seeds.
    samples
        One record for each measurement, nothing left out.
    summary
        What follows from them, and all that `section`, `figure` and `brief` need.
    """

    config: dict[str, Any]
    samples: list[dict[str, Any]]
    summary: Any


def result_name(experiment: str, model: str = MODEL) -> str:
    """Return the name of an experiment's result on a model."""
    return experiment + ENDINGS[model]


def write_result(name: str, outcome: Outcome, seconds: float, quick: bool = False) -> Path:
    """Write results/<name>.json, or results/quick/<name>.json, and its samples in a folder `samples` beside it.

    Parameters
    ----------
    name
        The result's, as `result_name` makes it.
    outcome
        What it found.
    seconds
        How long that took.
    quick
        Whether it ran with quick settings.

    Returns
    -------
    Path
        The result file.
    """
    facts = {
        "benchmark": name,
        "quick": quick,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "machine": describe(),
        "config": outcome.config,
    }
    path = (QUICK if quick else RESULTS) / f"{name}.json"
    samples = path.parent / "samples" / path.name
    samples.parent.mkdir(parents=True, exist_ok=True)
    for target, content in ((samples, {"samples": outcome.samples}), (path, {"summary": outcome.summary})):
        with atomic_write(target) as file:
            file.write(to_json({**facts, **content}).encode())
    return path


def to_json(result: Result) -> str:
    """Return a result as JSON that a diff can be read of: a key a line, and of lists of records a record a line."""
    return _lines(result) + "\n"


def _lines(value: Any, indent: str = "") -> str:
    """Spread dicts over lines down to the lists of records in them; everything else takes one line."""
    if _is_records(value):
        lines = [_lines(item, f"{indent} ") for item in value]
    elif isinstance(value, dict) and (not indent or _has_records(value)):
        lines = [f"{_compact(key)}: {_lines(item, f'{indent} ')}" for key, item in value.items()]
    else:
        return _compact(value)
    first, last = "[]" if isinstance(value, list) else "{}"
    return f"{first}\n{indent} " + f",\n{indent} ".join(lines) + f"\n{indent}{last}"


def _is_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _has_records(value: Any) -> bool:
    return _is_records(value) or (isinstance(value, dict) and any(map(_has_records, value.values())))


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def read_result(name: str, quick: bool = False) -> Result | None:
    """Return an experiment's committed result or, where there is none and `quick` allows it, its quick one, or None."""
    for folder in (RESULTS, QUICK) if quick else (RESULTS,):
        if (path := folder / f"{name}.json").exists():
            return json.loads(path.read_text(encoding="utf-8"))
    return None

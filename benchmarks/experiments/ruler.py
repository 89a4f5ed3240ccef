"""RULER's thirteen tasks: what is left of a small model's answers when its cache is made small.

SmolLM2 answers few of them even from the whole cache at these lengths, so the table shows each task's score from it too.
Quick settings ask two tasks of 400 tokens.
"""

from __future__ import annotations

from benchmarks import evaluations, tables
from benchmarks.schema import Outcome, Result
from mlxkv.evaluate.tasks import ruler

PHASE = 1
PRESETS = ("smartkv-0.3", "h2o-96", "mp-kvm-96")
QUICK = ("smartkv-0.3", "h2o-96")
QUICK_TASKS = ("fwe", "qa_1")
LENGTH, QUICK_LENGTH = 1024, 400


def run(quick: bool) -> Outcome:
    if quick:
        return evaluations.outcome("ruler", QUICK, ruler.RulerOptions(QUICK_TASKS, (QUICK_LENGTH,), samples=1), seeds=1)
    return evaluations.outcome("ruler", PRESETS, ruler.RulerOptions(lengths=(LENGTH,), samples=1), 3, (), (22,))


def brief(result: Result) -> str:
    """Say what a README shows."""
    scores = ", ".join(f"{row['score']:.2f} from `{row['variant']}`" for row in evaluations.rows(result))
    return f"Mean scores of RULER's tasks: {scores}. {evaluations.verdict(result, 'score')}"


def section(result: Result) -> str:
    return "\n\n".join(
        [brief(result), evaluations.table(result, {"score": "score"}), evaluations.note(result), by_task(result)]
    )


def by_task(result: Result) -> str:
    """Return a table of mean scores by task, one column a cache."""
    rows = [row for row in result["summary"] if "group" in row]
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    tasks = list(dict.fromkeys(row["group"] for row in rows))
    scores = {(row["group"], row["variant"]): row["score"] for row in rows}
    heads = ["task", *(f"`{variant}`" for variant in variants)]
    return tables.table(heads, [[task, *(f"{scores[task, variant]:.2f}" for variant in variants)] for task in tasks])

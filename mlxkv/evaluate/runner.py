"""Running an evaluation: every sample asked of every variant, and going on after a stop."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from mlxkv.errors import FormatError, InputError
from mlxkv.evaluate import evaluation
from mlxkv.evaluate.journal import Journal
from mlxkv.evaluate.statistics import summarise
from mlxkv.evaluate.variants import CachedContext, Variant, baseline

Record = dict[str, Any]


@dataclass(frozen=True)
class EvalSample:
    """One sample. key: which one, in every record of it; it has the seed only where the sample depends on it. measure: of a
    model, its tokenizer and variants, a record for each, in order; the first variant is the untouched cache. group: of
    alike samples, such as a task; a limit counts in each."""

    key: Record
    measure: Callable[[Any, Any, Sequence[Variant]], list[Record]]
    group: str = ""


def option(default: Any, text: str) -> Any:
    """A field of Options: its default (`dataclasses.MISSING` for none) and what the command line says about it."""
    return dataclasses.field(default=default, metadata={"help": text})


def draw_samples(
    name: str, tokenizer: Any, options: Any, *, seeds: int = 1, limit: int | None = None
) -> list[EvalSample]:
    """The samples of seeds 0 to `seeds` - 1; of each seed and group at most `limit`, drawn by the seed.

    Raises InputError for a number below 1, and what the evaluation's own `units` raises.
    """
    if seeds < 1 or (limit is not None and limit < 1):
        raise InputError(f"seeds and limit must be 1 or more, not {seeds} and {limit}")
    drawn: dict[str, EvalSample] = {}
    for seed in range(seeds):
        found = evaluation(name).units(tokenizer, options, seed)
        for group in dict.fromkeys(unit.group for unit in found):
            alike = [unit for unit in found if unit.group == group]
            count = len(alike) if limit is None else min(limit, len(alike))
            chosen = sorted(Random(f"{seed} {group}").sample(range(len(alike)), count))
            drawn |= {_sample_name(alike[i].key): alike[i] for i in chosen}
    return list(drawn.values())


def run(
    name: str, model: Any, tokenizer: Any, variants: Sequence[Variant], options: Any = None, *, seeds: int = 1,
    limit: int | None = None, journal: Journal | None = None, progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure every sample with every variant, the untouched cache first; JSON-ready: what was run, summary, samples.

    journal: finished samples are kept there and not measured again. progress is told, each time a variant has taken a
    sample's context, how many have and how many will. Raises InputError for two variants of one name, and what `units` does.
    """
    module = evaluation(name)
    options = options or module.Options()
    ways = [baseline(), *variants]
    if len({way.name for way in ways}) < len(ways):
        raise InputError(f"two variants have one name: {', '.join(way.name for way in ways)}")
    samples = draw_samples(name, tokenizer, options, seeds=seeds, limit=limit)
    settings = {
        "evaluation": name,
        "options": json.loads(json.dumps(dataclasses.asdict(options), default=str)),
        "variants": {way.name: dict(way.settings) for way in ways},
        "seeds": seeds,
        "limit": limit,
    }
    done = journal.begin(settings) if journal else {}
    count, total = 0, len(samples) * len(ways)

    def report_progress(by: int = 1) -> None:
        nonlocal count
        count += by
        if progress:
            progress(min(count, total), total)

    report_progress(len(ways) * sum(_sample_name(unit.key) in done for unit in samples))
    ticking = [dataclasses.replace(way, build=_report_after(way.build, report_progress)) for way in ways]
    records: list[Record] = []
    for unit in samples:
        known = done.get(_sample_name(unit.key))
        if known is not None:
            _check(known, ways, module.SCORES)
        else:
            facts = {**unit.key, **({"group": unit.group} if unit.group else {})}
            known = [{**facts, **record} for record in unit.measure(model, tokenizer, ticking)]
            if journal:
                journal.add(_sample_name(unit.key), known)
        records += known
    return {**settings, "summary": summarise(records, module.SCORES), "samples": records}


def _check(records: list[Record], ways: Sequence[Variant], scores: Sequence[str]) -> None:
    """Raises FormatError for records of a journal that no run of these variants can have written."""
    numbers = all(isinstance(record.get(score), int | float) for record in records for score in scores)
    if [record["variant"] for record in records] != [way.name for way in ways] or not numbers:
        raise FormatError("the file of finished samples is damaged: remove it and run again")


def _sample_name(key: Record) -> str:
    return json.dumps(key, sort_keys=True)


def _report_after(build: Any, tell: Callable[[], None]) -> Any:
    def held(model: Any, tokens: Sequence[int], exact: CachedContext | None = None) -> CachedContext:
        result = build(model, tokens, exact)
        tell()
        return result

    return held


def check_at_least(options: Any, *fields: str, least: float = 1) -> None:
    """Raises InputError for a field of Options, or a number in it, that is below `least`, and for an empty one."""
    for field in fields:
        value = getattr(options, field)
        numbers: Iterable[Any] = value if isinstance(value, tuple) else (value,)
        if not numbers or any(number < least for number in numbers):
            raise InputError(f"{field} must be {least} or more, not {value}")

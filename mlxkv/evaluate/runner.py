"""Run an evaluation: measure every sample with every variant, and go on after a stop."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from mlxkv.config import Config
from mlxkv.errors import FormatError, InputError
from mlxkv.evaluate.evaluation import EvalSample, Evaluation, Record, evaluations
from mlxkv.evaluate.journal import Journal
from mlxkv.evaluate.statistics import summarise
from mlxkv.evaluate.variants import CacheBuilder, CachedContext, Variant, baseline


def run(
    name: str, model: Any, tokenizer: Any, variants: Sequence[Variant], options: Config | None = None, *,
    seeds: int = 1, limit: int | None = None, journal: Journal | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure every sample with every variant, the untouched cache first.

    Parameters
    ----------
    name
        A name in `evaluations`.
    model, tokenizer
        As `mlxkv.lm.load` returns them.
    variants
        Caches to compare with the baseline, which is added as the first.
    options
        The evaluation's own; its defaults where None.
    seeds, limit
        As in `draw_samples`.
    journal
        Keeps finished samples, which are not measured again.
    progress
        Called each time a variant has read a sample's context: with the number of contexts read, and of all to read.

    Returns
    -------
    dict
        JSON values: the settings of the run (`evaluation`, `options`, `variants`, `seeds`, `limit`), `summary`, the
        rows of `statistics.summarise`, and `samples`, all records.

    Raises
    ------
    InputError
        For two variants of one name, an unknown evaluation, and what `draw_samples` refuses.
    FormatError, MismatchError
        For a journal that is damaged or of another run.
    """
    evaluation = _build(name, options)
    all_variants = [baseline(), *variants]
    if len({variant.name for variant in all_variants}) < len(all_variants):
        raise InputError(f"two variants have one name: {', '.join(variant.name for variant in all_variants)}")
    samples = draw_samples(evaluation, tokenizer, seeds=seeds, limit=limit)
    settings = {
        "evaluation": name,
        "options": json.loads(json.dumps(dataclasses.asdict(evaluation.options), default=str)),
        "variants": {variant.name: dict(variant.settings) for variant in all_variants},
        "seeds": seeds,
        "limit": limit,
    }
    done = journal.begin(settings) if journal else {}
    count, total = 0, len(samples) * len(all_variants)

    def report_progress(by: int = 1) -> None:
        nonlocal count
        count += by
        if progress:
            progress(min(count, total), total)

    report_progress(len(all_variants) * sum(_sample_name(sample.key) in done for sample in samples))
    reporting = [
        dataclasses.replace(variant, build=_report_after(variant.build, report_progress)) for variant in all_variants
    ]
    records: list[Record] = []
    for sample in samples:
        known = done.get(_sample_name(sample.key))
        if known is not None:
            _check_records(known, all_variants, evaluation.scores)
        else:
            facts = {**sample.key, **({"group": sample.group} if sample.group else {})}
            known = [{**facts, **record} for record in sample.measure(model, tokenizer, reporting)]
            if journal:
                journal.add(_sample_name(sample.key), known)
        records += known
    return {**settings, "summary": summarise(records, evaluation.scores), "samples": records}


def draw_samples(
    evaluation: Evaluation, tokenizer: Any, *, seeds: int = 1, limit: int | None = None
) -> list[EvalSample]:
    """Return the samples of seeds 0 to `seeds` - 1.

    Parameters
    ----------
    evaluation
        With its options.
    tokenizer
        As `mlxkv.lm.load` returns it.
    seeds
        1 or more.
    limit
        Samples of each seed and group, at most, drawn by the seed; None for all.

    Returns
    -------
    list of EvalSample
        Each sample once, also where it does not depend on the seed.

    Raises
    ------
    InputError
        For a number below 1, and for what the evaluation's own `samples` refuses.
    """
    if seeds < 1 or (limit is not None and limit < 1):
        raise InputError(f"seeds and limit must be 1 or more, not {seeds} and {limit}")
    drawn: dict[str, EvalSample] = {}
    for seed in range(seeds):
        found = evaluation.samples(tokenizer, seed)
        for group in dict.fromkeys(sample.group for sample in found):
            members = [sample for sample in found if sample.group == group]
            count = len(members) if limit is None else min(limit, len(members))
            chosen = sorted(Random(f"{seed} {group}").sample(range(len(members)), count))
            drawn |= {_sample_name(members[i].key): members[i] for i in chosen}
    return list(drawn.values())


def _build(name: str, options: Config | None) -> Evaluation:
    """Return an evaluation with its options."""
    kind = evaluations.get(name)
    return kind(kind.options_class() if options is None else options)


def _check_records(records: list[Record], variants: Sequence[Variant], scores: Sequence[str]) -> None:
    """Raise FormatError for records of a journal that no run of these variants can have written."""
    numbers = all(isinstance(record.get(score), int | float) for record in records for score in scores)
    if [record["variant"] for record in records] != [variant.name for variant in variants] or not numbers:
        raise FormatError("the file of finished samples is damaged: remove it and run again")


def _sample_name(key: Record) -> str:
    """Return a sample's name in the journal."""
    return json.dumps(key, sort_keys=True)


def _report_after(build: CacheBuilder, report_progress: Callable[[], None]) -> CacheBuilder:
    """Return a builder that reports each cache that it has built."""

    def build_and_report(model: Any, tokens: Sequence[int], exact: CachedContext | None = None) -> CachedContext:
        result = build(model, tokens, exact)
        report_progress()
        return result

    return build_and_report

"""Experiments that are one evaluation of a model over a list of methods: run it, and a table of its scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.progress import Progress

from benchmarks import paired, tables
from benchmarks.calibration import codecs
from benchmarks.schema import MODEL, Outcome, Result
from mlxkv import lm
from mlxkv.evaluate.runner import run
from mlxkv.evaluate.variants import codec_variant, live_variant

CALIBRATION = {"texts": 4, "tokens": 1536}
SURE = 0.05


def outcome(
    name: str, presets: Sequence[str], options: Any, seeds: int, ratios: Sequence[int] = (),
    qualities: Sequence[int] = (), model: str = MODEL,
) -> Outcome:  # fmt: skip
    """Run an evaluation of the untouched cache, of live presets, and of kvtc and kvtc-rd.

    Parameters
    ----------
    name
        The evaluation's, as in `mlxkv eval NAME`.
    presets
        Of live methods.
    options
        The evaluation's own.
    seeds
        1 or more.
    ratios, qualities
        Of `kvtc` and `kvtc-rd`, which are calibrated on text of another kind.
    model
        Name of the language model.
    """
    loaded, tokenizer = lm.load(model)
    variants = [live_variant(preset) for preset in presets]
    if ratios or qualities:
        made = codecs(loaded, tokenizer, CALIBRATION, ratios, qualities)
        variants += [codec_variant(codec, label, "float16") for label, codec in made.items()]
    with Progress(transient=True) as progress:
        task = progress.add_task(name, total=None)
        result = run(
            name, loaded, tokenizer, variants, options, seeds=seeds,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )  # fmt: skip
    samples, summary = result.pop("samples"), result.pop("summary")
    return Outcome({"model": model, "calibration": CALIBRATION, **result}, samples, summary)


def rows(result: Result) -> list[dict[str, Any]]:
    """Return the summary's rows of all samples together."""
    return [row for row in result["summary"] if "group" not in row]


def table(result: Result, heads: Mapping[str, str]) -> str:
    """Return a table with a row for each variant: its bytes and scores.

    Parameters
    ----------
    result
        Of an experiment that is one evaluation.
    heads
        The scores to show and their titles. Each stands with its deviation over seeds, the first one also with its
        difference from the untouched cache's.
    """
    found = rows(result)
    first = next(iter(heads))
    corrected = iter(paired.holm([row[f"{first}_p"] for row in found[1:]]))
    lines = []
    for row in found:
        cells = [f"`{row['variant']}`", f"{1 / row['ratio']:.2f}"]
        for score in heads:
            deviation = row.get(f"{score}_deviation")
            cells.append(f"{row[score]:.3g}" if deviation is None else f"{row[score]:.3g} ± {deviation:.2g}")
        if f"{first}_p" in row:
            change, (low, high) = row[f"{first}_change"], row[f"{first}_interval"]
            cells += [f"{change:+.2g} ({tables.interval(low, high)})", f"{next(corrected):.2g}"]
        else:
            cells += ["", ""]
        lines.append(cells)
    return tables.table(["cache", "bytes", *heads.values(), f"{heads[first]}: change", "p"], lines)


def note(result: Result) -> str:
    """Say what the columns of `table` are."""
    count, seeds = rows(result)[0]["samples"], result["config"]["seeds"]
    drawn = (
        f"{count} samples of {seeds} seeds, ± the deviation of their means"
        if seeds > 1
        else f"{count} samples of one seed"
    )
    return (
        f"Bytes are shares of float16's (on a CPU `whole` holds float32 in steps of 256 tokens, and live caches pack their newest tokens late); {drawn}."
        " Change: against `whole` on the same samples, 95 % bootstrap interval, p by flipping signs, corrected for the number of rows (Holm)."
    )


def verdict(result: Result, score: str) -> str:
    """Say which variants are worse than the untouched cache beyond chance, p below 0.05 after correction."""
    first, *found = rows(result)
    least = len(found) * 2 ** (1 - first["samples"])
    if least >= SURE:
        worst = min(found, key=lambda row: row[f"{score}_change"])
        seen = f"the worst is `{worst['variant']}`" if worst[f"{score}_change"] < 0 else "none was seen"
        return f"{first['samples']} samples are too few to be sure of a difference (p cannot be below {min(1, least):.2g}); {seen}."
    ps = paired.holm([row[f"{score}_p"] for row in found])
    sure = {row["variant"]: row[f"{score}_change"] for row, p in zip(found, ps) if p < SURE}
    worse, better = ([name for name, change in sure.items() if sign * change > 0] for sign in (-1, 1))
    others = [row["variant"] for row in found if row["variant"] not in sure]
    gains = f" Better: {_listed(better)}." if better else ""
    return (
        f"Worse than the untouched cache beyond chance: {_listed(worse)}.{gains} No sure difference: {_listed(others)}."
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"

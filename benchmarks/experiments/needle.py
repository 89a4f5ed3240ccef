"""Needle in a haystack: a pass key in an essay, at several lengths and depths, and which caches can still quote it.

The model holds the essay in a cache, is asked for the key afterwards, and is given the key digit by digit: how many digits
it puts first, and how probable they are to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import evaluations
from benchmarks.schema import MODEL, Outcome, Result
from mlxkv.evaluate.tasks.needle import NeedleOptions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PHASE = 1
PRESETS = (
    "int8",
    "int4",
    "kivi-2",
    "smartkv-0.3",
    "klt-0.15",
    "h2o-256",
    "h2o-96",
    "mp-kvm-96",
    "streaming-llm-96",
    "sketch-topk-256",
)
QUICK = ("smartkv-0.3", "h2o-96", "mp-kvm-96")
ON_OTHERS = tuple(preset for preset in PRESETS if preset not in ("h2o-256", "sketch-topk-256"))
MOST_COLUMNS = 7
HEADS = {"digits_first": "digits first", "found": "whole key", "log_probability": "log-probability of a digit"}


def run(quick: bool, model: str = MODEL) -> Outcome:
    """On another model: fewer presets, two seeds in place of three."""
    if quick:
        options = NeedleOptions(lengths=(160, 320), depths=(0.2, 0.8))
        found = evaluations.outcome("needle", QUICK, options, seeds=1, model=model)
    else:
        options = NeedleOptions(lengths=(256, 512, 1024), depths=(0.1, 0.5, 0.9))
        presets, seeds = (PRESETS, 3) if model == MODEL else (ON_OTHERS, 2)
        found = evaluations.outcome("needle", presets, options, seeds, (16,), (22, 35), model)
    return replace(found, summary=[*found.summary, *by_place(found.samples)])


def by_place(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of a summary with each variant's mean for each length and depth."""
    rows = []
    for length, depth, variant in dict.fromkeys((s["length"], s["depth"], s["variant"]) for s in samples):
        alike = [s for s in samples if (s["length"], s["depth"], s["variant"]) == (length, depth, variant)]
        place = {"group": f"{length} tokens, {100 * depth:.0f} %", "samples": len(alike), "length": length}
        mean = float(np.mean([s["digits_first"] for s in alike]))
        rows.append({"variant": variant, **place, "depth": depth, "digits_first": mean})
    return rows


def brief(result: Result) -> str:
    """Say what a README shows beside the figure."""
    return f"{smallest(result)} {evaluations.verdict(result, 'digits_first')}"


def smallest(result: Result) -> str:
    """Say which live cache and which file have the fewest bytes of those that put every digit first."""
    sharp = [row for row in evaluations.rows(result)[1:] if row["digits_first"] == 1]
    said = []
    for kind in ("live caches", "files"):
        alike = [row for row in sharp if row["variant"].startswith("kvtc") == (kind == "files")]
        if alike:
            least = max(alike, key=lambda row: row["ratio"])
            said.append(f"of {kind} `{least['variant']}` in {1 / least['ratio']:.2f} of float16's bytes")
    return f"Smallest that puts every digit of every key first: {'; '.join(said) or 'none'}."


def section(result: Result) -> str:
    return "\n\n".join([brief(result), evaluations.table(result, HEADS), evaluations.note(result)])


def figure(result: Result) -> Figure:
    """Draw a heatmap for each cache: rows are depths, columns lengths, colour the share of digits put first."""
    from matplotlib.colors import LinearSegmentedColormap

    from benchmarks import figures

    rows = [row for row in result["summary"] if "depth" in row]
    found = {(row["variant"], row["length"], row["depth"]): row["digits_first"] for row in rows}
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    lengths, depths = result["config"]["options"]["lengths"], result["config"]["options"]["depths"]
    lines = -(-len(variants) // MOST_COLUMNS)
    columns = -(-len(variants) // lines)
    made, panes = figures.panes(
        columns, lines, 1.0 + 0.5 * len(lengths), 0.8 + 0.5 * len(depths), sharex=True, sharey=True
    )
    colors = LinearSegmentedColormap.from_list("recall", figures.RECALL)
    for axes in panes.flat[len(variants) :]:
        axes.set_axis_off()
    for axes in panes.flat[len(variants) - columns : len(variants)]:
        axes.tick_params(labelbottom=True)  # the last of each column, with nothing or an empty place below
    for axes, variant in zip(panes.flat, variants):
        means = np.array([[found[variant, length, depth] for length in lengths] for depth in depths])
        image = axes.imshow(means, cmap=colors, vmin=0, vmax=1, aspect="auto")
        for (i, j), value in np.ndenumerate(means):
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=8)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
        axes.set_title(variant, fontsize=8)
        axes.grid(False)
    made.supxlabel("tokens", fontsize=8)
    made.supylabel("depth of the key", fontsize=8)
    made.colorbar(image, ax=panes, label="digits put first")
    return made

"""Needle in a haystack: a pass key in an essay, at several lengths and depths, and which caches can still quote it.

SmolLM2 holds the essay in a cache, is asked for the key afterwards, and is given the key digit by digit: how many digits
it puts first, and how probable they are to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import evaluated
from benchmarks.schema import Outcome, Result
from mlxkv.evaluate.tasks import needle

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PHASE = 1
PRESETS = (
    "int8",
    "int4",
    "kivi-2",
    "smartkv-0.3",
    "h2o-256",
    "h2o-96",
    "mp-kvm-96",
    "streaming-llm-96",
    "sketch-topk-256",
)
QUICK = ("smartkv-0.3", "h2o-96", "mp-kvm-96")
MOST_COLUMNS = 7
HEADS = {"digits_first": "digits first", "found": "whole key", "log_probability": "log-probability of a digit"}


def run(quick: bool) -> Outcome:
    if quick:
        return evaluated.outcome("needle", QUICK, needle.NeedleOptions((160, 320), (0.2, 0.8)), seeds=1)
    return evaluated.outcome(
        "needle", PRESETS, needle.NeedleOptions((256, 512, 1024), (0.1, 0.5, 0.9)), 3, (16,), (22, 35)
    )


def brief(result: Result) -> str:
    """What the README shows beside the figure."""
    return f"{smallest(result)} {evaluated.verdict(result, 'digits_first')}"


def smallest(result: Result) -> str:
    """Which live cache and which file have the fewest bytes of those that put every digit first."""
    sharp = [row for row in evaluated.rows(result)[1:] if row["digits_first"] == 1]
    said = []
    for kind in ("live caches", "files"):
        alike = [row for row in sharp if row["variant"].startswith("kvtc") == (kind == "files")]
        if alike:
            least = max(alike, key=lambda row: row["ratio"])
            said.append(f"of {kind} `{least['variant']}` in {1 / least['ratio']:.2f} of float16's bytes")
    return f"Smallest that puts every digit of every key first: {'; '.join(said) or 'none'}."


def section(result: Result) -> str:
    return "\n\n".join([brief(result), evaluated.table(result, HEADS), evaluated.note(result)])


def figure(result: Result) -> Figure:
    """A heatmap for each cache: rows are depths, columns lengths, colour the share of digits put first."""
    from matplotlib.colors import LinearSegmentedColormap

    from benchmarks import figures

    samples = result["samples"]
    variants = list(dict.fromkeys(sample["variant"] for sample in samples))
    lengths, depths = result["config"]["options"]["lengths"], result["config"]["options"]["depths"]
    rows = -(-len(variants) // MOST_COLUMNS)
    columns = -(-len(variants) // rows)
    made, panes = figures.panes(
        columns, rows, 1.0 + 0.5 * len(lengths), 0.8 + 0.5 * len(depths), sharex=True, sharey=True
    )
    colors = LinearSegmentedColormap.from_list("recall", figures.RECALL)
    for axes in panes.flat[len(variants) :]:
        axes.set_axis_off()
    for axes in panes.flat[len(variants) - columns : len(variants)]:
        axes.tick_params(labelbottom=True)  # the last of each column, with nothing or an empty place below
    for axes, variant in zip(panes.flat, variants):
        means = np.array([[_mean(samples, variant, length, depth) for length in lengths] for depth in depths])
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


def _mean(samples: list[dict[str, Any]], variant: str, length: int, depth: float) -> float:
    alike = [s for s in samples if (s["variant"], s["length"], s["depth"]) == (variant, length, depth)]
    return float(np.mean([s["digits_first"] for s in alike]))

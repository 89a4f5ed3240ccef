"""Quality against bytes, the first figure of the report: every way to hold SmolLM2's context that `live_methods` measured.

A way is on the front when no other of its kind holds the context in as few bytes with as small a KL.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.schema import MODEL, Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALLER = 0.97  # of float16's bytes: what holds more is a yardstick, not a way to save
KINDS = {
    "live caches": "-",
    "files": ":",
}  # files are restored to full size to be used, so they have a front of their own


def ways(result: Result) -> list[dict[str, Any]]:
    """Return the rows of SmolLM2 that save bytes, smallest first."""
    rows = [row for row in result["summary"]["fidelity"] if row["model"] == MODEL and row["share_of_fp16"] < SMALLER]
    return sorted(rows, key=lambda row: (row["share_of_fp16"], row["kl_geometric"]))


def of_kind(rows: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["method"].startswith("kvtc") == (kind == "files")]


def front(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return those of some rows, smallest first, that no other beats in both."""
    least = np.minimum.accumulate([np.inf, *(row["kl_geometric"] for row in rows)])
    return [row for row, before in zip(rows, least) if row["kl_geometric"] < before]


def section(result: Result) -> str:
    rows = ways(result)
    said = []
    for kind in KINDS:
        alike = of_kind(rows, kind)
        names = ", ".join(f"`{row['variant']}` ({row['share_of_fp16']:.2f})" for row in front(alike))
        if alike:
            said.append(f"Of {len(alike)} {kind}: {names}.")
    return (
        "Ways to hold SmolLM2's context in fewer bytes than float16 does that are on the front, no other of their kind having"
        f" as few bytes and as small a KL, with their share of float16's bytes. {' '.join(said)}"
    )


def figure(result: Result) -> Figure:
    from benchmarks import figures

    rows = ways(result)
    figure, panes = figures.panes(width=8, height=5)
    axes = panes[0, 0]
    for kind, line in KINDS.items():
        best = front(of_kind(rows, kind))
        x, y = ([row[key] for row in best] for key in ("share_of_fp16", "kl_geometric"))
        axes.step(x, y, line, where="post", color="#B0B0B0", lw=3, zorder=1, label=f"front of {kind}" if best else None)
        for place, row in zip(zip(x, y), best):  # below the front is nothing that a name could cover
            axes.annotate(row["variant"], place, (-5, -9), textcoords="offset points", ha="right", fontsize=7)
    for method in sorted({row["method"] for row in rows}):
        x, y = ([row[key] for row in rows if row["method"] == method] for key in ("share_of_fp16", "kl_geometric"))
        axes.plot(x, y, ls="", ms=6, label=figures.named(method), **figures.look(method))
    left = 0.6 * rows[0]["share_of_fp16"]  # room for the first name
    axes.set(xscale="log", yscale="log", xlim=(left, 1), xlabel="bytes, of float16's", ylabel="KL to the full cache (nats per token)")  # fmt: skip
    axes.set_xticks(ticks := [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0], [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    figure.legend(loc="outside right upper")
    return figure

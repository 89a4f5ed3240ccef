"""Quality against bytes, the first figure of the report: every way to hold SmolLM2's context that `live_methods` measured.

A way is on the front when no other holds the context in as few bytes with as small a KL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.held_out import MODEL
from benchmarks.schema import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALLER = 0.97  # of float16's bytes: what holds more is a yardstick, not a way to save


def front(result: Result) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of SmolLM2 that save bytes, smallest first, and those of them on the front."""
    rows = [row for row in result["summary"]["fidelity"] if row["model"] == MODEL and row["share_of_fp16"] < SMALLER]
    rows.sort(key=lambda row: (row["share_of_fp16"], row["kl_geometric"]))
    least = np.minimum.accumulate([np.inf, *(row["kl_geometric"] for row in rows)])
    return rows, [row for row, before in zip(rows, least) if row["kl_geometric"] < before]


def section(result: Result) -> str:
    rows, best = front(result)
    names = ", ".join(f"`{row['variant']}` ({row['share_of_fp16']:.2f})" for row in best)
    return (
        f"Of {len(rows)} ways to hold SmolLM2's context in fewer bytes than float16 does, {len(best)} are on the front:"
        f" no other has as few bytes and as small a KL. With their share of float16's bytes: {names}."
    )


def figure(result: Result) -> Figure:
    from benchmarks import figures

    rows, best = front(result)
    figure, panes = figures.panes(width=8, height=5)
    axes = panes[0, 0]
    x, y = ([row[key] for row in best] for key in ("share_of_fp16", "kl_geometric"))
    axes.step(x, y, where="post", color="#B0B0B0", lw=4, zorder=1, label="front")
    for method in sorted({row["method"] for row in rows}):
        x, y = ([row[key] for row in rows if row["method"] == method] for key in ("share_of_fp16", "kl_geometric"))
        axes.plot(x, y, ls="", ms=6, label=figures.named(method), **figures.look(method))
    for row in best:  # below the front is nothing that a name could cover
        place = row["share_of_fp16"], row["kl_geometric"]
        axes.annotate(row["variant"], place, (-5, -9), textcoords="offset points", ha="right", fontsize=7)
    left = 0.7 * rows[0]["share_of_fp16"]  # room for the first name
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(left, 1),
        xlabel="bytes, of float16's",
        ylabel="KL to the full cache (nats a token)",
    )
    axes.set_xticks(ticks := [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0], [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    figure.legend(loc="outside right upper")
    return figure

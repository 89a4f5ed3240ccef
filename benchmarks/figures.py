"""What all figures share: colours and markers that the colour-blind tell apart, and print keeps apart by shape.

Figures are drawn for paper as much as for a screen: white ground, no text below 7 points.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

# Okabe and Ito's, https://jfly.uni-koeln.de/color/, without the yellow that is pale on white, and three of Tol's.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#332288", "#999933", "#8C8C8C")
MARKERS = "os^Dv<>PX*"
STYLES = ("-", "--", "-.", ":")
BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK, INDIGO, OLIVE, GRAY = COLORS
# The same for a method in every figure; those of one family share a colour.
LOOKS = {
    "full": (BLACK, "o"), "whole": (BLACK, "o"),
    "kvtc": (ORANGE, "s"), "kvtc-weighted": (SKY, "v"), "kvtc-rd": (BLUE, "*"),
    "smartkv": (RED, "o"), "mp-kvm": (GREEN, "^"), "kivi": (PINK, "D"),
    "uniform": (GRAY, "P"), "int": (GRAY, "P"), "mx.quantize": (GRAY, "P"),
    "h2o": (INDIGO, "X"), "streaming-llm": (OLIVE, "<"), "sliding-window": (OLIVE, ">"), "random": (BLACK, "x"),
    "sketch-topk": (SKY, "p"), "sketch-aggregate": (ORANGE, "h"),
    "klt": (BLUE, "o"), "turbo": (GREEN, "v"),
    "": (GRAY, "."),  # any other
}  # fmt: skip
RECALL = ("#F0496E", "#EBB839", "#0CD79F")  # of needle heatmaps, from 0 to 1

mpl.rcParams.update(
    {"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True, "legend.frameon": False}
)


def panes(
    columns: int = 1, rows: int = 1, width: float = 4.6, height: float = 3.6, **options: Any
) -> tuple[Figure, Any]:
    """Return a figure of rows x columns axes, each about width x height inches; axes as an array `[rows, columns]`."""
    return plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), layout="constrained", squeeze=False, **options
    )


def look(name: str) -> dict[str, str]:
    """Return colour and marker of the method that a preset or variant is named after, as options of matplotlib's plots."""
    color, marker = LOOKS[max((method for method in LOOKS if name.startswith(method)), key=len)]
    return {"color": color, "marker": marker}


def named(method: str) -> str:
    """Return a method's name in a legend, where files stand beside live caches."""
    return f"{method} (files)" if method.startswith("kvtc") else method


def save(figure: Figure, path: Path) -> None:
    """Write a PNG that depends on nothing but the figure."""
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)

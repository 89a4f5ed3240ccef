"""Comparing methods text by text: curves read at equal bytes, and how sure a mean difference is.

KL spans orders of magnitude, so differences are those of its logarithm: a mean of -0.69 says half the KL.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlxkv.evaluate.statistics import bootstrap_interval, sign_flip_test

Curve = Sequence[tuple[float, float]]
LEAST_KL = 1e-9  # below, rounding decides, even about the sign


def at_bytes(size: float, curve: Sequence[tuple[float, float]]) -> float:
    """Return the KL of a curve of (bytes, KL) at `size` bytes, linear between its points in the logarithms of both.

    Outside of the curve its first or last point counts: below, that is one with more bytes than it is compared with.
    """
    sizes, kls = np.log(np.maximum(sorted(curve), LEAST_KL)).T
    return float(np.exp(np.interp(np.log(size), sizes, kls)))


def within_bytes(size: float, curve: Sequence[tuple[float, float]]) -> float:
    """Return the KL of the largest point of a curve of (bytes, KL) that `size` bytes can hold, or of its first."""
    points = sorted(curve)
    return [points[0], *(point for point in points if point[0] <= size)][-1][1]


def compare(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Compare KL on the same texts: the geometric mean of ours over theirs, its 95 % interval over texts, and p by sign flips."""
    logs = np.log(np.maximum(np.array([ours, theirs]), LEAST_KL))
    differences = logs[0] - logs[1]
    return {
        "texts": len(differences),
        "kl_ratio": float(np.exp(differences.mean())),
        "kl_ratio_interval": np.exp(bootstrap_interval(differences)).tolist(),
        "better_on": int((differences < 0).sum()),
        "p": sign_flip_test(differences),
    }


def holm(found: Sequence[float | None]) -> list[float]:
    """Return p of several comparisons made at once, corrected as Holm does (https://www.jstor.org/stable/4615733).

    A p that too few samples leave open, None, counts as 1.
    """
    ps = [1.0 if p is None else p for p in found]
    order = np.argsort(ps)
    steps = np.maximum.accumulate(np.array(ps)[order] * np.arange(len(ps), 0, -1))
    corrected = np.empty(len(ps))
    corrected[order] = np.minimum(steps, 1)
    return corrected.tolist()


def bd_rate(ours: Curve, theirs: Curve, least: float, most: float) -> float | None:
    """Return the Bjontegaard rate: the mean difference of bytes at equal KL, -0.5 for half of them, over the KL from `least` to
    `most` that both curves of (bytes, KL) reach; piecewise linear in both logarithms. None where they share nothing."""
    low, high = (limit(max(point[1] for point in curve) if limit is min else min(point[1] for point in curve)
                       for curve in (ours, theirs)) for limit in (max, min))  # fmt: skip
    low, high = max(low, least), min(high, most)
    if low >= high:
        return None
    grid = np.linspace(np.log(low), np.log(high), 200)
    logs = []
    for curve in (ours, theirs):
        size, kl = np.log(sorted(curve, key=lambda point: point[1])).T
        logs.append(np.interp(grid, kl, size))
    return float(np.expm1(np.mean(logs[0] - logs[1])))

"""From records to a table: means of scores, how much they differ from the untouched cache's, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 10_000
MOST_FLIPS = 16  # samples up to which all sign flips are tried; above, RESAMPLES of them


def summarise(records: Sequence[dict[str, Any]], scores: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each variant, and where records have groups one for each of those too, after the one of all.

    A score's `_deviation` is that of the means of seeds, where there are several. For all but the first variant, which has
    the same samples: `_change` is the mean difference from it, `_interval` its 95 % bootstrap interval over samples, and
    `_p` as `sign_flip` says. With groups, all of them count alike in the row of all.
    """
    variants = list(dict.fromkeys(record["variant"] for record in records))
    groups = list(dict.fromkeys(record.get("group", "") for record in records))
    rows = []
    for group in [None, *groups] if len(groups) > 1 else [None]:
        chosen = [record for record in records if group in (None, record.get("group", ""))]
        by = {variant: [record for record in chosen if record["variant"] == variant] for variant in variants}
        for variant in variants:
            rows.append(_row(variant, by[variant], by[variants[0]], group, scores))
    return rows


def _row(variant: str, ours: list[Any], first: list[Any], group: str | None, scores: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"variant": variant, **({} if group is None else {"group": group}), "samples": len(ours)}
    if "ratio" in ours[0]:
        row["ratio"] = float(np.mean([record["ratio"] for record in ours]))
    weights = _weights([record.get("group", "") for record in ours])
    for score in scores:
        values = np.array([record[score] for record in ours], float)
        row[score] = float(np.mean(values * weights))
        seeds = np.array([record.get("seed", 0) for record in ours])
        means = [np.average(values[seeds == seed], weights=weights[seeds == seed]) for seed in np.unique(seeds)]
        if len(means) > 1:
            row[f"{score}_deviation"] = float(np.std(means, ddof=1))
        if variant != first[0]["variant"]:
            differences = (values - np.array([record[score] for record in first], float)) * weights
            row[f"{score}_change"] = float(differences.mean())
            row[f"{score}_interval"] = bootstrap_interval(differences)
            row[f"{score}_p"] = sign_flip_test(differences)
    return row


def _weights(groups: Sequence[str]) -> np.ndarray:
    """Of each sample, so that the mean over samples is the mean over groups of their means."""
    _, which, counts = np.unique(groups, return_inverse=True, return_counts=True)
    return len(groups) / (len(counts) * counts[which])


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> list[float]:
    """95 % bootstrap interval of the mean of values `[n]`."""
    draws = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    return np.quantile(values[draws].mean(axis=1), (0.025, 0.975)).tolist()


def sign_flip_test(differences: np.ndarray, seed: int = 0) -> float:
    """Two-sided p of the mean of paired differences `[n]`: the share of flips of their signs that lie as far from 0.

    Of all 2^n flips, or with more than MOST_FLIPS differences of RESAMPLES drawn ones, the one that was found among them.
    """
    n = len(differences)
    if n <= MOST_FLIPS:
        signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
    else:
        signs = np.random.default_rng(seed).choice([-1, 1], (RESAMPLES, n))
        signs[0] = 1
    return float((np.abs(signs @ differences) >= np.abs(differences.sum()) * (1 - 1e-9)).mean())

"""Tables from records: means of scores, their differences from the untouched cache's, and how certain those are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 10_000
SIGNIFICANT = 0.05  # p-values that cannot come down to this are not given
MAX_EXACT_SAMPLES = 16  # samples up to which all sign flips are tried; above, RESAMPLES of them


def summarise(records: Sequence[dict[str, Any]], scores: Sequence[str]) -> list[dict[str, Any]]:
    """Summarise records in a row for each variant, and where records have groups also in one for each group.

    Parameters
    ----------
    records
        Records with `variant`, the scores, and optionally `group`, `seed` and `ratio`. Every variant has the same
        samples in the same order; the first variant is what the others are compared with.
    scores
        Keys of numbers in every record.

    Returns
    -------
    list of dict
        Rows with `variant`, `group` (but for all samples together, which come first), `samples` and their number, mean
        `ratio`, and for each score its mean, in which all groups have the same weight, and

        - `<score>_deviation`, the standard deviation of the means of seeds, where there are several;
        - `<score>_change`, the mean difference from the first variant, `<score>_interval`, its 95 % bootstrap interval
          over samples, and `<score>_p`, as `sign_flip_test` returns it, or None where no differences of so few samples
          could bring it down to 0.05; not for the first variant.

    Examples
    --------
    >>> records = [{"variant": name, "kl": kl} for name, kl in (("whole", 0.0), ("int8", 0.25))]
    >>> [(row["variant"], row["kl"]) for row in summarise(records, ["kl"])]
    [('whole', 0.0), ('int8', 0.25)]
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


def _row(
    variant: str, records: list[Any], baseline: list[Any], group: str | None, scores: Sequence[str]
) -> dict[str, Any]:
    """Return the row of one variant's records, beside those of the first variant."""
    row: dict[str, Any] = {"variant": variant, **({} if group is None else {"group": group}), "samples": len(records)}
    if "ratio" in records[0]:
        row["ratio"] = float(np.mean([record["ratio"] for record in records]))
    weights = _weights([record.get("group", "") for record in records])
    for score in scores:
        values = np.array([record[score] for record in records], float)
        row[score] = float(np.mean(values * weights))
        seeds = np.array([record.get("seed", 0) for record in records])
        means = [np.average(values[seeds == seed], weights=weights[seeds == seed]) for seed in np.unique(seeds)]
        if len(means) > 1:
            row[f"{score}_deviation"] = float(np.std(means, ddof=1))
        if variant != baseline[0]["variant"]:
            differences = (values - np.array([record[score] for record in baseline], float)) * weights
            row[f"{score}_change"] = float(differences.mean())
            row[f"{score}_interval"] = bootstrap_interval(differences)
            row[f"{score}_p"] = sign_flip_test(differences) if smallest_p(len(differences)) <= SIGNIFICANT else None
    return row


def _weights(groups: Sequence[str]) -> np.ndarray:
    """Return weights of samples that make their mean the mean over groups of the groups' means."""
    _, which, counts = np.unique(groups, return_inverse=True, return_counts=True)
    return len(groups) / (len(counts) * counts[which])


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> list[float]:
    """Return the 95 % percentile bootstrap interval of a mean.

    Parameters
    ----------
    values
        Samples `[n]`, of which 10,000 resamples are drawn.
    seed
        Of the resamples.

    Returns
    -------
    list of float
        Lower and upper bound.

    Examples
    --------
    >>> bootstrap_interval(np.array([2.0, 2.0, 2.0]))
    [2.0, 2.0]
    """
    draws = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    return np.quantile(values[draws].mean(axis=1), (0.025, 0.975)).tolist()


def smallest_p(samples: int) -> float:
    """Return the smallest p that `sign_flip_test` can give.

    Parameters
    ----------
    samples
        Number of differences; 1 or more.

    Returns
    -------
    float
        Above 0 to 1.

    Examples
    --------
    >>> smallest_p(3), smallest_p(6)
    (0.25, 0.03125)
    """
    return 2.0 ** (1 - min(samples, 1000))


def sign_flip_test(differences: np.ndarray, seed: int = 0) -> float:
    """Return the two-sided p of the mean of paired differences, from flips of their signs.

    Parameters
    ----------
    differences
        Paired differences `[n]`.
    seed
        Of the flips that are drawn where there are too many for all.

    Returns
    -------
    float
        The share of flips whose mean is as far from 0 or farther, above 0 to 1.

    Notes
    -----
    All 2^n flips up to 16 differences; above, 10,000 drawn ones, with the signs that were found among them. No normal
    distribution is assumed; of n differences no p can be below 2^(1 - n).

    Examples
    --------
    >>> sign_flip_test(np.array([-1.0, -2.0, -3.0, -4.0]))
    0.125
    """
    n = len(differences)
    if n <= MAX_EXACT_SAMPLES:
        signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
    else:
        signs = np.random.default_rng(seed).choice([-1, 1], (RESAMPLES, n))
        signs[0] = 1
    return float((np.abs(signs @ differences) >= np.abs(differences.sum()) * (1 - 1e-9)).mean())

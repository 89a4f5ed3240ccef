"""Measured costs of caches in predictions: `measured.json`, which benchmarks/planned.py writes from results."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple


class Measurement(NamedTuple):
    """Distance that predictions moved with one kind of cache.

    Parameters
    ----------
    cache
        A preset, an option of mlx-lm's or a kind of file.
    model
        The model that was measured.
    tokens
        Length of the texts that were in the cache.
    texts
        How many they were.
    kl
        Kullback-Leibler divergence of the next token's distribution, nats per token.
    share
        Bytes, as a share of those in float16.
    result
        The file in benchmarks/results.
    setting
        What the cache was measured at, where it can be set.
    windows
        Whether most layers of that model have a sliding window.
    """

    cache: str
    model: str
    tokens: int
    texts: int
    kl: float
    share: float
    result: str
    setting: str
    windows: bool


@cache
def measurements() -> tuple[Measurement, ...]:
    """Return all measurements that ship along.

    Returns
    -------
    tuple of Measurement
        Sorted by cache and model.
    """
    text = Path(__file__).with_name("measured.json").read_text(encoding="utf-8")
    return tuple(Measurement(**record) for record in json.loads(text))


def measured(name: str, windows: bool) -> Measurement | None:
    """Return the measurement of a cache on the model that is more like another one.

    Parameters
    ----------
    name
        As `Measurement.cache`.
    windows
        Whether the other model has layers with a sliding window.

    Returns
    -------
    Measurement or None
        None where there is none.
    """
    found = [each for each in measurements() if each.cache == name]
    return min(found, key=lambda each: each.windows != windows, default=None)

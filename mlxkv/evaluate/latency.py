"""How fast? Seconds of prefill and of every decoded token, all variants in turn on the same tokens.

Rounds alternate between variants, so a machine that slows down slows all of them: relative speeds are those within a
round. Where a method works only now and then (packing a block, allocating anew), some tokens take longer than the median.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np

from mlxkv import lm
from mlxkv.errors import InputError
from mlxkv.evaluate.variants import Variant

SLOWEST = 0.95  # the quantile that stands for tokens with extra work


def evaluate(
    model: Any, variants: Sequence[Variant], tokens: Sequence[int], context: int, *, rounds: int = 3,
    progress: lm.Progress | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """A record for each variant, the first being what the others are compared with.

    Each holds `context` tokens; the rest of `tokens` is decoded in `rounds` equal parts, one token at a time. progress is
    told of each variant's prefill and rounds. Raises InputError for too few tokens.
    """
    each = (len(tokens) - context) // rounds
    if context < 1 or each < 1:
        raise InputError(f"{len(tokens)} tokens are too few for a context of {context} and {rounds} rounds")
    caches, prefill = {}, {}
    for variant in variants:
        start = time.perf_counter()
        caches[variant.name] = variant.hold(model, tokens[:context])
        prefill[variant.name] = time.perf_counter() - start
        if progress:
            progress(1)
    seconds: dict[str, list[list[float]]] = {variant.name: [] for variant in variants}
    for i in range(rounds):
        part = tokens[context + i * each : context + (i + 1) * each]
        for name, cache in caches.items():
            seconds[name].append([_decode(model, cache, token) for token in part])
            if progress:
                progress(1)
    first = variants[0].name
    return [
        {
            "variant": name,
            "context": context,
            "prefill_seconds": prefill[name],
            "prefill_relative": prefill[first] / prefill[name],
            "token_seconds": float(np.median(times)),
            "slowest_token_seconds": float(np.quantile(times, SLOWEST)),
            "decode_relative": median(sum(a) / sum(b) for a, b in zip(seconds[first], times)),
            "seconds": times,
        }
        for name, times in seconds.items()
    ]


def _decode(model: Any, cache: list[Any], token: int) -> float:
    """Seconds of one token through the model and its cache."""
    start = time.perf_counter()
    mx.eval(model(mx.array([[token]]), cache=cache), [entry.state for entry in cache])
    return time.perf_counter() - start

"""Settings of the methods that give tokens up, sized to take a share of the bytes of the whole cache."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.live_runs import CHUNK
from mlxkv.live import live_config
from mlxkv.live.base import cache_class_of
from mlxkv.spec import CacheSpec

LEAST = 10  # the size from which on all recipes exist
SINKS = 4


def _sketch(n: int) -> dict[str, int]:
    return {"sinks": SINKS, "width": max(64, n), "interval": max(1, min(16, n // 8))}


# Settings that hold about n tokens a head, shared out much as in the presets.
RECIPES: dict[str, Callable[[int], dict[str, int]]] = {
    "h2o": lambda n: {"heavy": n - n // 2, "recent": n // 2},
    "streaming-llm": lambda n: {"sinks": SINKS, "window": n - SINKS},
    "random": lambda n: {"sinks": SINKS, "tokens": n, "recent": min(64, n // 2)},
    "sliding-window": lambda n: {"window": n},
    "mp-kvm": lambda n: {"centroids": n - n // 3, "window": n // 6, "flush": max(16, n // 3)},
    "sketch-topk": lambda n: {"heavy": n - n // 2 - SINKS, "recent": n // 2, **_sketch(n)},
    "sketch-aggregate": lambda n: {
        "heavy": n - n // 4 - n // 16 - SINKS - 1, "recent": n // 4, "entries": n // 16 + 1, **_sketch(n),
    },
}  # fmt: skip


def largest(method: str, share: float, spec: CacheSpec, context: int, predict: int) -> dict[str, int]:
    """A method's settings by the recipe, of the largest size that is measured to hold at most this share of float16's
    bytes while `predict` tokens follow a context; of the smallest size where none does."""

    def measured(n: int) -> float:
        return share_held(live_config(method, **RECIPES[method](n)), spec, context, predict)

    sizes = range(LEAST, round(share * (context + predict)) + 1)  # no token takes less than its keys and values
    return RECIPES[method](sizes[max(1, bisect_right(sizes, share, key=measured)) - 1])


def share_held(settings: Any, spec: CacheSpec, context: int, predict: int) -> float:
    """Bytes of the first layer's cache over those of float16, averaged over chunks as `continued` does.

    They depend on how many tokens came, not on which, so zeros are enough, and nothing is ever computed.
    """
    layer = spec.attention_layers[0]
    cache = cache_class_of(settings)(settings, spec, layer)
    shares = []
    for count in (context, *[CHUNK] * ((predict - 1) // CHUNK)):
        keys, values = (mx.zeros((1, slot.heads, count, slot.dim), mx.float16) for slot in cache.slots)
        mass = mx.zeros((1, cache.slots[0].heads, cache.kept + count))
        cache.offset += count
        cache.absorb(keys, values, mass if cache.observation_window else None)
        shares.append(cache.nbytes / (2 * cache.offset * sum(slot.heads * slot.dim for slot in cache.slots)))
    return float(np.mean(shares))

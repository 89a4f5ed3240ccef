"""How many bytes a live cache should take: worked out from a method's settings, and not from its code."""

from __future__ import annotations

import math
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxkv.live import live_config
from mlxkv.models import cache_spec

BLOCK = 64  # tokens that are packed together
STEP = 256  # tokens by which the whole cache grows


def theory(model: Any, name: str, tokens: int) -> int:
    """Bytes that `tokens` tokens should take, read in one go or in chunks; of smartkv the budget, which is a limit."""
    spec = cache_spec(model)
    parameters = cast(dict[str, mx.array], tree_flatten(model.parameters(), destination={}))
    wide = max(parameter.dtype.size for parameter in parameters.values())
    settings = live_config("full" if name == "whole" else name)
    return round(
        sum(
            layer_bytes(settings, tokens, sum(slot.heads * slot.dim for slot in slots), slots[0].heads, wide)
            for slots in spec.layers
            if slots
        )
    )


def layer_bytes(settings: Any, tokens: int, elements: int, heads: int, wide: int) -> float:
    """One layer's, of so many elements a token and kv heads. Numbers kept for a token and head have 4 bytes, tokens kept as
    they are 2 an element, but in the whole cache, which takes them as the model gives them: `wide`."""
    s, method = settings, type(settings).__module__.rpartition(".")[2]
    if method.startswith("sketch"):
        return _sketch_bytes(s, tokens, elements, heads)
    if method == "full":
        return math.ceil(tokens / STEP) * STEP * elements * wide
    if method == "smartkv":
        return s.budget * 2 * elements * tokens
    if method in ("int8", "int4", "kivi"):
        bits, group, newest = (s.bits, s.group, s.residual) if method == "kivi" else (int(method[3:]), 64, 0)
        packed = max(0, tokens - newest) // BLOCK * BLOCK
        return elements * (packed * (bits / 8 + 4 / group) + 2 * (tokens - packed))
    if method == "streaming_llm":
        return 2 * elements * min(tokens, s.sinks + s.window)
    if method == "h2o":
        return (2 * elements + 4 * heads) * min(tokens, s.heavy + s.recent)
    if method == "mp_kvm":
        left = max(0, tokens - s.window) // s.flush * s.flush
        centroids, tail = min(left, s.centroids), tokens - left
        return 2 * elements * (centroids + tail) + 4 * heads * (3 * centroids + tail)
    raise ValueError(f"no theory of {method}")


def _sketch_bytes(s: Any, tokens: int, elements: int, heads: int) -> float:
    """Also of a sketch for each head, and of a position for each heavy token and a count for each merged entry."""
    entries = getattr(s, "entries", 0)
    room = s.sinks + s.heavy + s.recent + s.interval + entries
    settled = 0 if tokens < room else (tokens - s.recent) // s.interval * s.interval
    heavy = min(settled, s.sinks + s.heavy)
    entries = entries if settled > heavy else 0
    kept = heavy + tokens - settled + entries
    return 2 * elements * kept + 4 * heads * (heavy + entries + s.depth * s.width)

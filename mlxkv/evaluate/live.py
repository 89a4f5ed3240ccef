"""Does the model notice a live cache? Run a text through one from its first token, and compare what the model says.

The prefix is prefilled in chunks of `lm.PREFILL_CHUNK`, then the text that follows goes in token by token, as in
generation. The reference is the full cache's run of the same tokens, `fidelity.prefix`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlxkv import lm
from mlxkv.evaluate.fidelity import Prefix, compare
from mlxkv.live import LayerCache, make_cache
from mlxkv.presets import live_settings


def evaluate(model: Any, method: str, start: Prefix, **overrides: Any) -> dict[str, Any]:
    """A JSON-ready record of a live cache's sizes, fidelity and seconds; method and overrides as in `make_cache`.

    Sizes are those after the last token. Seconds: prefill of the prefix, there and with the full cache, and decoding.
    """
    caches = make_cache(model, method, **overrides)
    clock = [time.perf_counter()]
    lm.prefill(model, start.dump.tokens[0].tolist(), caches)
    clock.append(time.perf_counter())
    logits = token_by_token(model, caches, start.following)
    clock.append(time.perf_counter())
    return {
        "cache": method,
        "settings": dataclasses.asdict(live_settings(method, **overrides)),
        "prefix_tokens": start.dump.length,
        "prefill_chunk": lm.PREFILL_CHUNK,
        **sizes(caches),
        **compare(start.logits, logits, start.following),
        "prefill_seconds_reference": start.seconds,
        "prefill_seconds": clock[1] - clock[0],
        "decode_seconds": clock[2] - clock[1],
    }


def token_by_token(model: Any, cache: list[Any], following: Sequence[int]) -> mx.array:
    """Logits `[n, vocabulary]` for all but the last of `following`, each token fed into `cache` by itself."""
    rows = []
    for token in following[:-1]:
        rows.append(model(mx.array([[token]]), cache=cache)[0])
        mx.eval(rows[-1], [entry.state for entry in cache])
    return mx.concatenate(rows)


def sizes(caches: Sequence[Any]) -> dict[str, Any]:
    """Tokens that the live caches among `caches` have seen, their bytes, and the bytes of all those tokens' keys and
    values at 16 bits an element. Other layers' states are in neither. For a batch of one."""
    live = [entry for entry in caches if isinstance(entry, LayerCache)]
    cache_bytes = sum(entry.nbytes for entry in live)
    fp16_bytes = sum(2 * entry.offset * slot.heads * slot.dim for entry in live for slot in entry.slots)
    return {
        "tokens": live[0].offset,
        "fp16_bytes": fp16_bytes,
        "cache_bytes": cache_bytes,
        "ratio": fp16_bytes / cache_bytes,
    }

"""Does the model notice? Compress a cache in the middle of a text and compare what the model says next.

The two approaches of the plan's phase 4: A, next-token logits (cosine, KL, top-1), and B, perplexity of the text
that follows. Both runs see the same tokens; the reference continues from the untouched live cache.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from mlxkv import lm, metrics
from mlxkv.cache import STREAMS, KVDump
from mlxkv.codec.kvtc import KVTCCacheCodec
from mlxkv.codec.summary import summary
from mlxkv.container import Reader
from mlxkv.errors import InputError
from mlxkv.models import cache_spec


@dataclass
class Prefix:
    """A text prefilled up to the point of compression; several codecs can be tried on it.

    cache: the live mlx-lm cache (not to be changed). following: the tokens after it. logits: what the model says
    from the live cache at each of them, `[n, vocabulary]`. seconds: of the prefill.
    """

    cache: list[Any]
    dump: KVDump
    following: list[int]
    logits: mx.array
    seconds: float


def prefix(
    model: Any, tokens: Sequence[int], length: int, *, predict: int = 200, name: str = "", dtype: str = "auto"
) -> Prefix:
    """Prefill `length` tokens and predict the next `predict` from the live cache. Raises InputError for short texts."""
    if len(tokens) < length + predict + 1:
        raise InputError(f"the text has {len(tokens)} tokens; {length} + {predict} + 1 are needed")
    cache = make_prompt_cache(model)
    start = time.perf_counter()
    lm.prefill(model, tokens[:length], cache)
    seconds = time.perf_counter() - start
    dump = lm.take(
        cache, cache_spec(model), [tokens[:length]], model=name, fingerprint=lm.fingerprint(model), dtype=dtype
    )
    following = list(tokens[length : length + predict + 1])
    return Prefix(cache, dump, following, continue_with(model, cache, following), seconds)


def continue_with(model: Any, cache: list[Any], following: Sequence[int]) -> mx.array:
    """Logits `[n, vocabulary]` for all but the last of `following`, from a copy of `cache`."""
    logits = model(mx.array([list(following[:-1])]), cache=copy.deepcopy(cache))[0]
    mx.eval(logits)
    return logits


def evaluate(model: Any, codec: KVTCCacheCodec, start: Prefix) -> dict[str, Any]:
    """Compress and restore the prefix's cache; a JSON-ready record of sizes, errors, fidelity and seconds."""
    clock = [time.perf_counter()]
    blob = codec.compress_dump(start.dump)
    clock.append(time.perf_counter())
    decoded = codec.decompress_dump(blob)
    clock.append(time.perf_counter())
    logits = continue_with(model, lm.restore(model, decoded), start.following)
    with Reader(blob) as reader:
        sizes = summary(reader)
    return {
        **sizes,
        "artifact_bytes": codec.artifacts.nbytes,
        **errors(sizes, start.dump, decoded),
        **compare(start.logits, logits, start.following),
        "prefill_seconds": start.seconds,
        "compress_seconds": clock[1] - clock[0],
        "decompress_seconds": clock[2] - clock[1],
    }


def errors(layout: Mapping[str, Any], original: KVDump, decoded: KVDump) -> dict[str, Any]:
    """Error of the coded tokens, between s and length - w: relative over everything, and mean squared by layer."""
    middle = slice(layout["s"], max(layout["s"], layout["tokens"] - layout["w"]))
    pairs = {name: (original.stream(name)[..., middle, :], decoded.stream(name)[..., middle, :]) for name in STREAMS}
    return {
        **{f"{name}_relative_error": metrics.relative_error(*pair) for name, pair in pairs.items()},
        **{f"{name}_layer_mse": metrics.layer_mse(*pair) for name, pair in pairs.items()},
    }


def compare(reference: mx.array, logits: mx.array, following: Sequence[int]) -> dict[str, Any]:
    """Logits `[n, vocabulary]` after the restored cache against the reference's, over the text that follows."""
    targets = mx.array(list(following[1:]))
    before, after = metrics.perplexity(reference, targets), metrics.perplexity(logits, targets)
    kl = metrics.kl_divergence(reference, logits)
    return {
        "predicted_tokens": len(following) - 1,
        "next_token_cosine": float(metrics.cosine(reference[0], logits[0])),
        "next_token_kl": float(kl[0]),
        "kl": float(kl.mean()),
        "top1_agreement": metrics.top1_agreement(reference, logits),
        "perplexity_reference": before,
        "perplexity": after,
        "perplexity_delta": after - before,
    }

"""What is evaluated: a way to hold a context in a cache, to ask about it, and to go on from there.

The context is held before the question is known, as in a conversation, so a method cannot prepare for the question.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import operator
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlxkv import lm
from mlxkv.codec.session import CacheCodec
from mlxkv.codec.summary import summary
from mlxkv.dump import KVDump
from mlxkv.errors import InputError
from mlxkv.evaluate import metrics
from mlxkv.io.container import Reader
from mlxkv.live import live_config
from mlxkv.live.base import LayerCache
from mlxkv.live.seam import make_cache
from mlxkv.models import cache_spec
from mlxkv.spec import STREAMS


@dataclass(frozen=True)
class CachedContext:
    """cache: a prompt cache, one entry a layer. sizes: `tokens` held, their `cache_bytes`, and `fp16_bytes`, of all their
    keys and values at 16 bits an element. details: what else is known of how they are held, such as errors and seconds."""

    cache: list[Any]
    sizes: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)


class CacheBuilder(Protocol):
    """Of a model and tokens, the cache that holds them. exact: the whole cache of the same tokens where it is at hand; it
    is not changed, and only what begins with one takes it."""

    def __call__(self, model: Any, tokens: Sequence[int], exact: CachedContext | None = None) -> CachedContext: ...


@dataclass(frozen=True)
class Variant:
    """name: of the row in a table. settings: what a result says about it. build: as `CacheBuilder` says. needs_baseline: whether it
    takes an exact cache."""

    name: str
    settings: Mapping[str, Any]
    build: CacheBuilder
    needs_baseline: bool = False


def baseline() -> Variant:
    """mlx-lm's own cache: what every other variant is compared with."""

    def build(model: Any, tokens: Sequence[int], exact: CachedContext | None = None) -> CachedContext:
        cache: list[Any] = make_prompt_cache(model)
        start = time.perf_counter()
        lm.prefill(model, tokens, cache)
        return CachedContext(cache, cache_sizes(model, cache), {"prefill_seconds": time.perf_counter() - start})

    return Variant("whole", {}, build)


def live_variant(method: str, **overrides: Any) -> Variant:
    """A live cache, `make_cache(model, method, **overrides)`, prefilled in chunks of `lm.PREFILL_CHUNK`."""

    def build(model: Any, tokens: Sequence[int], exact: CachedContext | None = None) -> CachedContext:
        cache = make_cache(model, method, **overrides)
        start = time.perf_counter()
        lm.prefill(model, tokens, cache)
        return CachedContext(cache, cache_sizes(model, cache), {"prefill_seconds": time.perf_counter() - start})

    changed = ", ".join(f"{key}={value}" for key, value in overrides.items())
    settings = dataclasses.asdict(live_config(method, **overrides))
    return Variant(f"{method} ({changed})" if changed else method, {"cache": method, **settings}, build)


def codec_variant(codec: CacheCodec, name: str, dtype: str = "auto") -> Variant:
    """A whole cache that went through a codec and back; dtype is that of the dump, as in `lm.take`."""

    def build(model: Any, tokens: Sequence[int], exact: CachedContext | None = None) -> CachedContext:
        cache = (exact or baseline().build(model, tokens)).cache
        dump = lm.extract_cache(
            cache, cache_spec(model), [list(tokens)], fingerprint=lm.fingerprint(model), dtype=dtype
        )
        clock = [time.perf_counter()]
        blob = codec.compress_dump(dump)
        clock.append(time.perf_counter())
        decoded = codec.decompress_dump(blob)
        clock.append(time.perf_counter())
        with Reader(blob) as reader:
            layout = summary(reader)
        details = {
            **{key: value for key, value in layout.items() if key not in ("tokens", "fp16_bytes", "ratio")},
            **coding_errors(layout, dump, decoded),
            "artifact_bytes": codec.artifacts.nbytes,
            "compress_seconds": clock[1] - clock[0],
            "decompress_seconds": clock[2] - clock[1],
        }
        held = {key: layout[key] for key in ("tokens", "fp16_bytes", "ratio")} | {"cache_bytes": layout["file_bytes"]}
        return CachedContext(lm.restore(model, decoded), held, details)

    settings: dict[str, Any] = {"artifacts": codec.artifacts.fingerprint, "recent": codec.recent, "sinks": codec.sinks}
    if codec.quality is not None:
        settings |= {"quality": codec.quality, "window_quality": codec.window_quality}
    return Variant(name, settings, build, needs_baseline=True)


def iter_variants(
    model: Any, variants: Sequence[Variant], tokens: Sequence[int]
) -> Iterator[tuple[Variant, CachedContext]]:
    """Every variant and the tokens as it holds them, ready to go on from; one prefill serves the whole cache and codecs.

    Raises InputError for no tokens.
    """
    if not len(tokens):
        raise InputError("a context of 1 token or more is needed")
    exact: CachedContext | None = None
    for variant in variants:
        if variant.name != baseline().name:
            yield variant, variant.build(model, tokens, exact)
            continue
        exact = variant.build(model, tokens)
        if any(other.needs_baseline for other in variants):
            yield variant, dataclasses.replace(exact, cache=copy.deepcopy(exact.cache))
        else:
            # Nothing begins with it, so a large cache is not kept twice.
            yield variant, exact
            exact = None


def cache_sizes(model: Any, cache: Sequence[Any]) -> dict[str, Any]:
    """Of a cache in use, for a batch of one: tokens seen, bytes held in attention layers, and of all those tokens' keys
    and values at 16 bits an element. Other layers' states are in neither."""
    spec = cache_spec(model)
    layers = [i for i in spec.attention_layers if isinstance(cache[i], LayerCache | KVCache)]
    cache_bytes = sum(cache[i].nbytes for i in layers)
    slots = [(cache[i].offset, slot) for i in layers for slot in spec.layers[i] or ()]
    fp16_bytes = sum(2 * offset * slot.heads * slot.dim for offset, slot in slots)
    return {
        "tokens": cache[layers[0]].offset,
        "fp16_bytes": fp16_bytes,
        "cache_bytes": cache_bytes,
        "ratio": fp16_bytes / cache_bytes,
    }


def coding_errors(layout: Mapping[str, Any], original: KVDump, decoded: KVDump) -> dict[str, Any]:
    """Error of the coded tokens, between sinks and recent ones: relative over everything, and mean squared by layer."""
    middle = slice(layout["sinks"], max(layout["sinks"], layout["tokens"] - layout["recent"]))
    pairs = {name: (original.stream(name)[..., middle, :], decoded.stream(name)[..., middle, :]) for name in STREAMS}
    return {
        **{f"{name}_relative_error": metrics.relative_error(*pair) for name, pair in pairs.items()},
        **{f"{name}_layer_mse": metrics.layer_mse(*pair) for name, pair in pairs.items()},
    }


def iter_logits(model: Any, cache: list[Any], tokens: Sequence[int], chunk: int) -> Iterator[mx.array]:
    """Logits `[n, vocabulary]` for all but the last of `tokens`, fed into `cache` at most `chunk` at a time."""
    for start in range(0, len(tokens) - 1, chunk):
        part = tokens[start : min(start + chunk, len(tokens) - 1)]
        logits = model(mx.array([list(part)]), cache=cache)[0]
        mx.eval(logits, [entry.state for entry in cache])
        yield logits


def split_tokens(tokenizer: Any, context: str, question: str) -> tuple[list[int], list[int]]:
    """Tokens of the whole text, cut where they are no longer those of the context alone.

    So the question has the tokens that it has after the context; on its own, some tokenizers would put a blank before it.
    """
    tokens, alone = tokenizer.encode(context + question), tokenizer.encode(context)
    place = sum(itertools.takewhile(bool, map(operator.eq, tokens, alone)))
    return tokens[:place], tokens[place:]


def generate_answer(
    model: Any, tokenizer: Any, held: CachedContext, question: Sequence[int], max_tokens: int
) -> list[int]:
    """What the model says, greedily, to a question asked after what is held; ends before an end-of-text token.

    Raises InputError for an empty question.
    """
    if not len(question):
        raise InputError("a question of 1 token or more is needed")
    logits = lm.prefill(model, question, held.cache)
    said = lm.continue_greedily(model, held.cache, logits, tuple(tokenizer.eos_token_ids))
    return list(itertools.islice(said, max_tokens))

"""What sinks and a rotation do for int4 and kivi, each alone and together, beside the same without either.

SmolLM2, and Gemma 3 270M where its packages are installed, read 1,024 tokens; then the next 128 are
read at once through each cache, and KL is taken against the untouched cache. Gemma has caches of these methods on its
3 global layers, and mlx-lm's own on the 15 local ones. All caches take the same keys and values in, in one run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import suppress
from statistics import fmean
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, make_prompt_cache
from rich.progress import track

from benchmarks import tables, texts
from benchmarks.schema import MODEL, Outcome, Result
from mlxkv import lm
from mlxkv.bundled import gemma3
from mlxkv.config import Config
from mlxkv.errors import ModelNotFoundError
from mlxkv.evaluate.tasks import fidelity
from mlxkv.live import live_config
from mlxkv.live.base import cache_class_of
from mlxkv.live.seam import attach
from mlxkv.models import cache_spec, kv_slots
from mlxkv.spec import CacheSpec, Rope

PHASE = 1
CONTEXT, PREDICT = 1024, 128
KINDS = ("legal", "story", "chat-support", "code")
PRESETS = ("int4", "kivi-2", "kivi-4")
BEFORE = "neither"
PARTS: dict[str, dict[str, Any]] = {
    "": {},
    "sinks only": {"rotate": False},
    "rotation only": {"sinks": 0},
    BEFORE: {"rotate": False, "sinks": 0},
}


def run(quick: bool) -> Outcome:
    """Quick: one text of SmolLM2."""
    samples: list[dict[str, Any]] = []
    model, tokenizer = lm.load(MODEL)
    found = {kind: tokenizer.encode(texts.OTHER_KINDS[kind]()) for kind in KINDS[: 1 if quick else None]}
    samples += measured(MODEL, model, cache_spec(model), found)
    if not quick:
        with suppress(ModelNotFoundError):
            model, tokenizer = lm.load(gemma3.NAME)
            found = {kind: tokenizer.encode(texts.OTHER_KINDS[kind]()) for kind in KINDS}
            samples += measured(gemma3.NAME, model, global_layers(model), found)
    settings = {name: dict(config.to_dict()) for name, config in variants().items()}
    config = {"context": CONTEXT, "predict": PREDICT, "texts": list(KINDS), "settings": settings}
    return Outcome(config, samples, summarise(samples))


def global_layers(model: Any) -> CacheSpec:
    """Describe the cache of Gemma's global layers; the others keep mlx-lm's own."""
    slots = kv_slots(1, 256, Rope(256, base=1e6))
    kept = make_prompt_cache(model)
    return CacheSpec("gemma3_text", tuple(slots if type(entry) is KVCache else None for entry in kept))


def variants() -> dict[str, Config]:
    """Return the settings of int8, of each preset as it is and with neither part, and of others with one of them."""
    found = {"int8": live_config("int8")}
    for preset in PRESETS:
        for part, changes in PARTS.items():
            if preset == "int4" or part in ("", BEFORE):
                # kivi's 4 sinks and 124 recent tokens were 128 recent tokens.
                more = {"recent": 128} if preset != "int4" and part else {}
                found[f"{preset}, {part}" if part else preset] = live_config(preset, **changes, **more)
        if preset != "int4":
            found[f"{preset}, keys rotated too"] = live_config(preset, rotate_keys=True)
    return found


def measured(name: str, model: Any, spec: CacheSpec, found: dict[str, Sequence[int]]) -> Iterator[dict[str, Any]]:
    """Yield a record for each text and variant."""
    attach(model)
    for text, tokens in track(list(found.items()), name):
        if len(tokens) <= CONTEXT + PREDICT:
            raise ValueError(f"{text} has only {len(tokens)} tokens")
        whole: list[Any] = make_prompt_cache(model)
        mx.eval(model(mx.array([tokens[:CONTEXT]]), cache=whole)[:, -1])
        following = tokens[CONTEXT : CONTEXT + PREDICT + 1]
        reference = logits(model, whole, spec, None, following)
        for variant, config in variants().items():
            held = cached(whole, spec, config)
            live = [held[layer] for layer in spec.attention_layers]
            size = sum(entry.nbytes for entry in live)
            fp16 = sum(2 * sum(slot.heads * slot.dim for slot in entry.slots) * CONTEXT for entry in live)
            scores = fidelity.compare(reference, logits(model, whole, spec, config, following), following)
            sizes = {"cache_bytes": size, "share_of_fp16": size / fp16}
            yield {"model": name, "text": text, "variant": variant, **sizes, **scores}


def cached(whole: Sequence[Any], spec: CacheSpec, config: Config | None) -> list[Any]:
    """Return a cache that took the context in: of these settings, or for None as it was; the given one is not changed."""
    held = [copy.deepcopy(entry) for entry in whole]
    for layer in spec.attention_layers:
        keys, values = (x[:, :, :CONTEXT] for x in (whole[layer].keys, whole[layer].values))
        if config is None:
            held[layer] = KVCache()  # type: ignore[no-untyped-call]
            held[layer].update_and_fetch(keys, values)
            continue
        held[layer] = cache_class_of(config)(config, spec, layer)
        held[layer].offset = CONTEXT
        held[layer].absorb(keys.astype(mx.float16), values.astype(mx.float16), None)
    return held


def logits(model: Any, whole: Sequence[Any], spec: CacheSpec, config: Config | None, tokens: Sequence[int]) -> mx.array:
    """Return the logits `[PREDICT, vocabulary]` of the following tokens."""
    return model(mx.array([tokens[:-1]]), cache=cached(whole, spec, config))[0].astype(mx.float32)


def summarise(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return means over texts, and KL as a factor of that of the same preset with neither part."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for model, variant in dict.fromkeys((sample["model"], sample["variant"]) for sample in samples):
        group = [s for s in samples if (s["model"], s["variant"]) == (model, variant)]
        keys = ("cache_bytes", "share_of_fp16", "kl", "top1_agreement")
        means = {key: round(fmean(sample[key] for sample in group), 6) for key in keys}
        by_text = {sample["text"]: round(sample["kl"], 6) for sample in group}
        rows[model, variant] = {"model": model, "variant": variant, "texts": len(group), **means, "kl_by_text": by_text}
    for (model, variant), row in rows.items():
        before = rows.get((model, f"{variant.partition(',')[0]}, {BEFORE}"))
        row["kl_of_before"] = round(row["kl"] / before["kl"], 4) if before else None
    return list(rows.values())


def section(result: Result) -> str:
    config, rows = result["config"], result["summary"]
    cells = [
        (row["model"], row["variant"], f"{row['share_of_fp16']:.3f}", f"{row['kl']:.2g}",
         f"{row['kl_of_before']:.2f}" if row["kl_of_before"] else "", tables.percent(row["top1_agreement"]))
        for row in rows
    ]  # fmt: skip
    head = (
        f"KL on {rows[0]['texts']} texts, {config['context']:,} tokens held and the next {config['predict']} read; bytes are those"
        ' held then, as a share of float16\'s. "Neither" quantizes as before there were sinks and rotation.'
    )
    return f"{head}\n\n{tables.table(['model', 'cache', 'bytes', 'KL', 'times neither', 'top-1'], cells)}"

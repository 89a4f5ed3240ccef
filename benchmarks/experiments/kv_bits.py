"""What mlx-lm itself offers: `--kv-bits` and doing nothing, beside live caches, on the same texts in one run.

`mlx_lm.generate --kv-bits N` turns each layer's cache into a QuantizedKVCache. Here that happens right after the context
has been read; by default mlx-lm waits for 5,000 tokens, and until then holds 16 bits. Bytes of its scales are counted as
float16, as they are on a Mac with 16-bit weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from benchmarks import tables, texts
from benchmarks.schema import MODEL, Outcome, Result
from mlxkv import lm
from mlxkv.evaluate.tasks import fidelity
from mlxkv.evaluate.variants import CachedContext, Variant, baseline, cache_sizes, live_variant

PHASE = 1
CONTEXT_TOKENS, EVAL_TOKENS, CHUNK = 1024, 64, 16
PRESETS = ("int8", "int4", "smartkv-0.5", "smartkv-0.3")
BITS = (8, 4)
SCORES = ("share_of_fp16", "kl", "top1_agreement", "perplexity_delta")


def run(quick: bool) -> Outcome:
    """KL and bytes of every variant over held-out texts of eight kinds."""
    model, tokenizer = lm.load(MODEL)
    length = CONTEXT_TOKENS + EVAL_TOKENS + 1
    kinds = list(texts.OTHER_KINDS)[: 2 if quick else None]
    variants = [baseline(), *map(quantized_variant, BITS), *map(live_variant, PRESETS)]
    samples = []
    for kind in kinds:
        tokens = tokenizer.encode(texts.OTHER_KINDS[kind]())[:length]
        for record in fidelity.evaluate(model, variants, tokens, CONTEXT_TOKENS, CHUNK):
            samples.append({"text": kind, "share_of_fp16": 1 / record["ratio"], **record})
    config = {
        "model": MODEL,
        "context_tokens": CONTEXT_TOKENS,
        "eval_tokens": EVAL_TOKENS,
        "chunk": CHUNK,
        "texts": kinds,
    }
    return Outcome(config, samples, summarise(samples))


def quantized_variant(bits: int) -> Variant:
    """mlx-lm's own quantized cache in groups of 64, its default."""
    return Variant(f"mlx-lm --kv-bits {bits}", {"bits": bits, "group_size": 64}, partial(_quantized, bits))


def _quantized(bits: int, model: Any, tokens: Sequence[int], exact: CachedContext | None = None) -> CachedContext:
    held = baseline().build(model, tokens)
    sizes = cache_sizes(model, held.cache)
    caches = [layer.to_quantized(group_size=64, bits=bits) for layer in held.cache]
    total = sum(_bytes(part) for layer in caches for part in layer.keys_and_values())
    return CachedContext(caches, {**sizes, "cache_bytes": total, "ratio": sizes["fp16_bytes"] / total})


def _bytes(part: tuple[Any, Any, Any]) -> int:
    """Codes as they are, scales and biases at 2 bytes each."""
    codes, scales, biases = part
    return int(codes.nbytes + 2 * scales.size + 2 * biases.size)


def summarise(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over texts for each variant."""
    names = dict.fromkeys(sample["variant"] for sample in samples)
    rows = []
    for name in names:
        own = [sample for sample in samples if sample["variant"] == name]
        rows.append(
            {"variant": name, "texts": len(own), **{s: round(float(np.mean([o[s] for o in own])), 6) for s in SCORES}}
        )
    return rows


def section(result: Result) -> str:
    """Report what mlx-lm's own option costs beside live caches."""
    rows = [
        (
            f"`{r['variant']}`",
            f"{r['share_of_fp16']:.2f}",
            f"{r['kl']:.2g}",
            tables.percent(r["top1_agreement"]),
            f"{r['perplexity_delta']:+.2f}",
        )
        for r in result["summary"]
    ]
    head = f"After {result['config']['context_tokens']:,} tokens of {len(result['config']['texts'])} held-out texts, the next {result['config']['eval_tokens']}. Bytes are shares of float16's."
    return f"{head}\n\n{tables.table(('cache', 'bytes', 'KL', 'top-1', 'perplexity'), rows)}"

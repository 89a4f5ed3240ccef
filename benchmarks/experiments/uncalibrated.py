"""Files without calibration: what `direct` and `exact` cost and keep, on texts that nothing was ever learnt from.

Caches of texts of eight kinds, of up to 2,048 tokens, are coded whole, and the next tokens predicted from what comes back. Bytes are
those of complete files. Beside them `kvtc`'s and `kvtc-rd`'s would need a calibration first; the live caches int8 and int4 need none
and hold their bytes in memory. Quick: two texts, one quality.
"""

from __future__ import annotations

from statistics import fmean, median
from typing import Any

from rich.progress import track

from benchmarks import texts
from benchmarks.schema import MODEL, NAMED, Outcome, Result
from benchmarks.tables import percent, table
from mlxkv import lm
from mlxkv.codec.calibrate import uncalibrated
from mlxkv.codec.session import CacheCodec
from mlxkv.evaluate.tasks import fidelity
from mlxkv.evaluate.variants import Variant, baseline, codec_variant, live_variant
from mlxkv.models import cache_spec

PHASE = 3
LENGTH, PREDICT = 2048, 128
QUALITIES, QUICK_QUALITIES = (35, 45, 55), (45,)
LIVE = ("int8", "int4")
LIVE_TEXTS = ("code",)  # live caches read their texts anew, which takes longest
KEPT = ("kl", "top1_agreement", "ratio", "cache_bytes", "fp16_bytes", "tokens", "predicted_tokens", "compress_seconds",
        "decompress_seconds")  # fmt: skip


def run(quick: bool, model: str = MODEL) -> Outcome:
    loaded, tokenizer = lm.load(model)
    kinds = list(texts.OTHER_KINDS)[:: 4 if quick else 1]
    coded = variants(loaded, QUICK_QUALITIES if quick else QUALITIES)
    samples = []
    for kind in track(kinds, "texts"):
        tokens = tokenizer.encode(texts.OTHER_KINDS[kind]())[: LENGTH + PREDICT + 1]
        live = [live_variant(name) for name in LIVE if kind in LIVE_TEXTS and not quick]
        held = len(tokens) - PREDICT - 1
        for record in fidelity.evaluate(loaded, [baseline(), *coded, *live], tokens, held, chunk=PREDICT)[1:]:
            found = {key: record[key] for key in KEPT if key in record}
            samples.append({"text": kind, "variant": record["variant"], **found})
    config = {"model": model, "held": LENGTH, "predict": PREDICT, "texts": kinds, "live_texts": list(LIVE_TEXTS)}
    return Outcome(config, samples, summarise(samples))


def variants(model: Any, qualities: tuple[int, ...]) -> list[Variant]:
    """Return `direct` at some qualities, and `exact`."""
    spec, fingerprint = cache_spec(model), lm.fingerprint(model)
    direct, exact = (
        CacheCodec(uncalibrated(spec, fingerprint=fingerprint, method=name)) for name in ("direct", "exact")
    )
    coded = [codec_variant(direct.with_quality(each), f"direct {each}", "float16") for each in qualities]
    return [*coded, codec_variant(exact, "exact", "float16")]


def summarise(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each variant: bytes of all its texts together, and mean divergence."""
    rows = []
    for name in dict.fromkeys(sample["variant"] for sample in samples):
        group = [sample for sample in samples if sample["variant"] == name]
        share = sum(s["cache_bytes"] for s in group) / sum(s["fp16_bytes"] for s in group)
        longest = max(group, key=lambda s: s["tokens"])
        row = {
            "variant": name,
            "texts": len(group),
            "predicted_tokens": sum(s["predicted_tokens"] for s in group),
            "share_of_fp16": round(share, 4),
            "longest_tokens": longest["tokens"],
            "longest_share": round(longest["cache_bytes"] / longest["fp16_bytes"], 4),
            "kl": round(fmean(s["kl"] for s in group), 6),
            "worst_kl": round(max(s["kl"] for s in group), 6),
            "top1_agreement": round(fmean(s["top1_agreement"] for s in group), 4),
        }
        for key in ("compress_seconds", "decompress_seconds"):
            if key in group[0]:
                row[f"{key}_a_1000_tokens"] = round(median(1000 * s[key] / s["tokens"] for s in group), 3)
        rows.append(row)
    return rows


def section(result: Result) -> str:
    config, rows = result["config"], result["summary"]
    heads = (
        "cache",
        "texts",
        "bytes",
        "of the longest",
        "KL",
        "worst text",
        "top-1",
        "s a 1,000 tokens to write",
        "to read",
    )
    cells = [
        [row["variant"], str(row["texts"]), percent(row["share_of_fp16"]), percent(row["longest_share"]), f"{row['kl']:.4f}",
         f"{row['worst_kl']:.4f}", percent(row["top1_agreement"]),
         *(f"{row[key]:.2f}" if key in row else "-" for key in SECONDS)]
        for row in rows
    ]  # fmt: skip
    return (
        f"{NAMED[config['model']]} after up to {config['held']:,} tokens of each text, the next {config['predict']} predicted. Bytes of"
        f" whole files as a share of float16's. Live caches, of {', '.join(config['live_texts'])} alone, hold theirs in memory.\n\n"
        + table(heads, cells)
    )


SECONDS = tuple(f"{key}_a_1000_tokens" for key in ("compress_seconds", "decompress_seconds"))

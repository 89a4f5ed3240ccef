"""Tokens of calibration against fidelity: the bytes that `kvtc-rd` needs at equal KL, learnt from few texts and from many.

Texts of 512 tokens are drawn from Python's documentation; caches of texts of other kinds are coded at several qualities and the
next tokens predicted. Bytes are those of the coded tokens' sections; whole files are set against the live int4 cache of the
same texts. Quick: one and two texts, two held out.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from time import perf_counter
from typing import Any

import numpy as np
from rich.progress import track

from benchmarks import calibration, texts
from benchmarks.paired import bd_rate
from benchmarks.schema import MODEL, NAMED, Outcome, Result
from benchmarks.tables import megabytes, table
from mlxkv import lm
from mlxkv.codec.calibrate import calibrate
from mlxkv.codec.methods.kvtc_rd import KVTCRDConfig
from mlxkv.codec.session import CacheCodec
from mlxkv.evaluate.tasks import fidelity
from mlxkv.evaluate.variants import baseline, codec_variant, live_variant

PHASE = 3
TOKENS = 512  # of a text
COUNTS, QUICK_COUNTS = (1, 4, 16, 60), (1, 2)
QUALITIES, QUICK_QUALITIES = (22, 30, 38, 46), (22, 38)
KINDS = ("legal", "chat-travel", "code", "reference")
LENGTH, PREDICT = 768, 128
LEAST_KL, MOST_KL = 0.002, 0.1
LIVE = "int4"
KEYS = ("kl", "top1_agreement", "cache_bytes", "coded_bytes", "ratio_middle", "ratio")


def run(quick: bool, model: str = MODEL) -> Outcome:
    counts, qualities = (QUICK_COUNTS, QUICK_QUALITIES) if quick else (COUNTS, QUALITIES)
    loaded, tokenizer = lm.load(model)
    kinds = KINDS[: 2 if quick else None]
    held_out = {kind: tokenizer.encode(texts.OTHER_KINDS[kind]())[: LENGTH + PREDICT + 1] for kind in kinds}
    samples = []
    with calibration.dumps(loaded, tokenizer, {"texts": counts[-1], "tokens": TOKENS}) as files:
        order = np.random.default_rng(0).permutation(len(files))  # any first few are spread over the documentation
        variants = [baseline(), live_variant(LIVE)]
        facts: dict[str, dict[str, Any]] = {LIVE: {"tokens": 0}}
        for count in track(counts, "calibrations"):
            start = perf_counter()
            codec = CacheCodec(calibrate([files[i] for i in order[:count]], KVTCRDConfig()), raw_window=True)
            learnt = {"artifact_bytes": codec.artifacts.nbytes, "learn_seconds": round(perf_counter() - start, 1)}
            for quality in qualities:
                variants.append(codec_variant(codec.with_quality(quality), f"{count} {quality}", "float16"))
                facts[variants[-1].name] = {"tokens": count * TOKENS, "quality": quality, **learnt}
    for kind, tokens in track(held_out.items(), "held-out texts"):
        for record in fidelity.evaluate(loaded, variants, tokens, LENGTH, chunk=PREDICT)[1:]:
            kept = {key: record[key] for key in KEYS if key in record}
            samples.append({"text": kind, **facts[record["variant"]], **kept})
    config = {
        "model": model, "counts": counts, "tokens": TOKENS, "qualities": qualities, "kinds": kinds, "length": LENGTH,
        "predicted": PREDICT, "kl": [LEAST_KL, MOST_KL], "live": LIVE,
    }  # fmt: skip
    return Outcome(config, samples, summarise(samples))


def summarise(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the live cache's scores and, for each number of tokens, a curve and its bytes over those from most tokens."""
    counts = sorted({sample["tokens"] for sample in samples} - {0})
    curves = {tokens: curve(samples, tokens) for tokens in counts}
    most = [(point["coded_bytes"], point["kl"]) for point in curves[counts[-1]]]
    rows = []
    for tokens, points in curves.items():
        rate = bd_rate([(point["coded_bytes"], point["kl"]) for point in points], most, LEAST_KL, MOST_KL)
        learnt = next(sample for sample in samples if sample["tokens"] == tokens)
        rows.append(
            {
                "tokens": tokens,
                "bytes_over_most": None if rate is None else round(1 + rate, 3),
                "artifact_bytes": learnt["artifact_bytes"],
                "learn_seconds": learnt["learn_seconds"],
                **{
                    f"{key}_{point['quality']}": point[key]
                    for point in points
                    for key in ("kl", "ratio_middle", "cache_bytes")
                },
            }
        )
    live = [sample for sample in samples if not sample["tokens"]]
    return {"live": {key: mean(live, key) for key in ("kl", "cache_bytes")}, "rows": rows}


def curve(samples: Sequence[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """Return a calibration's means over texts, a point for each quality."""
    chosen = [sample for sample in samples if sample["tokens"] == tokens]
    return [
        {"quality": quality, **{key: mean([s for s in chosen if s["quality"] == quality], key) for key in KEYS}}
        for quality in sorted({sample["quality"] for sample in chosen})
    ]


def mean(samples: Sequence[dict[str, Any]], key: str) -> float:
    """Return a mean over texts."""
    return round(fmean(sample[key] for sample in samples), 6)


def section(result: Result) -> str:
    """Show the curve."""
    rows, live, qualities = result["summary"]["rows"], result["summary"]["live"], result["config"]["qualities"]
    heads = (
        "tokens", *(f"KL at {quality}, times smaller" for quality in qualities), "coded bytes at equal KL", "files at equal KL",
        "artifacts", "learnt in",
    )  # fmt: skip
    bounds = result["config"]["kl"]
    files = [[(row[f"cache_bytes_{q}"], row[f"kl_{q}"]) for q in qualities] for row in rows]
    rates = [bd_rate(points, files[-1], *bounds) for points in files]
    cells = [
        [f"{row['tokens']:,}", *(f"{row[f'kl_{q}']:.4f}, {row[f'ratio_middle_{q}']:.1f}x" for q in qualities),
         "-" if row["bytes_over_most"] is None else f"{row['bytes_over_most']:.2f}", "-" if rate is None else f"{1 + rate:.2f}",
         megabytes(row["artifact_bytes"]), f"{row['learn_seconds']:.0f} s"]
        for row, rate in zip(rows, rates)
    ]  # fmt: skip
    first, last = rows[0], qualities[-1]
    return (
        f"On {NAMED[result['config']['model']]}. Bytes at equal KL are those that learning from {rows[-1]['tokens']:,} tokens needs, times"
        f" the number shown: of the coded tokens, and of whole files, whose newest tokens are raw. `{result['config']['live']}` diverges by {live['kl']:.4f} nats in {megabytes(live['cache_bytes'])};"
        f" `kvtc-rd` learnt from {first['tokens']:,} tokens by {first[f'kl_{last}']:.4f} at quality {last}, in files of"
        f" {megabytes(first[f'cache_bytes_{last}'])}.\n\n{table(heads, cells)}"
    )

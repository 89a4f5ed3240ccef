"""What the newest tokens take of a whole file of 2,048 tokens: coded finer than the rest, stored raw, fewer of them, or none.

`kvtc-rd`, calibrated as `rate_distortion` does it; a few held-out texts. Quick: one text, a small calibration.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.progress import track

from benchmarks import calibration, texts
from benchmarks.held_out import MODEL
from benchmarks.rate_distortion import FULL, LONG, QUICK, artifact_limit, bd, means, named, rate_cell
from benchmarks.schema import Outcome, Result
from benchmarks.tables import megabytes, table
from mlxkv import lm
from mlxkv.codec.calibrate import calibrate
from mlxkv.codec.methods import kvtc_rd
from mlxkv.codec.session import CacheCodec
from mlxkv.evaluate.tasks import fidelity
from mlxkv.evaluate.variants import Variant, baseline, codec_variant
from mlxkv.sensitivity import sensitivity

PHASE = 4
TEXTS = ("code", "reference", "essay")
QUALITIES, OTHERS = (15, 22, 30, 38, 46), (22, 38)
PREDICT = 128
RAW = "the last 128 raw"
# Tokens in the window and points of quality by which it is finer; None for raw.
WINDOWS: dict[str, tuple[int, float | None]] = {
    "the last 128 at quality + 30": (128, 30),
    RAW: (128, None),
    "the last 128 at quality + 15": (128, 15),
    "the last 128 at quality + 45": (128, 45),
    "the last 32 raw": (32, None),
    "none": (0, None),
}


def run(quick: bool) -> Outcome:
    model, tokenizer = lm.load(MODEL)
    size, length, limit = QUICK if quick else FULL, LONG // 4 if quick else LONG, artifact_limit(model)
    with calibration.dumps(model, tokenizer, size, sensitivity) as files:
        base = CacheCodec(calibrate(files, kvtc_rd.KVTCRDConfig(limit)))
    variants = [
        variant(base, name, quality)
        for i, name in enumerate(WINDOWS)
        for quality in (OTHERS if quick or i else QUALITIES)
    ]
    samples = []
    for text in track(TEXTS[:1] if quick else TEXTS, "held-out texts"):
        tokens = tokenizer.encode(texts.OTHER_KINDS[text]())[: length + PREDICT + 1]
        at = len(tokens) - PREDICT - 1
        for record in fidelity.evaluate(model, [baseline(), *variants], tokens, at, chunk=PREDICT)[1:]:
            samples.append({"text": text, "kind": "long", **named(record)})
    config = {"model": MODEL, "calibration": size, "held": length, "predict": PREDICT, "basis_bytes": limit}
    return Outcome(config, samples, summarise(samples))


def variant(base: CacheCodec, name: str, quality: float) -> Variant:
    """The codec with another window."""
    tokens, finer = WINDOWS[name]
    codec = CacheCodec(base.artifacts, recent=tokens, quality=quality, raw_window=finer is None)
    if finer is not None:
        codec.coder.window_quality_bonus = finer
    return codec_variant(codec, f"{name} {quality}", "float16")


def summarise(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Points of every window, and its whole files' BD-rate against the raw one."""
    whole_files = [{**sample, "coded_bytes": sample["cache_bytes"]} for sample in samples]
    raw = [sample for sample in whole_files if sample["variant"] == RAW]
    return {
        "points": {name: means(samples, name) for name in WINDOWS},
        "bd_rate": {name: bd(whole_files, name, raw, 0, np.inf) for name in WINDOWS if name != RAW},
    }


def section(result: Result) -> str:
    summary, config = result["summary"], result["config"]
    heads = ("window", "quality", "file", "ratio", "of it sinks and window", "KL", "file at equal KL")
    cells = [
        [name, f"{row['at']:g}", megabytes(row["cache_bytes"]), f"{row['ratio']:.1f}x", megabytes(row["sink_and_window_bytes"]),
         f"{row['kl']:.4f}", rate_cell(summary["bd_rate"].get(name)) if not i else ""]
        for name, rows in summary["points"].items()
        for i, row in enumerate(rows)
    ]  # fmt: skip
    first, *_ = summary["bd_rate"].values()
    found = "It shares no KL with the raw window." if first["bd_rate"] is None else (
        f"Against a raw window that is {first['bd_rate']:+.0%} bytes at equal KL."
    )  # fmt: skip
    count = len({sample["text"] for sample in result["samples"]})
    note = (
        f"The newest 128 of {config['held']:,} tokens are coded at a quality 30 points higher than the rest, the first row. {found}"
        f" {count} held-out texts, {PREDICT} predicted tokens each."
    )
    return f"{note}\n\n{table(heads, cells)}"

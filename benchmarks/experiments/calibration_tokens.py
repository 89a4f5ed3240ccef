"""Tokens of calibration against fidelity: `kvtc-rd` learnt from few texts, with and without shrinkage.

Texts of 512 tokens are drawn from Python's documentation; caches of texts of other kinds are coded at the default quality and the
next tokens predicted. Without shrinkage a basis has no directions but those of its tokens, the Fisher information of every
head is taken as it is found, and attention is predicted with a fixed penalty. Quick: one and two texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.progress import track

from benchmarks import calibration, texts
from benchmarks.schema import MODEL, Outcome, Result
from benchmarks.tables import megabytes, table
from mlxkv import lm
from mlxkv.codec.calibrate import learn
from mlxkv.codec.methods.kvtc_rd import KVTCRD, KVTCRDConfig
from mlxkv.codec.samples import Samples
from mlxkv.codec.session import CacheCodec
from mlxkv.evaluate.tasks import fidelity
from mlxkv.evaluate.variants import baseline, codec_variant

PHASE = 3
TOKENS = 512  # of a text
COUNTS, QUICK_COUNTS = (1, 2, 4, 8, 16), (1, 2)
KINDS = ("legal", "chat-travel", "code", "reference")
LENGTH, PREDICT = 640, 96
SHRUNK, BEFORE = "with shrinkage", "without"


def run(quick: bool) -> Outcome:
    counts = QUICK_COUNTS if quick else COUNTS
    model, tokenizer = lm.load(MODEL)
    kinds = KINDS[: 2 if quick else None]
    held_out = {kind: tokenizer.encode(texts.OTHER_KINDS[kind]())[: LENGTH + PREDICT + 1] for kind in kinds}
    samples = []
    with calibration.dumps(model, tokenizer, {"texts": counts[-1], "tokens": TOKENS}) as files:
        order = np.random.default_rng(0).permutation(len(files))  # any first few are spread over the documentation
        for count in track(counts, "calibrations"):
            chosen = [files[i] for i in order[:count]]
            for name in (BEFORE, SHRUNK):
                method, given = Unshrunk() if name == BEFORE else KVTCRD(), KVTCRDConfig()
                learnt = learn(method, Samples(chosen, given.sinks), given)
                codec = codec_variant(CacheCodec(learnt), name, "float16")
                facts = {key: learnt.meta[key] for key in ("held_out_error", "saturated_gains") if key in learnt.meta}
                for kind, tokens in held_out.items():
                    record = fidelity.evaluate(model, [baseline(), codec], tokens, LENGTH)[1]
                    kept = {key: record[key] for key in ("kl", "top1_agreement", "ratio", "artifact_bytes")}
                    samples.append({"variant": name, "tokens": count * TOKENS, "text": kind, **kept, **facts})
    config = {
        "model": MODEL,
        "counts": counts,
        "tokens": TOKENS,
        "kinds": kinds,
        "length": LENGTH,
        "predicted": PREDICT,
    }
    return Outcome(config, samples, summarise(samples))


class Unshrunk(KVTCRD):
    """The method without shrinkage."""

    shrinks = False


def summarise(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each number of tokens, with the means over texts; ratios are of bytes."""
    rows = []
    for tokens in dict.fromkeys(sample["tokens"] for sample in samples):
        row: dict[str, Any] = {"tokens": tokens}
        for name, key in ((BEFORE, "before"), (SHRUNK, "shrunk")):
            chosen = [s for s in samples if (s["tokens"], s["variant"]) == (tokens, name)]
            row |= {
                f"{key}_kl": round(float(np.mean([s["kl"] for s in chosen])), 5),
                f"{key}_ratio": round(float(1 / np.mean([1 / s["ratio"] for s in chosen])), 2),
                f"{key}_artifact_bytes": chosen[0]["artifact_bytes"],
            }
        rows.append(row)
    return rows


def section(result: Result) -> str:
    """Show both curves."""
    heads = ("tokens", "KL before", "ratio before", "artifacts before", "KL", "ratio", "artifacts")
    cells = [
        [f"{row['tokens']:,}"]
        + [
            text
            for key in ("before", "shrunk")
            for text in (
                f"{row[f'{key}_kl']:.4f}", f"{row[f'{key}_ratio']:.1f}x", megabytes(row[f"{key}_artifact_bytes"]),
            )
        ]
        for row in result["summary"]
    ]  # fmt: skip
    first = result["summary"][0]
    return (
        f"Learnt from {first['tokens']:,} tokens, `kvtc-rd` diverges by {first['shrunk_kl']:.3f} nats at its default quality, without"
        f" shrinkage by {first['before_kl']:.2f}. Fewer tokens now cost bytes rather than fidelity.\n\n{table(heads, cells)}"
    )

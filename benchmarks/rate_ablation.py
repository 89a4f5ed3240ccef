"""Which of `kvtc-rd`'s ideas earned how much: each left out alone, in bytes at equal KL on held-out texts.

Calibrated and judged as `rate_distortion` does it, at two qualities, without bound on the artifacts except where that is the
idea, on every other text. Quick: two texts, a small calibration, and few changes.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
from rich.progress import track

from benchmarks import calibration, texts
from benchmarks.held_out import MODEL
from benchmarks.rate_distortion import (
    FULL,
    LENGTH,
    QUICK,
    SHARE,
    artifact_limit,
    bd,
    kind_of,
    means,
    named,
    rate_cell,
)
from benchmarks.schema import Outcome, Result
from benchmarks.tables import megabytes, table
from mlxkv import lm
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.calibrate import calibrate
from mlxkv.codec.methods import kvtc_rd
from mlxkv.codec.session import CacheCodec
from mlxkv.codec.stages import basis, entropy, weighting
from mlxkv.evaluate.tasks import fidelity
from mlxkv.evaluate.variants import CachedContext, Variant, baseline, codec_variant
from mlxkv.models import cache_spec
from mlxkv.sensitivity import sensitivity

PHASE = 4
QUALITIES = (22, 38)
BASE = "kvtc-rd"
PREDICT = 128

# A change of one idea: constants of the coder in its place, or None where the calibration was made without it.
CHANGES: dict[str, dict[str, Any] | None] = {
    "artifacts bounded": None,
    "a basis eight times finer": None,
    "no weights at all": None,
    "no attention foretold": None,
    "equal steps for keys and values": {"KEYS_COARSER": 1.0},
    "rounding to the nearest": {"ROUNDING": 0.5},
    "restoring at the step": {"OUTWARDS": 0.0},
    "no shift a token": {"SHIFTS": 0},
}

QUICK_CHANGES = ("no weights at all", "rounding to the nearest")


def run(quick: bool) -> Outcome:
    model, tokenizer = lm.load(MODEL)
    size, predict, limit = QUICK if quick else FULL, 64 if quick else PREDICT, artifact_limit(model)
    changes = {name: CHANGES[name] for name in QUICK_CHANGES} if quick else CHANGES
    once = calibration.components_found_once(basis, cache_spec(model).stream("k").width)
    with calibration.dumps(model, tokenizer, size, sensitivity) as files, once:
        base = judged(calibrate(files, kvtc_rd.KVTCRDConfig()))
        others = learn_changed(files, limit, changes)
    variants = [codec_variant(base.with_quality(quality), f"{BASE} {quality}", "float16") for quality in QUALITIES]
    variants += [
        changed_variant(name, quality, others.get(name, base), constants)
        for name, constants in changes.items()
        for quality in QUALITIES
    ]
    samples = []
    held = list(texts.OTHER_KINDS.items())[:: 4 if quick else 2]
    for name, read in track(held, "held-out texts"):
        tokens = tokenizer.encode(read())[: LENGTH + predict + 1]
        for record in fidelity.evaluate(model, [baseline(), *variants], tokens, LENGTH, chunk=predict)[1:]:
            samples.append({"text": name, "kind": kind_of(name), **named(record)})
    config = {"model": MODEL, "calibration": size, "predict": predict, "held": LENGTH, "basis_bytes": limit}
    return Outcome(config, samples, summarise(samples, list(changes)))


def judged(artifacts: CalibrationArtifacts) -> CacheCodec:
    """With a raw window, which no idea changes."""
    return CacheCodec(artifacts, raw_window=True)


def learn_changed(files: Sequence[Any], limit: int, names: Container[str]) -> dict[str, CacheCodec]:
    """Codecs of those changes whose calibration is another."""
    learn = weighting.learn_weights

    def flat(samples: Any) -> tuple[dict[str, np.ndarray], np.ndarray]:
        found, _ = learn(samples, predict_attention=False)
        return {name: np.broadcast_to(np.eye(w.shape[1]), w.shape) for name, w in found.items()}, np.zeros(
            (0, 0), np.float32
        )

    finer = mock.patch.object(kvtc_rd, "BASIS_QUALITY", kvtc_rd.BASIS_QUALITY + 30)
    unforetold = mock.patch.object(weighting, "learn", lambda samples: learn(samples, predict_attention=False))
    patches: dict[str, tuple[Any, kvtc_rd.KVTCRDConfig]] = {
        "artifacts bounded": (nullcontext(), kvtc_rd.KVTCRDConfig(limit)),
        "a basis eight times finer": (finer, kvtc_rd.KVTCRDConfig()),
        "no weights at all": (mock.patch.object(weighting, "learn", flat), kvtc_rd.KVTCRDConfig()),
        "no attention foretold": (unforetold, kvtc_rd.KVTCRDConfig()),
    }
    made = {}
    for name, (patch, settings) in patches.items():
        if name in names:
            with patch:
                made[name] = judged(calibrate(files, settings))
    return made


def changed_variant(name: str, quality: float, codec: CacheCodec, constants: dict[str, Any] | None) -> Variant:
    """`kvtc-rd` with one idea changed."""
    variant = codec_variant(codec.with_quality(quality), f"{name} {quality}", "float16")
    if constants is None:
        return variant
    module = entropy if "SHIFTS" in constants else kvtc_rd

    def hold(model: Any, tokens: Sequence[int], exact: CachedContext | None = None) -> CachedContext:
        with mock.patch.multiple(module, **constants):
            return variant.build(model, tokens, exact)

    return replace(variant, build=hold)


def summarise(samples: list[dict[str, Any]], changes: Sequence[str]) -> dict[str, Any]:
    """Points of every change, and its BD-rate against all ideas together."""
    base = [sample for sample in samples if sample["variant"] == BASE]
    return {
        "predicted_tokens": sum({s["text"]: s["predicted_tokens"] for s in base}.values()),
        "points": {name: means(samples, name) for name in (BASE, *changes)},
        "bd_rate": {name: bd(samples, name, base, 0, np.inf) for name in changes},
    }


def section(result: Result) -> str:
    summary, config = result["summary"], result["config"]
    costs = {name: each["bd_rate"] for name, each in summary["bd_rate"].items() if each["bd_rate"] is not None}
    found = "No change shares a KL with all ideas together."
    if costs:
        dearest = max(costs, key=lambda name: costs[name])
        found = f"The dearest to leave out: {dearest}, {costs[dearest]:+.0%} bytes at equal KL."
    bound = (
        f"Bounded artifacts are those of at most {megabytes(config['basis_bytes'])}, {SHARE:.0%} of the fp16 weights."
    )
    note = f"{summary['predicted_tokens']:,} predicted tokens, qualities {' and '.join(map(str, QUALITIES))}."
    cells = [
        [name, ", ".join(f"{row['ratio_middle']:.1f}x {row['kl']:.4f}" for row in rows),
         rate_cell(summary["bd_rate"].get(name)) if name != BASE else "", megabytes(rows[0]["artifact_bytes"])]
        for name, rows in summary["points"].items()
    ]  # fmt: skip
    heads = ("change", "times smaller, KL", "bytes at equal KL", "artifacts")
    return f"{found} {bound} {note}\n\n{table(heads, cells)}"

"""Does the order hold for other architectures? `kvtc`, `kvtc-weighted` and `kvtc-rd` on the trained miniatures.

Each is calibrated on its training text and codes held-out windows of three kinds, 512 bytes held and 128 predicted. Quick: one
miniature, fewer windows and points.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from benchmarks import held_out, miniature_texts, texts
from benchmarks.rate_distortion import bd, means, named, rate_cell
from benchmarks.schema import Outcome, Result
from benchmarks.tables import table
from mlxkv import lm
from mlxkv.bundled import miniatures
from mlxkv.codec.calibrate import calibrate
from mlxkv.codec.methods import kvtc, kvtc_rd, kvtc_weighted
from mlxkv.codec.session import CacheCodec
from mlxkv.dump import write_dump
from mlxkv.errors import InputError
from mlxkv.evaluate.tasks import fidelity
from mlxkv.evaluate.variants import Variant, baseline, codec_variant
from mlxkv.sensitivity import CONTEXT_TOKENS, PREDICTED_TOKENS, sensitivity

PHASE = 3
RATIOS, QUALITIES = (4, 8, 16, 32, 64, 128), (10, 20, 30, 40, 50, 60)
LENGTH, PREDICT, WINDOW = 512, 128, 32
CALIBRATED = 12  # stretches of training text
LEAST_KL, MOST_KL = 1e-4, 0.1


def run(quick: bool) -> Outcome:
    samples: list[dict[str, Any]] = []
    for name in miniatures.names()[: 1 if quick else None]:
        model, tokenizer = lm.load(name)
        variants = learnt(model, name, CALIBRATED // 3 if quick else CALIBRATED, quick)
        kinds, rows = held_out.rows(name, tokenizer, LENGTH + PREDICT + 1)
        for kind, tokens in track(list(zip(kinds, rows.tolist()))[:: 4 if quick else 1], name):
            for record in fidelity.evaluate(model, [baseline(), *variants], tokens, LENGTH, chunk=PREDICT)[1:]:
                samples.append({"model": name, "text": kind, "kind": kind.rpartition("-")[0], **named(record)})
    config = {"held": LENGTH, "predict": PREDICT, "window": WINDOW, "calibrated": CALIBRATED, "kl": [LEAST_KL, MOST_KL]}
    return Outcome(config, samples, summarise(samples))


def learnt(model: Any, name: str, stretches: int, quick: bool) -> list[Variant]:
    """Codecs of all three methods, as many ratios as a cache so narrow has bits for."""
    stream = np.concatenate(miniature_texts.training())
    variants = []
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.npz" for i in range(stretches)]
        cut: Sequence[list[int]] = texts.spread(stream.tolist(), CONTEXT_TOKENS + PREDICTED_TOKENS, stretches)
        for file, tokens in zip(files, track(cut, f"{name}: calibration dumps")):
            write_dump(file, replace(lm.dump(model, tokens, name=name), sensitivity=sensitivity(model, tokens)))
        for ratio in RATIOS[::2] if quick else RATIOS:
            for kind in (kvtc, kvtc_weighted):
                try:
                    codec = CacheCodec(calibrate(files, kind.Settings(ratio)), recent=WINDOW)
                except InputError:
                    continue
                variants.append(codec_variant(codec, f"{kind.METHOD} {ratio}", "float16"))
        codec = CacheCodec(calibrate(files, kvtc_rd.KVTCRDConfig()), recent=WINDOW, raw_window=True)
    qualities = QUALITIES[::2] if quick else QUALITIES
    return [
        *variants,
        *(codec_variant(codec.with_quality(quality), f"kvtc-rd {quality}", "float16") for quality in qualities),
    ]


def summarise(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each miniature the curves, and BD-rates against `kvtc`."""
    rows = []
    for model in dict.fromkeys(sample["model"] for sample in samples):
        group = [sample for sample in samples if sample["model"] == model]
        base = [sample for sample in group if sample["variant"] == "kvtc"]
        names = ("kvtc-weighted", "kvtc-rd")
        rates = {name: bd(group, name, base, LEAST_KL, MOST_KL) for name in names}
        rows.append(
            {"model": model, "points": {name: means(group, name) for name in ("kvtc", *names)}, "bd_rate": rates}
        )
    return rows


def section(result: Result) -> str:
    rows = result["summary"]
    rates = [row["bd_rate"]["kvtc-rd"]["bd_rate"] for row in rows]
    better = sum(rate is not None and rate < 0 for rate in rates)
    found = f"On {better} of {len(rates)} miniatures `kvtc-rd` needs fewer bytes than `kvtc` at equal KL, {LEAST_KL} to {MOST_KL}."
    heads = ("miniature", "kvtc", "kvtc-rd", "bytes of kvtc-weighted", "bytes of kvtc-rd")
    cells = [
        [row["model"].rpartition("/")[2], curve(row["points"]["kvtc"]), curve(row["points"]["kvtc-rd"]),
         rate_cell(row["bd_rate"]["kvtc-weighted"]), rate_cell(row["bd_rate"]["kvtc-rd"])]
        for row in rows
    ]  # fmt: skip
    return f"{found} Bytes are those of coded tokens, against `kvtc` at equal KL, with 95 % intervals.\n\n{table(heads, cells)}"


def curve(points: list[dict[str, Any]]) -> str:
    """Every other point, as ratio and KL."""
    return ", ".join(f"{point['ratio_middle']:.1f}x {point['kl']:.4f}" for point in points[::2])

"""One command from a model to small files: `mlxkv calibrate --model`, then `mlxkv compress`, timed, on texts of other kinds.

The two commands are run as a user runs them, from the texts that ship along to a file of the newest artifacts. Caches of 2,048
tokens of texts that calibration has not seen, of kinds that the corpus lacks and of Python's documentation, are then coded at
several qualities, and the next tokens predicted. Quick: a minute for calibration, two texts of 768 tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

from rich.progress import track

from benchmarks import texts
from benchmarks.schema import MODEL, NAMED, Outcome, Result
from benchmarks.tables import megabytes, table
from mlxkv import lm
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.session import CacheCodec
from mlxkv.evaluate.tasks import fidelity
from mlxkv.evaluate.variants import baseline, codec_variant

PHASE = 3
LENGTH, QUICK_LENGTH, PREDICT = 2048, 768, 128
QUALITIES, QUICK_QUALITIES = (25, 35, 38, 45), (35,)
DEFAULT = 35
QUICK_MINUTES = 1.0
TIMED = "code"  # the text whose compression is timed
KEYS = ("kl", "top1_agreement", "ratio", "ratio_middle", "tokens")


def run(quick: bool, model: str = MODEL) -> Outcome:
    length, qualities = (QUICK_LENGTH, QUICK_QUALITIES) if quick else (LENGTH, QUALITIES)
    load = round(os.getloadavg()[0], 2)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        budget = ["--budget-minutes", str(QUICK_MINUTES)] if quick else []
        learnt, calibrate_seconds = command(home, "calibrate", "--model", model, *budget)
        loaded, tokenizer = lm.load(model)
        held_out = texts.held_out(model, tokenizer, length + PREDICT + 1)
        held_out = dict(list(held_out.items())[: 2 if quick else None])
        text = home / "prompt.txt"
        text.write_text(tokenizer.decode(held_out.get(TIMED, next(iter(held_out.values())))[:length]), encoding="utf-8")
        _, compress_seconds = command(
            home, "compress", "--model", model, "--prompt-file", text, "--out", home / "a.mlxkv"
        )
        codec = CacheCodec(CalibrationArtifacts.from_dir(learnt["folder"]))
    fingerprint, samples = lm.fingerprint(loaded), []
    variants = [
        baseline(), *(codec_variant(codec.with_quality(q), str(q), fingerprint=fingerprint) for q in qualities)
    ]  # fmt: skip
    for kind, tokens in track(held_out.items(), "texts"):
        records = fidelity.evaluate(loaded, variants, tokens, len(tokens) - PREDICT - 1, chunk=PREDICT)[1:]
        samples += [
            {"text": kind, "quality": quality, **{key: record[key] for key in KEYS}}
            for quality, record in zip(qualities, records)
        ]
    config = {
        "model": model, "texts": list(held_out), "length": length, "predicted": PREDICT, "qualities": qualities,
        "load_average": load, "calibration_tokens": learnt["calibration_tokens"], "kinds": learnt["calibration_kinds"],
        "artifact_bytes": learnt["artifact_bytes"],
    }  # fmt: skip
    found = {"calibrate_seconds": round(calibrate_seconds, 1), "compress_seconds": round(compress_seconds, 1)}
    return Outcome(config, samples, {**found, **summarise(samples), "told": learnt["measured"]})


def command(home: Path, *words: Any) -> tuple[dict[str, Any], float]:
    """Run a command of mlxkv as a user does, with a library of its own; return what it printed, and its seconds."""
    environment = {**os.environ, "MLXKV_ARTIFACTS": str(home / "artifacts")}
    start = perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "mlxkv", *map(str, words), "--json"], env=environment, check=True, stdout=subprocess.PIPE
    )
    return json.loads(done.stdout), perf_counter() - start


def summarise(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the means over texts at each quality, and the divergence of each text at the default one."""
    rows = []
    for quality in sorted({sample["quality"] for sample in samples}):
        chosen = [sample for sample in samples if sample["quality"] == quality]
        means = {key: round(fmean(sample[key] for sample in chosen), 6) for key in KEYS[:-1]}
        rows.append({"quality": quality, **means})
    by_text = [
        {key: sample[key] for key in ("text", "kl", "ratio")} for sample in samples if sample["quality"] == DEFAULT
    ]
    return {"rows": rows, "texts": by_text}


def section(result: Result) -> str:
    """Show what two commands take and give."""
    summary, config = result["summary"], result["config"]
    cells = [
        [f"{row['quality']}", f"{row['ratio']:.1f}x", f"{row['ratio_middle']:.1f}x", f"{row['kl']:.4f}",
         f"{100 * row['top1_agreement']:.1f} %"]
        for row in summary["rows"]
    ]  # fmt: skip
    worst = max(summary["texts"], key=lambda row: row["kl"])
    whole = summary["calibrate_seconds"] + summary["compress_seconds"]
    return (
        f"On {NAMED[config['model']]}: calibration took {summary['calibrate_seconds']:.0f} s and learnt from"
        f" {config['calibration_tokens']:,} tokens; with a file of {config['length']:,} tokens made from it,"
        f" {whole / 60:.1f} minutes in all. Artifacts: {megabytes(config['artifact_bytes'])}. Means over"
        f" {len(config['texts'])} texts; at quality {DEFAULT}, {worst['text']} diverges most, by {worst['kl']:.4f} nats.\n\n"
        + table(("quality", "file", "coded tokens", "KL", "same next token"), cells)
    )

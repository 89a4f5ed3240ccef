"""How well do the trained miniatures model language, and do they look back?

Byte-level miniatures of LFM2, Qwen3, GLM-4.7-Flash and GPT-2 (`benchmarks/miniature_training.py`) read windows of 2,048
bytes of held-out documentation, code and other text, and of the text that they were trained on: bits for each byte,
beside those of models that count bytes and pairs of bytes. Of a stretch that comes again 1,280 bytes later, both bits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm import generate
from mlx_lm.sample_utils import make_sampler

from benchmarks import miniature_texts as texts
from benchmarks import tables
from benchmarks.schema import Outcome, Result
from mlxkv import lm
from mlxkv.bundled import miniatures

PHASE = 1
LONG = 2048  # bytes of a measured window
STRETCH = slice(256, 320)  # bytes of a measured window ...
AGAIN = slice(1536, 1600)  # ... that are put here as well, to see whether the model looks that far back
PROMPT = "The "
HELD_OUT = ("documentation", "code", "other")
LOOKED = 0.9  # a copy that takes fewer of the bits of the first time says that the model looked back


def run(quick: bool) -> Outcome:
    """Quick: every other model, one window of each kind of text."""
    folders = [miniatures.model_path(name) for name in miniatures.names()[:: 2 if quick else 1]]
    windows = 1 if quick else 4
    samples = [record for folder in folders for record in measure(folder, windows)]
    config = {"bytes_of_a_window": LONG, "windows": windows, "held_out_modules": texts.held_out_modules()}
    return Outcome(config, samples, [summarise(folder, samples) for folder in folders])


def measure(folder: Path, windows: int) -> list[dict[str, Any]]:
    """Records of a trained model: bits per byte on each kind of text, of repeated bytes, and a sample of its own."""
    model, tokenizer = lm.load(str(folder))
    records: list[dict[str, Any]] = []
    for kind, rows in texts.windows(LONG, windows).items():
        bits = bits_per_byte(model, rows)
        measured = {
            "bits_per_byte": bits,
            "bits_per_byte_from_0": bits[:, :256],
            "bits_per_byte_from_256": bits[:, 256:1024],
            "bits_per_byte_from_1024": bits[:, 1024:],
            "unigram": texts.unigram_bits(rows),
            "bigram": texts.bigram_bits(rows),
        }
        means = {key: round(float(value.mean()), 3) for key, value in measured.items()}
        records.append({"model": folder.name, "text": kind, "bytes": bits.size, **means})
    records.append({"model": folder.name, "text": "repeated documentation", **recall(model, windows)})
    mx.random.seed(0)
    text = generate(model, tokenizer, PROMPT, max_tokens=200, sampler=make_sampler(0.7))
    return [*records, {"model": folder.name, "text": "its own", "prompt": PROMPT, "sample": text}]


def recall(model: Any, windows: int) -> dict[str, float]:
    """Bits per byte of a stretch of held-out text, and of its copy 1,280 bytes later: fewer if the model looks back."""
    rows = texts.windows(AGAIN.stop, windows)["documentation"]
    rows[:, AGAIN] = rows[:, STRETCH]
    bits = bits_per_byte(model, rows)
    # Bits start at the second byte of a row; eight bytes are given to recognise the stretch by.
    first, again = (float(bits[:, part.start + 7 : part.stop - 1].mean()) for part in (STRETCH, AGAIN))
    return {"bits_per_byte_first": round(first, 3), "bits_per_byte_again": round(again, 3)}


def bits_per_byte(model: Any, rows: np.ndarray) -> np.ndarray:
    """Bits the model needs for each byte but the first of rows `[N, T]`: `[N, T - 1]`."""
    losses = [nn.losses.cross_entropy(model(row[None, :-1]), row[None, 1:]) for row in mx.array(rows)]
    return np.array(mx.concatenate(losses)) / np.log(2)


def summarise(folder: Path, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one model: size, seconds of training, and bits per byte of each kind of text beside the counted models'."""
    training = json.loads((folder / "training.json").read_text())
    facts = {key: training[key] for key in ("parameters", "steps", "seconds")}
    keys = ("bits_per_byte", "bigram", "unigram")
    own = [sample for sample in samples if sample["model"] == folder.name and "bits_per_byte" in sample]
    return {"model": folder.name, **facts, **{sample["text"]: {key: sample[key] for key in keys} for sample in own}}


def section(result: Result) -> str:
    again = {row["model"]: row for row in result["samples"] if row["text"] == "repeated documentation"}
    rows = result["summary"]
    worse = [
        f"`{row['model']}` on {kind}"
        for row in rows
        for kind in HELD_OUT
        if _bits(row, kind) >= _bits(row, kind, "bigram")
    ]
    back = [
        f"`{name}`" for name, row in again.items() if row["bits_per_byte_again"] < LOOKED * row["bits_per_byte_first"]
    ]
    cells = [
        [f"`{row['model']}`", f"{row['parameters'] / 1e6:.1f} million",
         *(f"{_bits(row, kind):.2f} ({_bits(row, kind, 'bigram'):.2f})" for kind in HELD_OUT),
         f"{again[row['model']]['bits_per_byte_first']:.2f}, {again[row['model']]['bits_per_byte_again']:.2f}"]
        for row in rows
    ]  # fmt: skip
    heads = ["miniature", "parameters", *(f"bits a byte, {kind}" for kind in HELD_OUT), "a stretch, and again"]
    return (
        f"Worse than counting pairs of bytes: {', '.join(worse) or 'none'}."
        f" Fewer bits for a stretch that they read {AGAIN.start - STRETCH.start:,} bytes before, by more than"
        f" {tables.percent(1 - LOOKED)}: {', '.join(back) or 'none'}.\n\n"
        f"{tables.table(heads, cells)}\n\nHeld-out text, windows of {result['config']['bytes_of_a_window']:,} bytes; in brackets a model"
        " of counted pairs of bytes."
    )


def _bits(row: dict[str, Any], kind: str, of: str = "bits_per_byte") -> float:
    return row[kind][of]

"""Windows in files: what coding them costs beside the layers that keep all tokens, on Gemma 3 270M.

Three of its 18 layers keep all tokens, the others the newest 512. `kvtc-rd` is calibrated on eight texts of Python's documentation;
caches of other texts are coded, and the next tokens predicted from a cache of which either group of layers, or both, came from the
file. Ratios of a group are of its coded tokens, recent ones stored unquantized; those of files are of complete ones as the command
writes them. Quick: two texts, two qualities, a small calibration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import mlx.core as mx
from rich.progress import track

from benchmarks import calibration, texts
from benchmarks.schema import Outcome, Result
from benchmarks.tables import table
from mlxkv import lm
from mlxkv.codec.calibrate import calibrate
from mlxkv.codec.methods.kvtc_rd import KVTCRDConfig
from mlxkv.codec.session import CacheCodec
from mlxkv.dump import KVDump
from mlxkv.io.container import Reader

PHASE = 3
GEMMA = "gemma3-270m"
SIZE, QUICK = {"texts": 8, "tokens": 1024}, {"texts": 2, "tokens": 672}
QUALITIES, QUICK_QUALITIES = (25, 30, 36, 42), (25, 36)
KINDS = ("code", "documentation-0", "documentation-1", "legal", "essay", "chat-travel")
LENGTH, PREDICT = 1024, 128
PARTS = ("full layers", "windows", "both")


def run(quick: bool) -> Outcome:
    size, qualities = (QUICK, QUICK_QUALITIES) if quick else (SIZE, QUALITIES)
    kinds = KINDS[: 2 if quick else None]
    model, tokenizer = lm.load(GEMMA)
    held_out = texts.held_out(GEMMA, tokenizer, LENGTH + PREDICT)
    with calibration.dumps(model, tokenizer, size) as files:
        artifacts = calibrate(files, KVTCRDConfig())
    samples = []
    for kind in track(kinds, "texts"):
        context, following = held_out[kind][:LENGTH], held_out[kind][LENGTH:]
        dump = lm.dump(model, context, dtype="float16")
        exact = log_probabilities(model, dump, following)
        for quality in qualities:
            codec = CacheCodec(artifacts, quality=quality, raw_window=True)
            blob = codec.compress_dump(dump)
            ratios = coded_ratios(blob, dump)
            whole = len(CacheCodec(artifacts, quality=quality).compress_dump(dump))
            for part, found in zip(PARTS, parts(dump, codec.decompress_dump(blob, limit=4 * dump.fp16_bytes))):
                kl = (mx.exp(exact) * (exact - log_probabilities(model, found, following))).sum(axis=-1)
                row = {"text": kind, "quality": quality, "part": part, "kl": round(float(mx.mean(kl)), 6)}
                samples.append(row | {"ratio": ratios[part], "file_ratio": round(dump.fp16_bytes / whole, 2)})
    config = {
        "model": GEMMA, "calibration": size, "qualities": qualities, "kinds": kinds, "length": LENGTH, "predicted": PREDICT,
        "artifact_bytes": artifacts.nbytes,
    }  # fmt: skip
    return Outcome(config, samples, summarise(samples))


def log_probabilities(model: Any, dump: KVDump, tokens: Sequence[int]) -> mx.array:
    """Return the model's predictions after each of some tokens, `[n, vocabulary]`, from a cache that was restored."""
    logits = model(mx.array([list(tokens)]), cache=lm.restore(model, dump))[0].astype(mx.float32)
    found = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(found)
    return found


def parts(exact: KVDump, coded: KVDump) -> list[KVDump]:
    """Return the cache with the full layers, the windows, and both as they were coded."""
    return [replace(exact, k=coded.k, v=coded.v), replace(exact, others=coded.others), coded]


def coded_ratios(blob: bytes, dump: KVDump) -> dict[str, float]:
    """Return the ratio of each group's coded tokens, sinks and recent tokens left out, and that of both."""
    with Reader(blob) as reader:
        plain, layout = set(reader.header["raw"]), reader.header["layout"]
        stored = {name: section.stored for name, section in reader.sections.items() if name not in plain}
    coded = [sum(size for name, size in stored.items() if name.startswith("1.") is bool(group)) for group in (0, 1)]
    sinks, recent = layout["s"], layout["w"]
    held = []
    for group in (0, 1):
        rows = dump.stream("k", group).shape[3]
        middle = rows - recent - (sinks if rows == dump.length else 0)
        held.append(sum(2 * dump.stream(name, group).size * middle // rows for name in ("k", "v")))
    sums = [(held[0], coded[0]), (held[1], coded[1]), (sum(held), sum(coded))]
    return {part: round(before / after, 2) for part, (before, after) in zip(PARTS, sums)}


def summarise(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each quality: each text's scores, and means over texts of KL and of bytes."""
    rows = []
    for quality in dict.fromkeys(sample["quality"] for sample in samples):
        row: dict[str, Any] = {"quality": quality}
        for part in PARTS:
            chosen = [s for s in samples if (s["quality"], s["part"]) == (quality, part)]
            row[part] = {
                "kl": round(fmean(s["kl"] for s in chosen), 5),
                "ratio": round(1 / fmean(1 / s["ratio"] for s in chosen), 2),
                "texts": {s["text"]: {"kl": s["kl"], "ratio": s["ratio"]} for s in chosen},
            }
        row["file_ratio"] = round(1 / fmean(1 / s["file_ratio"] for s in samples if s["quality"] == quality), 2)
        rows.append(row)
    return rows


def section(result: Result) -> str:
    """Show means, then the full layers text by text."""
    rows, kinds = result["summary"], result["config"]["kinds"]
    heads = ("quality", *(f"{part}: {score}" for part in PARTS for score in ("KL", "ratio")), "whole file")
    means = [
        [str(row["quality"]), *(cell for part in PARTS for cell in (f"{row[part]['kl']:.4f}", f"{row[part]['ratio']:.1f}x")),
         f"{row['file_ratio']:.1f}x"]
        for row in rows
    ]  # fmt: skip
    by_text = [
        [str(row["quality"])]
        + [f"{found['kl']:.4f} at {found['ratio']:.1f}x" for found in row["full layers"]["texts"].values()]
        for row in rows
    ]
    return (
        f"Means over {len(kinds)} texts of {result['config']['length']:,} tokens; the windows are about two thirds of the cache."
        f"\n\n{table(heads, means)}\n\nThe full layers alone, text by text:\n\n{table(('quality', *kinds), by_text)}"
    )

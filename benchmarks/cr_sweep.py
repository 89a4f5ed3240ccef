"""Compression ratio against fidelity: the `kvtc` method at ratios 2 to 32 on SmolLM2, on text it was not calibrated on.

Calibrates on Python's documentation, compresses 768-token caches of other text between sinks and window, and lets
the model predict the next 200 tokens from the restored cache. One 2,048-token text shows whole-file ratios.

    python -m benchmarks.cr_sweep [--quick]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.progress import track

from benchmarks import texts
from benchmarks.schema import RESULTS, write_result
from mlxkv import lm
from mlxkv.codec.calibrate import calibrate
from mlxkv.codec.kvtc import KVTCCacheCodec, Settings
from mlxkv.evaluate import fidelity
from mlxkv.files import write_dump

MODEL = "smollm2-135m"
RATIOS = (2, 4, 8, 16, 32)
LENGTH, LONG, PREDICT = 768, 2048, 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="ratios 4 and 16 on a quarter of the texts; writes nothing"
    )
    quick = parser.parse_args().quick
    model, tokenizer = lm.load(MODEL)
    calibration = {"texts": 2 if quick else 20, "tokens": 1536}
    ratios = (4, 16) if quick else RATIOS
    with tempfile.TemporaryDirectory() as folder:
        files = dump_all(model, tokenizer, Path(folder), calibration)
        starts = prefixes(model, tokenizer, quick)
        samples = []
        for ratio in track(ratios, "ratios"):
            codec = KVTCCacheCodec(calibrate(files, Settings(ratio)))
            for (kind, text), start in starts.items():
                record = fidelity.evaluate(model, codec, start)
                samples.append({"compression_ratio": ratio, "kind": kind, "text": text, **record})
    summary = summarise(samples)
    for row in summary:
        print(row)
    if not quick:
        config = {"model": MODEL, "dtype": "float16", "calibration": calibration, "predict": PREDICT, "seed": 0}
        print(write_result("cr_sweep", config, samples, summary), plot(summary))


def dump_all(model: Any, tokenizer: Any, folder: Path, calibration: dict[str, int]) -> list[Path]:
    """Dump the calibration texts; the files."""
    stretches = texts.calibration(tokenizer, calibration["tokens"], calibration["texts"])
    files = []
    for index, tokens in enumerate(track(stretches, "calibration dumps")):
        files.append(folder / f"{index}.npz")
        write_dump(files[-1], lm.dump(model, tokens, name=MODEL, dtype="float16"))
    return files


def prefixes(model: Any, tokenizer: Any, quick: bool) -> dict[tuple[str, str], fidelity.Prefix]:
    """Every held-out text, prefilled once: four of the calibration's kind, eight of other kinds, one long."""
    same = texts.same_kind(tokenizer, LENGTH + PREDICT + 1, 4)
    cut = {("same", f"documentation-{i}"): (LENGTH, tokens) for i, tokens in enumerate(same)}
    for name, text in texts.OTHER_KINDS.items():
        cut["other", name] = (LENGTH, tokenizer.encode(text()))
    cut["long", "documentation-long"] = (LONG, texts.same_kind(tokenizer, LONG + PREDICT + 1, 1)[0])
    chosen = dict(list(cut.items())[::4]) if quick else cut
    return {
        key: fidelity.prefix(model, tokens, length, predict=PREDICT, name=MODEL, dtype="float16")
        for key, (length, tokens) in track(chosen.items(), "held-out texts")
    }


def summarise(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over texts for each ratio and kind of text."""
    rows = []
    for ratio in sorted({sample["compression_ratio"] for sample in samples}):
        for kind in ("same", "other", "long"):
            group = [s for s in samples if (s["compression_ratio"], s["kind"]) == (ratio, kind)]
            keys = (
                "ratio",
                "ratio_middle",
                "kl",
                "top1_agreement",
                "perplexity_reference",
                "perplexity_delta",
                "k_relative_error",
                "v_relative_error",
                "artifact_bytes",
            )
            if group:
                means = {key: round(fmean(sample[key] for sample in group), 5) for key in keys}
                rows.append({"compression_ratio": ratio, "kind": kind, "texts": len(group), **means})
    return rows


def plot(summary: list[dict[str, Any]]) -> Path:
    """Ratio of the coded middle against KL, one line for each kind of text."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    labels = {"same": "documentation, as in calibration", "other": "legal, fiction, essay, chat, code, API"}
    for (kind, label), color, marker in zip(labels.items(), ("#0072B2", "#D55E00"), "os"):
        rows = [row for row in summary if row["kind"] == kind]
        x, y = [row["ratio_middle"] for row in rows], [row["kl"] for row in rows]
        axes.plot(x, y, color=color, marker=marker, label=f"held-out text: {label}")
        for row in rows if kind == "same" else []:
            axes.annotate(
                f"{row['compression_ratio']}x budget",
                (row["ratio_middle"], row["kl"]),
                textcoords="offset points",
                xytext=(5, -12),
                fontsize=8,
            )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="times smaller than fp16, in file bytes (coded tokens)",
        ylabel="KL to the untouched cache (nats a token)",
    )
    axes.set_xticks(ticks := [2, 4, 8, 16, 32], [f"{tick}x" for tick in ticks])
    axes.set(xlim=(2.4, 52), ylim=(4e-4, 6e-2))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.set_title("KVTC on SmolLM2-135M: what the model notices", loc="left")
    path = RESULTS / "cr_sweep.png"
    figure.savefig(path, dpi=160, metadata={"Software": None})
    return path


if __name__ == "__main__":
    main()

"""Compression ratio against fidelity: the `kvtc` method at ratios 2 to 32 on SmolLM2, on text it was not calibrated on.

Calibrates on Python's documentation, compresses 768-token caches of other text between sinks and window, and lets
the model predict the next 200 tokens from the restored cache. One 2,048-token text shows whole-file ratios.
Quick: ratios 4 and 16, three texts and a small calibration.
"""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.progress import track

from benchmarks import calibration, texts
from benchmarks.held_out import MODEL
from benchmarks.schema import Outcome, Result
from benchmarks.tables import megabytes, percent, table
from mlxkv import lm
from mlxkv.codec.session import CacheCodec
from mlxkv.evaluate.tasks import fidelity
from mlxkv.evaluate.variants import baseline, codec_variant

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PHASE = 3
RATIOS = (2, 4, 8, 16, 32)
LENGTH, LONG, PREDICT = 768, 2048, 200


def run(quick: bool) -> Outcome:
    model, tokenizer = lm.load(MODEL)
    size = calibration.QUICK if quick else calibration.FULL
    ratios = (4, 16) if quick else RATIOS
    artifacts = calibration.calibrated(model, tokenizer, size, ratios)
    variants = [codec_variant(CacheCodec(learnt), f"{ratio}x", "float16") for ratio, learnt in artifacts.items()]
    long, predict = (LENGTH, 64) if quick else (LONG, PREDICT)
    chosen = held_out(tokenizer, long, predict)[:: 6 if quick else 1]
    samples = []
    for kind, text, length, tokens in track(chosen, "held-out texts"):
        records = fidelity.evaluate(model, [baseline(), *variants], tokens, length, chunk=predict)[1:]
        for ratio, record in zip(ratios, records):
            samples.append({"compression_ratio": ratio, "kind": kind, "text": text, **record})
    config = {"model": MODEL, "dtype": "float16", "calibration": size, "predict": predict, "seed": 0}
    return Outcome(config, samples, summarise(samples))


def held_out(tokenizer: Any, long: int, predict: int) -> list[tuple[str, str, int, list[int]]]:
    """Kind, name, length that is held, and tokens: four texts of the calibration's kind, eight of others, one long."""
    same = texts.same_kind(tokenizer, LENGTH + predict + 1, 4)
    cut = [("same", f"documentation-{i}", LENGTH, tokens) for i, tokens in enumerate(same)]
    for name, text in texts.OTHER_KINDS.items():
        cut.append(("other", name, LENGTH, tokenizer.encode(text())[: LENGTH + predict + 1]))
    longest = texts.same_kind(tokenizer, long + predict + 1, 1)[0]
    return [*cut, ("long", "documentation-long", long, longest)]


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


def section(result: Result) -> str:
    rows = {(row["compression_ratio"], row["kind"]): row for row in result["summary"]}
    ratios = sorted({ratio for ratio, _ in rows})
    least, most = rows[ratios[0], "same"], rows[ratios[-1], "same"]
    shift = [rows[ratio, "other"]["kl"] / rows[ratio, "same"]["kl"] for ratio in ratios]
    found = (
        f"On text of the calibration's kind KL goes from {least['kl']:.4f} at {least['ratio_middle']:.1f} times fewer bytes (of"
        f" the coded middle) to {most['kl']:.4f} at {most['ratio_middle']:.1f} times. On other text it is {min(shift):.1f} to"
        f" {max(shift):.1f} times as much."
    )
    note = (
        f"Held-out texts: {least['texts']} of the calibration's kind, {rows[ratios[0], 'other']['texts']} of others (of legal,"
        " fiction, essay, three chats, code, API reference). A budget is what the plan may spend; the middle is what its codes"
        " then take in the file."
    )
    heads = ("budget", "middle", "KL, same kind", "top-1", "perplexity", "KL, other kinds", "top-1", "perplexity")
    cells = [
        [f"{ratio}x", f"{rows[ratio, 'same']['ratio_middle']:.1f}x"]
        + [cell for kind in ("same", "other") for cell in fidelity_cells(rows[ratio, kind])]
        for ratio in ratios
    ]
    return "\n\n".join([found, note, table(heads, cells), whole_files(result)])


def fidelity_cells(row: dict[str, Any]) -> list[str]:
    change = f"{row['perplexity_reference']:.1f} {row['perplexity_delta']:+.2f}"
    return [f"{row['kl']:.4f}", percent(row["top1_agreement"]), change]


def whole_files(result: Result) -> str:
    """The long text alone, with all that is in its files and beside them."""
    rows = [sample for sample in result["samples"] if sample["kind"] == "long"]
    heads = ("budget", "fp16 cache", "file", "ratio", "middle", "K / V error", "KL", "perplexity", "artifacts")
    cells = [
        [
            f"{row['compression_ratio']}x", megabytes(row["fp16_bytes"]), megabytes(row["file_bytes"]), f"{row['ratio']:.1f}x",
            f"{row['ratio_middle']:.1f}x", f"{row['k_relative_error']:.4f} / {row['v_relative_error']:.4f}", f"{row['kl']:.4f}",
            f"{row['perplexity_reference']:.2f} -> {row['perplexity']:.2f}", megabytes(row["artifact_bytes"]),
        ]
        for row in rows
    ]  # fmt: skip
    return f"The same at {rows[0]['tokens']:,} tokens, one held-out text, whole files:\n\n{table(heads, cells)}"


def figure(result: Result) -> Figure:
    """Ratio of the coded middle against KL, one line for each kind of text."""
    from benchmarks import figures

    drawn, ((axes,),) = figures.panes(width=7, height=4.2)
    labels = {"same": "documentation, as in calibration", "other": "legal, fiction, essay, chat, code, API"}
    for (kind, label), color, marker in zip(labels.items(), figures.COLORS, figures.MARKERS):
        rows = [row for row in result["summary"] if row["kind"] == kind]
        x, y = [row["ratio_middle"] for row in rows], [row["kl"] for row in rows]
        axes.plot(x, y, color=color, marker=marker, label=f"held-out text: {label}")
        for row in rows if kind == "same" else []:
            axes.annotate(
                f"{row['compression_ratio']}x budget", (row["ratio_middle"], row["kl"]),
                textcoords="offset points", xytext=(5, -12), fontsize=8,
            )  # fmt: skip
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="times smaller than fp16, in file bytes (coded tokens)",
        ylabel="KL to the untouched cache (nats a token)",
    )
    axes.set_xticks(ticks := [2, 4, 8, 16, 32], [f"{tick}x" for tick in ticks])
    axes.set_xlim(right=1.4 * max(row["ratio_middle"] for row in result["summary"]))
    axes.margins(y=0.1)
    axes.minorticks_off()
    axes.legend()
    return drawn

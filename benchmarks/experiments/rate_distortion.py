"""Rate against distortion: what `kvtc-rd` saves at equal KL, text by text.

All are calibrated on the same dumps of Python's documentation. Caches of eight texts of other kinds are coded between sinks and
recent tokens, and the next tokens predicted. Bytes are those of the coded tokens' sections in the file. Two texts of 2,048
tokens show whole files as their commands write them: the recent tokens of `kvtc` unquantized, those of `kvtc-rd` coded. The BD-rate is
the mean difference of bytes at equal KL; its interval resamples the texts.
Quick: fewer points, two texts, a small calibration.
On another language model: calibrated on 8 texts, and fewer points.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from mlx.utils import tree_flatten
from rich.progress import track

from benchmarks import calibration, texts
from benchmarks.paired import Curve, bd_rate
from benchmarks.schema import MODEL, Outcome, Result
from benchmarks.tables import megabytes, percent, table
from benchmarks.variants import mlx_quantized
from mlxkv import lm
from mlxkv.codec.layout import BLOCK_ROWS, Layout
from mlxkv.codec.methods import kvtc, kvtc_rd, kvtc_weighted
from mlxkv.codec.session import CacheCodec
from mlxkv.codec.stages.dead_zone import dequantize
from mlxkv.codec.stages.rows import to_rows
from mlxkv.evaluate.tasks import fidelity
from mlxkv.evaluate.variants import baseline, codec_variant
from mlxkv.sensitivity import CONTEXT_TOKENS, PREDICTED_TOKENS
from mlxkv.spec import STREAMS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PHASE = 3
FULL = {"texts": 20, "tokens": CONTEXT_TOKENS + PREDICTED_TOKENS}
OTHER = {"texts": 8, "tokens": CONTEXT_TOKENS + PREDICTED_TOKENS}
QUICK = {"texts": 1, "tokens": CONTEXT_TOKENS + PREDICTED_TOKENS, "rank": 512}
# Ratios of kvtc and of kvtc-weighted, qualities of kvtc-rd, and bits of mx.quantize, which knows no windows.
POINTS = (4, 8, 16, 32, 64), (4, 16, 64), (15, 22, 30, 38, 46), (8, 4, 3, 2)
OTHER_POINTS = (4, 16, 64), (), (15, 22, 30, 38, 46), ()
QUICK_POINTS = (8, 32), (8,), (22, 38), (4,)
SHARE = 0.15  # of fp16 weights, for artifacts
LENGTH, LONG, PREDICT = 768, 2048, 256
SINKS, RECENT = 4, 128
LEAST_KL, MOST_KL = 0.003, 0.05
RESAMPLES = 2000
KINDS = {"legal": "prose", "story": "prose", "essay": "prose", "code": "code", "reference": "code"}
BOUND = "Gaussian R(D)"


def run(quick: bool, model: str = MODEL) -> Outcome:
    loaded, tokenizer = lm.load(model)
    size = QUICK if quick else FULL if model == MODEL else OTHER
    points = QUICK_POINTS if quick else POINTS if model == MODEL else OTHER_POINTS
    ratios, weights, qualities, bits = points
    predict, limit, rank = 64 if quick else PREDICT, artifact_limit(loaded), size.get("rank")
    published = [kvtc.KVTCConfig(compression_ratio=ratio, rank=rank) for ratio in ratios]
    weighted = [kvtc_weighted.KVTCWeightedConfig(compression_ratio=ratio, rank=rank) for ratio in weights]
    with calibration.dumps(loaded, tokenizer, size) as files:
        *learnt, ours = calibration.learn(files, [*published, *weighted, kvtc_rd.KVTCRDConfig(basis_bytes=limit)])
    names = [*(f"kvtc {ratio}" for ratio in ratios), *(f"kvtc-weighted {ratio}" for ratio in weights)]
    others = [codec_variant(CacheCodec(found), name, "float16") for name, found in zip(names, learnt)]
    bounded = CacheCodec(ours, raw_window=True)  # as the others have
    coded, filed = (
        [codec_variant(codec.with_quality(quality), f"kvtc-rd {quality}", "float16") for quality in qualities]
        for codec in (bounded, CacheCodec(ours))
    )
    quantized = [mlx_quantized(each, SINKS, RECENT) for each in bits]
    samples = []
    held = list(texts.OTHER_KINDS.items())[:: 8 if quick else 1]
    for name, read in track(held, "held-out texts"):
        tokens = tokenizer.encode(read())[: LENGTH + predict + 1]
        variants = [baseline(), *others, *coded, *quantized]
        for record in fidelity.evaluate(loaded, variants, tokens, LENGTH, chunk=predict)[1:]:
            samples.append({"text": name, "kind": kind_of(name), **named(record)})
        for quality in qualities if model == MODEL else ():  # of the keys and values of all tokens, not of windows
            samples.append({"text": name, **gaussian(loaded, tokens[:LENGTH], bounded, quality)})
    for name in () if quick else ("code", "reference"):
        tokens = tokenizer.encode(texts.OTHER_KINDS[name]())[: LONG + PREDICT + 1]
        variants = [baseline(), *others[: len(ratios)], *filed]
        for record in fidelity.evaluate(loaded, variants, tokens, LONG, chunk=PREDICT)[1:]:
            samples.append({"text": name, "kind": "long", **named(record)})
    config = {
        "model": model, "dtype": "float16", "calibration": size, "predict": predict, "held": LENGTH, "sinks": SINKS,
        "recent": RECENT, "kl": [LEAST_KL, MOST_KL], "basis_bytes": limit, "seed": 0,
        "weights_fp16_bytes": round(limit / SHARE),
    }  # fmt: skip
    return Outcome(config, samples, summarise(samples))


def kind_of(text: str) -> str:
    """Return prose, code or chat."""
    return KINDS.get(text, "chat")


def artifact_limit(model: Any) -> int:
    """Return the bytes of artifacts, at most."""
    return int(SHARE * 2 * sum(value.size for value in dict(tree_flatten(model.parameters())).values()))


def gaussian(model: Any, tokens: Sequence[int], codec: CacheCodec, quality: float) -> dict[str, Any]:
    """Return the bytes that reverse water-filling would take at the squared error of a quality.

    For Gaussian coefficients of the text's own variances, those of `codec`'s method, `kvtc-rd`.
    """
    dump = lm.dump(model, tokens, dtype="float16")
    coder = codec.coder
    assert isinstance(coder, kvtc_rd.KVTCRDCoder)
    coefficients: dict[str, list[np.ndarray]] = {name: [] for name in STREAMS}
    errors: dict[str, list[np.ndarray]] = {name: [] for name in STREAMS}
    layout = Layout(batch=1, length=len(tokens), sinks=SINKS, recent=RECENT, block_tokens=BLOCK_ROWS)
    for _, start, stop in layout.blocks():
        rows = {name: to_rows(dump.spec.stream(name), list(dump.stream(name)), start, stop) for name in STREAMS}
        codes = coder.encode(rows, quality)
        for name, found in coder.coefficients(rows, quality).items():
            coefficients[name].append(np.array(found))
            errors[name].append(np.array(found - dequantize(codes[name], kvtc_rd.step_size(quality, name))))
    bits = 0.0
    for name in STREAMS:
        c, e = np.concatenate(coefficients[name]), np.concatenate(errors[name])
        bits += len(c) * water_filling(c.var(axis=0), float(np.square(e).sum(axis=1).mean()))
    return {"variant": BOUND, "at": quality, "kind": "theory", "coded_bytes": bits / 8}


def water_filling(variances: np.ndarray, distortion: float) -> float:
    """Return the bits of Gaussian components `[r]` at this sum of squared errors."""
    low, high = 0.0, float(variances.max())
    for _ in range(60):
        level = (low + high) / 2
        low, high = (level, high) if np.minimum(variances, level).sum() < distortion else (low, level)
    return float(np.log2(np.maximum(variances / max(high, 1e-30), 1)).sum() / 2)


def named(record: dict[str, Any]) -> dict[str, Any]:
    """Return what of a record is kept, with the variant's name and its budget, quality or bits apart."""
    name, at = record["variant"].rsplit(" ", 1)
    keys = ("coded_bytes", "cache_bytes", "ratio", "ratio_middle", "kl", "top1_agreement", "perplexity_delta", "artifact_bytes",
            "fp16_bytes", "perplexity_reference", "sink_and_window_bytes", "tokens", "predicted_tokens")  # fmt: skip
    return {**{key: record[key] for key in keys if key in record}, "variant": name, "at": float(at)}


def summarise(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return points of every curve, BD-rates against `kvtc`, and bytes against R(D)."""
    measured = [sample for sample in samples if sample["kind"] not in ("long", "theory")]
    names = list(dict.fromkeys(sample["variant"] for sample in measured))
    points = {name: means(measured, name) for name in names}
    against = [name for name in ("kvtc-weighted", "kvtc-rd", "mx.quantize") if name in names]
    theory = []
    for at in sorted({sample["at"] for sample in samples if sample["kind"] == "theory"}):
        spent, least = (
            sum(s["coded_bytes"] for s in samples if (s["variant"], s["at"]) == (name, at) and s["kind"] != "long")
            for name in ("kvtc-rd", BOUND)
        )
        theory.append({"quality": at, "bytes_over_gaussian": round(spent / least, 4)})
    long = [sample for sample in samples if sample["kind"] == "long"]
    return {
        "predicted_tokens": sum({s["text"]: s["predicted_tokens"] for s in measured}.values()),
        "points": points,
        "bd_rate": {name: bd(measured, name, [s for s in measured if s["variant"] == "kvtc"]) for name in against},
        "theory": theory,
        "long": {name: means(long, name) for name in dict.fromkeys(s["variant"] for s in long)},
    }


def means(samples: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Return a curve's points, averaged over texts."""
    rows = []
    for at in sorted({s["at"] for s in samples if s["variant"] == name}):
        group = [s for s in samples if (s["variant"], s["at"]) == (name, at)]
        keys = [key for key, value in group[0].items() if isinstance(value, int | float) and key != "at"]
        rows.append({"at": at, "texts": len(group), **{key: round(fmean(s[key] for s in group), 6) for key in keys}})
    return rows


def bd(samples: list[dict[str, Any]], name: str, base: list[dict[str, Any]], least: float = LEAST_KL,
       most: float = MOST_KL) -> dict[str, Any]:  # fmt: skip
    """Return the BD-rate of a method against `base` and its 95 % interval by resampling texts."""
    ours = [s for s in samples if s["variant"] == name]
    kinds = sorted({s["text"] for s in base})
    curves = [{text: {s["at"]: (s["coded_bytes"], s["kl"]) for s in group if s["text"] == text} for text in kinds}
              for group in (ours, base)]  # fmt: skip

    def rate(chosen: Sequence[str]) -> float | None:
        averaged: list[Curve] = [
            [tuple(np.mean([curve[text][at] for text in chosen], axis=0)) for at in curve[chosen[0]]]
            for curve in curves
        ]
        return bd_rate(averaged[0], averaged[1], least, most)

    random = np.random.default_rng(0)
    drawn = [rate([kinds[i] for i in random.integers(len(kinds), size=len(kinds))]) for _ in range(RESAMPLES)]
    found, sure = rate(kinds), [value for value in drawn if value is not None]
    interval = [round(float(q), 4) for q in np.quantile(sure, (0.025, 0.975))] if sure else None
    return {"bd_rate": None if found is None else round(found, 4), "interval": interval}


def brief(result: Result) -> str:
    """Say what a README shows: how much is saved, and the files that come out."""
    return f"{saved(result)}\n\n{whole_files(result['summary'])}"


def saved(result: Result) -> str:
    """Say how many bytes `kvtc-rd` saves at equal KL."""
    summary, config = result["summary"], result["config"]
    ours = summary["bd_rate"]["kvtc-rd"]
    found = (
        f"`kvtc-rd` has one calibration for all ratios, and artifacts of {megabytes(config['basis_bytes'])} or less, {SHARE:.0%} of"
        " the model's fp16 weights. "
    )
    if ours["bd_rate"] is None:
        return f"{found}Here it and `kvtc` share no KL to be compared at."
    low, high = ours["interval"]
    count = summary["points"]["kvtc-rd"][0]["texts"]
    return (
        f"{found}Over KL {LEAST_KL} to {MOST_KL}, as far as both reach, it needs {-ours['bd_rate']:.0%} fewer bytes than `kvtc` at"
        f" equal KL (95 % interval over {count} texts of kinds that calibration did not see: {-high:.0%} to {-low:.0%})."
    )


def section(result: Result) -> str:
    summary = result["summary"]
    shown = ("kvtc", "kvtc-weighted", "kvtc-rd", "mx.quantize")
    heads = ("method", "at", "times smaller", "KL", "top-1", "perplexity", "BD-rate against kvtc")
    cells = [
        [name, f"{row['at']:g}", f"{row['ratio_middle']:.1f}x", f"{row['kl']:.4f}", percent(row["top1_agreement"]),
         f"{row['perplexity_delta']:+.2f}", rate_cell(summary["bd_rate"].get(name)) if not i else ""]
        for name in shown if name in summary["points"]
        for i, row in enumerate(summary["points"][name])
    ]  # fmt: skip
    note = f'{summary["predicted_tokens"]:,} predicted tokens. "At" is a budget, a quality or bits; bytes are those of coded tokens alone.'
    parts = [saved(result), note, table(heads, cells), *([whole_files(summary)] if summary["long"] else [])]
    if not summary["theory"]:
        return "\n\n".join(parts)
    theory = ", ".join(f"{row['bytes_over_gaussian']:.3f} at quality {row['quality']:g}" for row in summary["theory"])
    parts.append(
        "Bytes over those of reverse water-filling, were the coefficients Gaussian with each text's own variances, at the same"
        f" squared error: {theory}. It is no floor for coefficients with heavy tails."
    )
    return "\n\n".join(parts)


def rate_cell(rate: dict[str, Any] | None) -> str:
    """Return a BD-rate and its interval."""
    if rate is None or rate["bd_rate"] is None:
        return "-"
    low, high = rate["interval"]
    return f"{rate['bd_rate']:+.0%} ({low:+.0%} to {high:+.0%})"


def whole_files(summary: dict[str, Any]) -> str:
    heads = ("method", "at", "file", "ratio", "of it sinks and window", "KL", "artifacts")
    cells = [
        [name, f"{row['at']:g}", megabytes(row["cache_bytes"]), f"{row['ratio']:.1f}x", megabytes(row["sink_and_window_bytes"]),
         f"{row['kl']:.4f}", megabytes(row["artifact_bytes"])]
        for name, rows in summary["long"].items()
        for row in rows
    ]  # fmt: skip
    return (
        f"Whole files of {LONG:,} tokens, as `mlxkv compress` writes them: everything in them counts. `kvtc` keeps the newest tokens"
        f" raw, `kvtc-rd` codes them finer than the rest.\n\n{table(heads, cells)}"
    )


def figure(result: Result) -> Figure:
    """Draw bytes of the coded tokens against KL, one line a method."""
    from benchmarks import figures

    drawn, ((axes,),) = figures.panes(width=7, height=4.2)
    for name in ("kvtc-rd", "kvtc-weighted", "kvtc", "mx.quantize"):
        ratio, kl = ([row[key] for row in result["summary"]["points"].get(name, [])] for key in ("ratio_middle", "kl"))
        axes.plot(ratio, kl, label=name, **figures.look(name))
    axes.set(
        xscale="log", yscale="log", xlabel="times smaller than fp16, in file bytes (coded tokens)",
        ylabel="KL to the untouched cache (nats a token)", ylim=(1e-4, 1),
    )  # fmt: skip
    axes.set_xticks(ticks := [2, 4, 8, 16, 32, 64, 128, 256], [f"{tick}x" for tick in ticks])
    axes.minorticks_off()
    axes.legend()
    return drawn

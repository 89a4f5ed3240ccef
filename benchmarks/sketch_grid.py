"""What sketches buy: as counters of attention, against exact ones, and inside the live methods, against H2O's.

Streams: Count-Min, Count-Sketch and RACE of SmolLM2's attention by position over 1,024 tokens, and of Zipf streams of up to
a million keys: error and recall of the heaviest keys beside exact counters, and Count-Min's bound. Fidelity: width x depth x
strategy x tokens kept, KL over 64 tokens after a context of 1,024, against H2O and StreamingLLM at equal measured bytes,
text by text. Their speed is in benchmarks.profiling.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from statistics import fmean
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from rich.progress import track

from benchmarks import paired, texts
from benchmarks.live_runs import Variants, continued
from benchmarks.schema import Outcome, Result
from benchmarks.tables import interval, percent, table
from mlxkv import lm
from mlxkv.live import live_config
from mlxkv.live.seam import make_cache
from mlxkv.live.sketches import SKETCHES, Race

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PHASE = 6
MODEL = "smollm2-135m"
CONTEXT, PREDICT = 1024, 64
KEPT = (128, 256, 512)  # tokens a head, merged entries among them
CURVE = (128, 256, 512, 640)  # of the methods compared with: beyond KEPT, as a sketch takes bytes too
WIDTHS, DEPTHS, STRATEGIES = (128, 512), (2, 4), ("topk", "aggregate")
EXACT = "exact"  # as good as exact counters; its bytes are not to be looked at
CHANGES: dict[str, dict[str, Any]] = {
    EXACT: {"width": 8192, "depth": 4},
    "count-sketch": {"sketch": "count-sketch"},
    "race": {"sketch": "race", "depth": 8},
    "per layer": {"per": "layer"},
    "64 queries": {"queries": 64},
    "all queries": {"queries": CONTEXT},
    "no decay": {"decay": 1.0},
    **{f"target {target}": {"target": target} for target in (0.8, 0.9)},
}
HEAVIEST = 128  # keys that a sketch is to find
STREAM_WIDTHS = (64, 128, 256, 512, 1024)
KEYS = (2**10, 2**14, 2**17, 2**20)  # of Zipf streams
ZIPF_WIDTHS, ZIPF_DEPTH, ZIPF_SEEDS = (256, 4096, 65536), 4, 3


def run(quick: bool) -> Outcome:
    model, tokenizer = lm.load(MODEL)
    kept, keys = (KEPT[1:2], KEYS[:2]) if quick else (KEPT, KEYS)
    kinds = list(texts.OTHER_KINDS)[:: 4 if quick else 1]
    context, predict = (CONTEXT // 2, PREDICT // 4) if quick else (CONTEXT, PREDICT)
    rows = np.array([tokenizer.encode(texts.OTHER_KINDS[kind]())[: context + predict + 1] for kind in kinds])
    streamed = rows[:, : CONTEXT // 4 if quick else CONTEXT]
    samples = [*streams(model, streamed), *zipf_streams(keys)]
    for record in continued(model, rows, context, variants(kept), "fidelity"):
        samples.append({"measure": "fidelity", **record, "text": kinds[record["text"]]})
    config = {
        "model": MODEL, "context": context, "predict": predict, "seed": 0, "heaviest": HEAVIEST,
        "settings": {name: str(settings) for name, settings in variants(kept).items()},
    }  # fmt: skip
    return Outcome(config, samples, summarise(samples))


def variants(kept: Sequence[int]) -> Variants:
    """`full`, the curves to compare with, the grid, and CHANGES of one of its points."""
    found = {"full": live_config("full")}
    found |= {f"h2o {n}": live_config("h2o", heavy=n // 2, recent=n // 2) for n in CURVE}
    found |= {f"streaming-llm {n}": live_config("streaming-llm", sinks=4, window=n - 4) for n in CURVE}
    for n, strategy, width, depth in product(kept, STRATEGIES, WIDTHS, DEPTHS):
        found[f"{strategy} {n}, {width} x {depth}"] = sketching(strategy, n, width=width, depth=depth)
    found |= {f"topk 256, {change}": sketching("topk", 256, **overrides) for change, overrides in CHANGES.items()}
    return found


def sketching(strategy: str, kept: int, **overrides: Any) -> Any:
    """Settings that keep so many tokens and entries a head on average, shared out as in the presets."""
    entries = {"entries": 16} if strategy == "aggregate" else {}
    recent = kept // (4 if entries else 2)
    heavy = kept - recent - 4 - sum(entries.values())
    return live_config(f"sketch-{strategy}", heavy=heavy, recent=recent - 8, **entries, **overrides)


def streams(model: Any, rows: np.ndarray) -> Iterator[dict[str, Any]]:
    """Sketches of what every position of texts `[B, T]` drew from all queries, of each head and of each layer."""
    caches = make_cache(model, "h2o", heavy=rows.shape[1])  # enough to give up nothing: exact counters
    mx.eval(model(mx.array(rows), cache=caches)[:, -1])
    parts = [entry.tokens for entry in caches]
    keys, drawn = (mx.stack([part[i] for part in parts]) for i in (0, 2))  # [L, B, H, T, D] and [L, B, H, T]
    for per, amounts, vectors in (
        ("head", drawn.flatten(0, 2), keys.flatten(0, 2)),
        ("layer", drawn.sum(axis=2).flatten(0, 1), keys.swapaxes(2, 3).flatten(3, 4).flatten(0, 1)),
    ):
        for kind, width, depth in track(list(product(SKETCHES, STREAM_WIDTHS, DEPTHS)), f"streams, per {per}"):
            names = vectors if SKETCHES[kind] is Race else mx.arange(amounts.shape[1])
            yield {"measure": "stream", "of": f"attention per {per}", **sketched(kind, width, depth, 0, names, amounts)}


def zipf_streams(sizes: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Sketches of what falls on keys whose shares are as 1, 1/2, 1/3, ... in random order."""
    for size, kind, width, seed in product(sizes, ("count-min", "count-sketch"), ZIPF_WIDTHS, range(ZIPF_SEEDS)):
        amounts = 1 / (1 + np.random.default_rng(seed).permutation(size))
        record = sketched(kind, width, ZIPF_DEPTH, seed, mx.arange(size), mx.array(amounts[None], mx.float32))
        yield {"measure": "stream", "of": "zipf", **record}


def sketched(kind: str, width: int, depth: int, seed: int, names: mx.array, amounts: mx.array) -> dict[str, Any]:
    """A sketch of a stream beside exact counters; amounts `[N, T]`, means over the N. Adding each key's sum at once is adding
    its parts one by one. Errors are shares of all that was added."""
    sketch = SKETCHES[kind](width, depth, seed)
    counters = sketch.update(sketch.empty(len(amounts)), names, amounts)
    places, _ = sketch.top_k(counters, names, HEAVIEST)
    exact = np.array(mx.argsort(-amounts, axis=-1)[:, :HEAVIEST])
    errors = np.array((sketch.query(counters, names) - amounts) / amounts.sum(axis=-1, keepdims=True))
    record = {
        "sketch": kind, "width": width, "depth": depth, "seed": seed, "keys": amounts.shape[1],
        "bytes": sketch.nbytes(), "exact_bytes": 4 * amounts.shape[1],
        "recall": fmean(len(np.intersect1d(*pair)) / HEAVIEST for pair in zip(np.array(places), exact)),
        "error": float(np.abs(errors).mean()), "largest_error": float(np.abs(errors).max()), "lowest_error": float(errors.min()),
    }  # fmt: skip
    if kind == "count-min":
        bound = math.e / width
        record |= {"bound": bound, "beyond_bound": float((errors > bound).mean()), "may_be_beyond": math.exp(-depth)}
    return record


def summarise(samples: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Means over seeds and texts; comparisons with the curves at equal bytes."""
    streams, records = ([s for s in samples if s["measure"] == measure] for measure in ("stream", "fidelity"))
    return {"streams": averaged(streams), "fidelity": fidelity(records)}


def averaged(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a sketch and stream."""
    same = ("of", "sketch", "width", "depth", "keys", "bytes", "exact_bytes")
    rows = []
    for group in dict.fromkeys(tuple(sample[key] for key in same) for sample in samples):
        alike = [sample for sample in samples if tuple(sample[key] for key in same) == group]
        means = {key: fmean(s[key] for s in alike) for key in alike[0] if key not in (*same, "measure", "seed")}
        rows.append({**dict(zip(same, group)), **means})
    return rows


def fidelity(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each variant bytes, the geometric mean of KL, and its ratio to H2O's and StreamingLLM's curves at its bytes."""
    rows = []
    for variant in dict.fromkeys(sample["variant"] for sample in samples):
        ours = [sample for sample in samples if sample["variant"] == variant]
        row = {
            "variant": variant,
            "share_of_fp16": fmean(sample["share_of_fp16"] for sample in ours),
            "top1_agreement": fmean(sample["top1_agreement"] for sample in ours),
            "kl_geometric": float(np.exp(np.log([max(s["kl"], paired.LEAST_KL) for s in ours]).mean())),
        }
        if variant.startswith(STRATEGIES):
            for other in ("h2o", "streaming-llm"):
                theirs = [
                    paired.at_bytes(o["cache_bytes"], [(s["cache_bytes"], s["kl"]) for s in samples if s["text"] == o["text"] and s["variant"].startswith(other)])
                    for o in ours
                ]  # fmt: skip
                row[f"against {other}"] = paired.compare([o["kl"] for o in ours], theirs)
        rows.append(row)
    return rows


def section(result: Result) -> str:
    fidelity, streams = result["summary"]["fidelity"], result["summary"]["streams"]
    rows = [row for row in fidelity if "against h2o" in row and not row["variant"].endswith(EXACT)]
    said = []
    for other in ("h2o", "streaming-llm"):
        against = [row[f"against {other}"] for row in rows]
        corrected = paired.holm([each["p"] for each in against])
        ratios, (lows, highs) = (
            [each["kl_ratio"] for each in against],
            zip(*(each["kl_ratio_interval"] for each in against)),
        )
        said.append(
            f"At equal bytes sketches have {min(ratios):.2f} to {max(ratios):.2f} times the KL of {other}; of {len(rows)} the 95 %"
            f" interval is below 1 for {sum(high < 1 for high in highs)}, above 1 for {sum(low > 1 for low in lows)}, and p,"
            f" corrected as Holm does, below 0.05 for {sum(p < 0.05 for p in corrected)}."
        )
    said.append(
        f"(With {against[0]['texts']} texts and as many comparisons it cannot be below"
        f" {min(1, len(rows) * 2 / 2 ** against[0]['texts']):.2g}.)"
    )
    said += [
        f"{row['variant']}, with counters as good as exact ones, has a KL of {row['kl_geometric']:.4f}."
        for row in fidelity
        if row["variant"].endswith(EXACT)
    ]
    smaller = [row for row in streams if row["of"].startswith("attention") and row["bytes"] < row["exact_bytes"]]
    best = max(smaller, key=lambda row: row["recall"])
    bounded = [row for row in streams if "bound" in row]
    said += [
        f"In less bytes than exact counters of {best['keys']:,} tokens take, the best sketch finds {percent(best['recall'])} of"
        f" the {result['config']['heaviest']} positions that draw most ({best['sketch']} {best['width']} x {best['depth']},"
        f" {best['of']}, {percent(best['bytes'] / best['exact_bytes'])} of the bytes).",
        f"Count-Min's bound is kept in {sum(row['beyond_bound'] <= row['may_be_beyond'] for row in bounded)} of {len(bounded)}"
        " streams as often as it promises.",
    ]
    heads = ["sketch", "bytes", "KL", "times H2O's", "95 % of it", "times StreamingLLM's", "95 % of it"]
    cells = []
    for row in rows:
        against = [row["against h2o"], row["against streaming-llm"]]
        ratios = [cell for r in against for cell in (f"{r['kl_ratio']:.2f}", interval(*r["kl_ratio_interval"]))]
        cells.append([row["variant"], percent(row["share_of_fp16"]), f"{row['kl_geometric']:.4f}", *ratios])
    return "\n\n".join([" ".join(said), table(heads, cells)])


def figure(result: Result) -> Figure:
    """Bytes against KL, one line a method and sketch; recall of the heaviest keys of real attention against bytes."""
    from benchmarks import figures

    config, summary = result["config"], result["summary"]
    drawn, panes = figures.panes(2, width=6, height=4.6)
    left, right = panes[0]
    names = [
        "h2o",
        "streaming-llm",
        *(f"{strategy}, {w} x {d}" for strategy in STRATEGIES for w, d in ((128, 2), (512, 4))),
    ]
    for name, color, marker in zip(names, figures.COLORS, figures.MARKERS):
        first, _, size = name.partition(", ")
        points = [r for r in summary["fidelity"] if r["variant"].startswith(f"{first} ") and r["variant"].endswith(f", {size}" if size else "")]  # fmt: skip
        points.sort(key=lambda row: row["share_of_fp16"])
        x, y = [r["share_of_fp16"] for r in points], [r["kl_geometric"] for r in points]
        left.plot(x, y, color=color, marker=marker, label=f"sketch-{name}" if size else name)
    left.set(xscale="log", yscale="log", xlabel="bytes, of fp16's", ylabel="KL to the full cache (nats a token)")
    left.set_xticks(ticks := [0.1, 0.2, 0.3, 0.5, 0.7], [f"{tick:g}" for tick in ticks])
    left.minorticks_off()
    lines = product(SKETCHES, ("head", "layer"))
    for (kind, per), color, marker, style in zip(lines, figures.COLORS, figures.MARKERS, figures.STYLES[:2] * 3):
        points = [
            r for r in summary["streams"] if (r["of"], r["sketch"], r["depth"]) == (f"attention per {per}", kind, 4)
        ]
        x, y = [r["bytes"] / r["exact_bytes"] for r in points], [r["recall"] for r in points]
        right.plot(x, y, style, color=color, marker=marker, label=f"{kind}, per {per}")
    right.axvline(1, color="#000000", lw=0.8)
    right.set(xscale="log", ylim=(0, 1.02), xlabel="bytes, of exact counters' (line: as many)", ylabel=f"of the {config['heaviest']} heaviest positions, found")  # fmt: skip
    right.set_xticks(ticks := [0.25, 0.5, 1, 2, 4], [f"{tick:g}" for tick in ticks])
    right.minorticks_off()
    right.set_title("attention of a context, sketches of 4 rows", loc="left", fontsize=10)
    for axes in (left, right):
        axes.legend(fontsize=8)
    return drawn

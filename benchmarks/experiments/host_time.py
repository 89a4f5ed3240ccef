"""How long does a GPU wait for Python? Building the graph of a decoded token, live caches beside mlx-lm's, on both paths.

The model is called for one token, and what it returns is computed outside the clock. Contenders take turns token by token; what
counts is the thread's own time, and ratios are to mlx-lm's KVCache in the same run. On the Metal path kernels are stubs
(`benchmarks/stubs.py`): what MLX itself does when it is handed a kernel is not in it. Caches are filled with what SmolLM2's own attention
asked over the text (`benchmarks/recorded.py`). Also counted: Python functions called, MLX operations in the graph of the logits, and
kernels launched. The longer text goes through the first layers alone. Quick: a miniature.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from benchmarks import recorded, stubs, texts
from benchmarks.schema import MODEL, NAMED, Outcome, Result
from benchmarks.tables import table
from mlxkv import lm
from mlxkv.live import attach, detach, make_cache

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PHASE = 8
BASE = "KVCache"
THEIRS: dict[str, Callable[[], Any]] = {
    BASE: KVCache,
    "QuantizedKVCache, 8 bits": partial(QuantizedKVCache, 64, 8),
    "QuantizedKVCache, 4 bits": partial(QuantizedKVCache, 64, 4),
}
PATHS: dict[str, Callable[[], AbstractContextManager[Counter[str]]]] = {
    "CPU": lambda: nullcontext(Counter()),
    "Metal": stubs.metal_path,
}
WARM_UP = 4  # tokens
CHUNK = 512  # tokens that caches are filled by
BRIEF = ("int8", "int4", "kivi-2", "smartkv-0.3")
Caches = Mapping[str, list[Any]]


@dataclass(frozen=True)
class Sizes:
    """A row of measurements.

    Parameters
    ----------
    length
        Tokens held.
    layers
        Of the model; None for all.
    decoded
        Tokens timed: 64 pass every point at which a method packs some.
    presets
        Of live methods.
    """

    length: int
    layers: int | None
    decoded: int
    presets: tuple[str, ...]


FULL = (
    Sizes(1024, None, 64, ("full", "int8", "int4", "kivi-2", "smartkv-0.5", "smartkv-0.3", "klt-0.2", "h2o-512", "mp-kvm-512",
                           "streaming-llm-512", "sliding-window-512", "random-512", "sketch-topk-512", "sketch-aggregate-512")),
    Sizes(4096, 6, 64, ("full", "int8", "int4", "kivi-2", "smartkv-0.3", "klt-0.2", "h2o-512")),
)  # fmt: skip
QUICK = (Sizes(192, None, 4, ("full", "int8", "smartkv-0.5", "h2o-96")),)


def run(quick: bool) -> Outcome:
    name, sizes = ("miniature/qwen3", QUICK) if quick else (MODEL, FULL)
    samples: list[dict[str, Any]] = []
    load = os.getloadavg()[0]
    for each in sizes:
        model, tokenizer = lm.load(name)
        if each.layers is not None:
            recorded.shortened(model, each.layers)
        needed = each.length + WARM_UP + each.decoded
        tokens = tokenizer.encode("\n".join(texts.documentation(held_out=True)[1:60]))[:needed]
        recording = recorded.record(model, tokens[: each.length], CHUNK)
        for path, entered in PATHS.items():
            with entered() as launches:
                caches = filled(model, each.presets, recording)
                found = measured(model, caches, tokens[each.length :], launches)
            about = {"path": path, "length": each.length, "layers": len(model.layers)}
            samples += [{**about, **record} for record in found]
    config = {
        "model": name, "sizes": [asdict(each) for each in sizes], "warm_up": WARM_UP, "chunk": CHUNK,
        "load_average": round(load, 2), "threads": os.environ.get("OPENBLAS_NUM_THREADS", "all"),
    }  # fmt: skip
    return Outcome(config, samples, summarise(samples))


def filled(model: Any, presets: Sequence[str], recording: recorded.Recording) -> Caches:
    """Return a cache of each kind that has read the text."""
    caches = {
        **{name: [make() for _ in model.layers] for name, make in THEIRS.items()},
        **{preset: make_cache(model, preset) for preset in presets},
    }
    for cache in caches.values():
        recorded.replay(cache, recording, answered=False)
    return caches


def measured(model: Any, caches: Caches, tokens: Sequence[int], launches: Counter[str]) -> list[dict[str, Any]]:
    """Return a record for each cache: seconds that building the graph of each token took, and what was counted for one."""
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    counts: dict[str, dict[str, float]] = {}
    names = list(caches)
    for place, token in enumerate(tokens):
        for name in names[place % len(names) :] + names[: place % len(names)]:
            # mlx-lm's own caches run as without this package.
            (detach if name in THEIRS else attach)(model)
            if place == 0:
                counts[name] = counted(model, caches[name], token, launches)
                continue
            text = mx.array([[token]])
            start = time.thread_time()
            logits = model(text, cache=caches[name])
            took = time.thread_time() - start
            mx.eval(logits)
            if place >= WARM_UP:
                seconds[name].append(took)
    attach(model)
    return [{"cache": name, **counts[name], "seconds": seconds[name]} for name in caches]


def counted(model: Any, cache: list[Any], token: int, launches: Counter[str]) -> dict[str, float]:
    """Return what one token takes, a layer: Python functions called, operations of MLX, and kernels launched."""
    called = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal called
        called += event == "call" and frame.f_code.co_filename != stubs.__file__

    launches.clear()
    text, before = mx.array([[token]]), sys.getprofile()
    sys.setprofile(count)
    try:
        logits = model(text, cache=cache)
    finally:
        sys.setprofile(before)
    stubs.compute_zeros()
    counts = {"calls": called, "operations": operations(logits), "launches": launches.total()}
    mx.eval(logits)
    return {name: round(number / len(model.layers), 2) for name, number in counts.items()}


def operations(*arrays: mx.array) -> int:
    """Return how many operations have to be computed for arrays."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "graph.dot")
        mx.export_to_dot(str(path), *arrays)
        return path.read_text(encoding="utf-8").count("shape=rectangle")


def summarise(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each record: microseconds a layer, and ratios to KVCache's on the same path at the same length."""
    bases = {(s["path"], s["length"]): s for s in samples if s["cache"] == BASE}
    rows = []
    for sample in samples:
        base, micro = bases[sample["path"], sample["length"]], 1e6 / sample["layers"]
        low, middle, high = quantiles(sample["seconds"], n=4, method="inclusive")
        row = {key: value for key, value in sample.items() if key != "seconds"}
        rows.append({
            **row, "tokens": len(sample["seconds"]), "median": round(micro * middle, 1),
            "quartiles": [round(micro * low, 1), round(micro * high, 1)],
            "mean": round(micro * fmean(sample["seconds"]), 1),
            "ratio": round(middle / median(base["seconds"]), 2),
            "mean_ratio": round(fmean(sample["seconds"]) / fmean(base["seconds"]), 2),
            "operations_ratio": round(sample["operations"] / base["operations"], 2),
        })  # fmt: skip
    return rows


def brief(result: Result) -> str:
    """Say what a README shows: ratios of some presets on the Metal path, at the shortest length."""
    length = result["config"]["sizes"][0]["length"]
    rows = {row["cache"]: row for row in result["summary"] if (row["path"], row["length"]) == ("Metal", length)}
    said = ", ".join(f"{rows[name]['ratio']:.2f} (`{name}`)" for name in BRIEF if name in rows)
    return (
        f"Before a GPU can start on a token of {named(result)}, with {length:,} held, live caches take these times as long as mlx-lm's"
        f" KVCache, Metal's kernels stubbed: {said}."
    )


def named(result: Result) -> str:
    return NAMED.get(result["config"]["model"], result["config"]["model"])


def section(result: Result) -> str:
    """Show a table for each path and length."""
    config, rows = result["config"], result["summary"]
    parts = [brief(result)]
    heads = ("cache", "µs a layer", "quartiles", "of KVCache's", "mean, of KVCache's", "Python calls a layer",
             "MLX operations a layer", "of KVCache's", "kernels a layer")  # fmt: skip
    for length, path in dict.fromkeys((row["length"], row["path"]) for row in rows):
        group = [row for row in rows if (row["length"], row["path"]) == (length, path)]
        parts += [
            f"{length:,} tokens, {group[0]['layers']} layers, the {path} path; {group[0]['tokens']} tokens decoded:",
            table(heads, map(cells, group)),
        ]
    parts.append(
        "Medians of the thread's time, the model's own operations included; the mean also has the tokens at which a method packs"
        " others. On the Metal path MLX's fast operations and this package's kernels are stubs of one operation each. Load average at"
        f" the start: {config['load_average']}."
    )
    return "\n\n".join(parts)


def cells(row: Mapping[str, Any]) -> list[str]:
    """Return a row of a table."""
    return [
        f"`{row['cache']}`", f"{row['median']:.0f}", "{:.0f} to {:.0f}".format(*row["quartiles"]), f"{row['ratio']:.2f}",
        f"{row['mean_ratio']:.2f}", f"{row['calls']:.1f}", f"{row['operations']:.1f}", f"{row['operations_ratio']:.2f}",
        f"{row['launches']:.1f}" if row["path"] == "Metal" else "",
    ]  # fmt: skip


def figure(result: Result) -> Figure:
    """Draw the ratios of both paths at the shortest length."""
    from benchmarks import figures

    length = result["config"]["sizes"][0]["length"]
    rows = [row for row in result["summary"] if row["length"] == length]
    names = list(dict.fromkeys(row["cache"] for row in rows))[::-1]
    drawn, panes = figures.panes(width=6.4, height=0.26 * len(names) + 1)
    axes = panes[0, 0]
    for path, color, shift in (("CPU", figures.SKY, 0.2), ("Metal", figures.BLUE, -0.2)):
        ratios = {row["cache"]: row["ratio"] for row in rows if row["path"] == path}
        places = [place + shift for place in range(len(names))]
        axes.barh(places, [ratios[name] for name in names], 0.4, color=color, label=f"{path} path")
    axes.set_yticks(range(len(names)), names)
    axes.axvline(1, color=figures.BLACK, lw=0.8)
    axes.set(xlabel="host time a token, of KVCache's")
    axes.legend(loc="lower right")
    return drawn

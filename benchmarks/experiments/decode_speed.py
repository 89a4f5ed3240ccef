"""Tokens a second on this machine at two lengths, live caches beside mlx-lm's, and what taking a prompt in costs.

All in one run. Caches take turns token by token, each token until its logits are there. To take a prompt in, what the model asked
while it read the text is recorded once and asked again of each cache (`benchmarks/recorded.py`), in chunks as large as mlx-lm's own:
once for what a cache computes to store the chunks, and, of the shorter text, once with the answers. Quick: a miniature.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean, median, quantiles
from time import perf_counter
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from benchmarks import recorded, texts
from benchmarks.schema import MODEL, NAMED, Outcome, Result
from benchmarks.tables import megabytes, table
from mlxkv import lm
from mlxkv.live import make_cache

PHASE = 8
BASE, FULL = "KVCache", "full"
THEIRS: dict[str, Callable[[], Any]] = {BASE: KVCache, "QuantizedKVCache, 4 bits": partial(QuantizedKVCache, 64, 4)}
PRESETS = (FULL, "int8", "int4", "kivi-2", "smartkv-0.3", "klt-0.2", "h2o-512")
CHUNK = 2048  # tokens: mlx-lm's prefill_step_size
DECODED, WARM_UP = 64, 4  # 64 pass every point at which a method packs some
LENGTHS, ROUNDS = (1024, 4096), 3  # rounds of taking a prompt in
QUICK_PRESETS, QUICK_DECODED, QUICK_LENGTHS = (FULL, "int8", "smartkv-0.3"), 4, (192, 256)
BRIEF = ("int8", "int4", "smartkv-0.3")


def run(quick: bool) -> Outcome:
    name = "miniature/qwen3" if quick else MODEL
    presets, decoded, lengths = (QUICK_PRESETS, QUICK_DECODED, QUICK_LENGTHS) if quick else (PRESETS, DECODED, LENGTHS)
    load, samples = os.getloadavg()[0], []
    model, tokenizer = lm.load(name)
    text = tokenizer.encode("\n".join(texts.documentation(held_out=True)[1:60]))
    for length in lengths:
        recording = recorded.record(model, text[:length], CHUNK)
        # With answers, attention over a long text would take minutes.
        answered = taken_in(model, presets, recording, answered=True)[1] if length == lengths[0] else {}
        caches, stored = taken_in(model, presets, recording, answered=False)
        del recording
        sizes = {each: sum(entry.nbytes for entry in cache) for each, cache in caches.items()}
        seconds = decoding(model, caches, text[length : length + WARM_UP + decoded])
        samples += [
            {"length": length, "cache": each, "cache_bytes": sizes[each], "stored": stored[each],
             "answered": answered.get(each), "seconds": seconds[each]}
            for each in caches
        ]  # fmt: skip
    config = {
        "model": name, "chunk": CHUNK, "decoded": decoded, "warm_up": WARM_UP, "lengths": lengths, "rounds": ROUNDS,
        "cores": os.cpu_count(), "threads": os.environ.get("OPENBLAS_NUM_THREADS", "all"), "load_average": round(load, 2),
    }  # fmt: skip
    return Outcome(config, samples, summarise(samples))


def taken_in(
    model: Any, presets: Sequence[str], recording: recorded.Recording, answered: bool
) -> tuple[dict[str, list[Any]], dict[str, list[float]]]:
    """Return a cache of each kind that has taken the text in, and how many seconds that took in each round."""
    makers: dict[str, Callable[[], list[Any]]] = {
        **{name: partial(_of_every_layer, model, make) for name, make in THEIRS.items()},
        **{preset: partial(make_cache, model, preset) for preset in presets},
    }
    caches: dict[str, list[Any]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(ROUNDS):
        for name, make in makers.items():
            caches[name] = make()
            seconds[name].append(recorded.replay(caches[name], recording, answered))
            mx.clear_cache()
    return caches, seconds


def _of_every_layer(model: Any, make: Callable[[], Any]) -> list[Any]:
    return [make() for _ in model.layers]


def decoding(model: Any, caches: Mapping[str, list[Any]], tokens: Sequence[int]) -> dict[str, list[float]]:
    """Return the seconds of each token but the first WARM_UP, by cache."""
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    names = list(caches)
    for place, token in enumerate(tokens):
        turn = place % len(names)
        for name in names[turn:] + names[:turn]:
            start = perf_counter()
            mx.eval(model(mx.array([[token]]), cache=caches[name]))
            if place >= WARM_UP:
                seconds[name].append(perf_counter() - start)
    return seconds


def summarise(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each record: tokens a second, of all tokens decoded, against `full` and KVCache, and seconds of intake."""
    found = {(sample["length"], sample["cache"]): sample for sample in samples}
    rows = []
    for (length, name), sample in found.items():
        base, full = found[length, BASE], found[length, FULL]
        low, middle, high = (1e3 * each for each in quantiles(sample["seconds"], n=4, method="inclusive"))
        mean = fmean(sample["seconds"])
        answered = None if sample["answered"] is None else round(1e3 * median(sample["answered"]) / length, 3)
        rows.append({
            "length": length, "cache": name, "tokens": len(sample["seconds"]), "cache_bytes": sample["cache_bytes"],
            "tokens_a_second": round(1 / mean, 2), "of_full": round(fmean(full["seconds"]) / mean, 3),
            "of_kvcache": round(fmean(base["seconds"]) / mean, 3),
            "median_of_full": round(median(full["seconds"]) / (middle / 1e3), 3),
            "milliseconds": round(middle, 2), "quartiles": [round(low, 2), round(high, 2)],
            "stored_a_thousand": round(1e3 * median(sample["stored"]) / length, 3), "answered_a_thousand": answered,
        })  # fmt: skip
    return rows


def brief(result: Result) -> str:
    """Say what a README shows: speeds of some presets against `full`, and seconds of taking a prompt in."""
    said = []
    for length in dict.fromkeys(row["length"] for row in result["summary"]):
        rows = {row["cache"]: row for row in result["summary"] if row["length"] == length}
        of_full = ", ".join(f"{rows[name]['of_full']:.2f} (`{name}`)" for name in BRIEF if name in rows)
        said.append(f"with {length:,} tokens held {of_full}")
    return f"Decoding on {result['config']['cores']} cores, in shares of the tokens a second of a cache that keeps all as it is: {'; '.join(said)}."


def section(result: Result) -> str:
    """Show a table for each length."""
    config, rows = result["config"], result["summary"]
    heads = ("cache", "held", "tokens/s", "of full's", "of KVCache's", "ms, median", "quartiles", "median, of full's",
             "storing a prompt, s a thousand tokens", "with its attention")  # fmt: skip
    parts = [brief(result)]
    for length in dict.fromkeys(row["length"] for row in rows):
        group = [row for row in rows if row["length"] == length]
        parts += [f"{length:,} tokens held, {group[0]['tokens']} decoded:", table(heads, map(cells, group))]
    parts.append(
        f"On {NAMED.get(config['model'], config['model'])} in float32, which `full` and KVCache hold where there is no GPU. Tokens a second are of all tokens decoded, those included at"
        f" which a method packs others. Prompts come in chunks of {config['chunk']:,}. Load average at the start: {config['load_average']}."
    )
    return "\n\n".join(parts)


def cells(row: Mapping[str, Any]) -> list[str]:
    """Return a row of a table."""
    return [
        f"`{row['cache']}`", megabytes(row["cache_bytes"]), f"{row['tokens_a_second']:.1f}", f"{row['of_full']:.2f}",
        f"{row['of_kvcache']:.2f}", f"{row['milliseconds']:.1f}", "{:.1f} to {:.1f}".format(*row["quartiles"]),
        f"{row['median_of_full']:.2f}", f"{row['stored_a_thousand']:.2f}",
        "" if row["answered_a_thousand"] is None else f"{row['answered_a_thousand']:.2f}",
    ]  # fmt: skip

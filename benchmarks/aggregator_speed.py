"""How fast online clustering takes in tokens, and in how many bytes, beside the loop over tokens that it replaces.

The loop is what a first version of such an aggregator does: for each token the nearest centroid of each head, in NumPy; a
token that is similar enough joins it, another one founds a centroid while there is room, and joins the nearest after
that. Ours takes blocks of 64 tokens for all heads at once. Batches, dims and numbers of centroids vary. The stream is
as a model decodes: one token at a time into a buffer that is flushed now and then. No model is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from statistics import fmean, median
from time import perf_counter
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.schema import Outcome, Result
from benchmarks.tables import megabytes, table
from mlxkv.live.clustering import ClusteringConfig, OnlineClustering

PHASE = 8
HEADS = 8  # of a layer; a batch has as many clusterings for each of its rows
BATCHES, DIMS, CENTROIDS = (1, 4), (64, 128), (64, 256, 512)
TOKENS, LOOP_TOKENS = 512, 256  # the loop is timed on fewer, once it is full
FLUSHES = (16, 32, 64, 128)
STREAM = (1, 64, 256)  # batch, dim, centroids
ROUNDS = 3
SIMILARITY = 0.8  # the plan's


def run(quick: bool) -> Outcome:
    shapes = [(1, 64, 64)] if quick else list(product(BATCHES, DIMS, CENTROIDS))
    rounds, tokens = (1, 256) if quick else (ROUNDS, TOKENS)
    samples = [sample for _ in range(rounds) for shape in shapes for sample in inserting(*shape, tokens)]
    samples += [streaming(flush, 2 * tokens) for _ in range(rounds) for flush in FLUSHES]
    config = {
        "heads": HEADS, "tokens": tokens, "loop_tokens": min(tokens, LOOP_TOKENS), "rounds": rounds,
        "similarity": SIMILARITY, "stream": STREAM,
    }  # fmt: skip
    return Outcome(config, samples, summarise(samples))


def inserting(batch: int, dim: int, centroids: int, tokens: int) -> list[dict[str, Any]]:
    """Seconds and bytes of both, once they are full: keys and values of all heads."""
    shape = {"batch": batch, "dim": dim, "centroids": centroids}
    N = batch * HEADS
    x = np.random.default_rng(0).normal(size=(2, N, centroids + tokens, dim)).astype(np.float32)
    keys, values = (mx.array(part) for part in x)
    ours = OnlineClustering(ClusteringConfig(centroids=centroids), N, dim, dim)
    ours.insert(keys[:, :centroids], values[:, :centroids])
    mx.eval(ours.state)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start = perf_counter()
    for first in range(centroids, centroids + tokens, 64):
        ours.insert(keys[:, first : first + 64], values[:, first : first + 64])
        mx.eval(ours.state)
    seconds = perf_counter() - start
    extra = mx.get_peak_memory() - before
    loop = Loop(N, centroids, dim)
    loop.insert(x[0, :, :centroids], x[1, :, :centroids])
    count = min(tokens, LOOP_TOKENS)
    start = perf_counter()
    loop.insert(*x[:, :, centroids : centroids + count])
    return [
        {"what": "blocks", **shape, "tokens": tokens, "seconds": seconds, "state_bytes": ours.nbytes, "peak_bytes": extra},
        {"what": "loop", **shape, "tokens": count, "seconds": perf_counter() - start, "state_bytes": loop.nbytes},
    ]  # fmt: skip


class Loop:
    """One token at a time, one clustering at a time."""

    def __init__(self, clusterings: int, centroids: int, dim: int) -> None:
        self.keys, self.values = (np.zeros((clusterings, centroids, dim), np.float32) for _ in range(2))
        self.counts, self.used = np.zeros((clusterings, centroids), np.float32), [0] * clusterings

    def insert(self, keys: np.ndarray, values: np.ndarray) -> None:
        for token in range(keys.shape[1]):
            for n in range(len(keys)):
                self.take(n, keys[n, token], values[n, token])

    def take(self, n: int, key: np.ndarray, value: np.ndarray) -> None:
        used, best = self.used[n], -np.inf
        if used:
            held = self.keys[n, :used]
            cosines = held @ key / (np.linalg.norm(held, axis=1) * np.linalg.norm(key))
            slot = int(cosines.argmax())
            best = cosines[slot]
        if best < SIMILARITY and used < self.counts.shape[1]:
            slot, self.used[n] = used, used + 1
        self.counts[n, slot] += 1
        self.keys[n, slot] += (key - self.keys[n, slot]) / self.counts[n, slot]
        self.values[n, slot] += (value - self.values[n, slot]) / self.counts[n, slot]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes + self.counts.nbytes


def streaming(flush: int, tokens: int) -> dict[str, Any]:
    """Tokens one at a time, clustered `flush` at a time: seconds of all, and of the longest wait for one token."""
    batch, dim, centroids = STREAM
    N = batch * HEADS
    x = mx.random.normal((2, tokens, N, 1, dim), key=mx.random.key(0))
    ours = OnlineClustering(ClusteringConfig(centroids=centroids), N, dim, dim)
    mx.eval(x)
    waits, buffer = [], []
    for token in range(tokens):
        start = perf_counter()
        buffer.append(x[:, token])
        if len(buffer) == flush:
            keys, values = mx.concatenate(buffer, axis=2)
            ours.insert(keys, values)
            mx.eval(ours.state)
            buffer = []
        waits.append(perf_counter() - start)
    return {"what": "stream", "flush": flush, "tokens": tokens, "seconds": sum(waits), "longest": max(waits)}


def summarise(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tokens a second, for all heads of a layer together: medians of the rounds and their standard deviation; and how much
    faster than the loop."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for sample in samples:
        key = tuple((k, sample[k]) for k in ("what", "batch", "dim", "centroids", "flush") if k in sample)
        groups.setdefault(key, []).append(sample)
    rows = []
    for key, group in groups.items():
        speeds = [s["tokens"] / s["seconds"] for s in group]
        deviation = float(np.std(speeds, ddof=len(group) > 1))
        row: dict[str, Any] = {
            **dict(key),
            "tokens_per_second": round(median(speeds)),
            "tokens_per_second_deviation": round(deviation, 1),
        }
        row |= {k: max(s[k] for s in group) for k in ("state_bytes", "peak_bytes") if k in group[0]}
        if "longest" in group[0]:
            row["longest_ms"] = round(1e3 * fmean(s["longest"] for s in group), 2)
        rows.append(row)
    loops = {tuple(row[k] for k in ("batch", "dim", "centroids")): row for row in rows if row["what"] == "loop"}
    for row in rows:
        if row["what"] == "blocks":
            loop = loops[row["batch"], row["dim"], row["centroids"]]
            row["times_the_loop"] = round(row["tokens_per_second"] / max(1, loop["tokens_per_second"]), 2)
    return rows


def section(result: Result) -> str:
    rows, config = summarise(result["samples"]), result["config"]
    blocks, loops, streams = ([row for row in rows if row["what"] == what] for what in ("blocks", "loop", "stream"))
    times = [row["times_the_loop"] for row in blocks]
    best = max(streams, key=lambda row: row["tokens_per_second"])
    batch, dim, centroids = config["stream"]
    cells = [
        [
            f"{row['batch']}, {row['dim']}, {row['centroids']}", _speed(row), _speed(loop), f"{row['times_the_loop']:.2f}",
            megabytes(row["state_bytes"]), megabytes(row["peak_bytes"]),
        ]
        for row, loop in zip(blocks, loops)
    ]  # fmt: skip
    return "\n\n".join(
        [
            f"Blocks are faster than the loop at {sum(t > 1 for t in times)} of {len(times)} shapes:"
            f" {min(times):.2f} to {max(times):.2f} times as fast. They compare all pairs, the loop only with the centroids."
            f" Tokens that come one by one are taken in fastest {best['flush']} at a time.",
            f"Tokens a second, for {config['heads']} heads together: medians of {config['rounds']} round(s) ± their standard"
            " deviation. Bytes are what is held, and what blocks take besides at their peak.",
            table(["batch, dim, centroids", "blocks", "loop", "times the loop", "held", "besides"], cells),
            f"One token at a time, batch {batch}, dim {dim}, {centroids} centroids:",
            table(
                ["flushed together", "tokens a second", "longest wait"],
                [[str(row["flush"]), _speed(row), f"{row['longest_ms']:.0f} ms"] for row in streams],
            ),
        ]
    )


def _speed(row: dict[str, Any]) -> str:
    return f"{row['tokens_per_second']:,} ± {row['tokens_per_second_deviation']:,.0f}"

"""How much faster is each Metal kernel than the plain MLX or NumPy operations that define it? Needs a Mac.

Reference and kernel get the same arguments, must agree first, and are timed in turn, several times over, each until
its result is there; medians count. Bytes are those of arguments and results, each moved once, so GB/s is what a
caller gets; beside it stands the fraction of what a big copy reaches on this machine in the same run. Quick: fewer rounds.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import mlx.core as mx

from benchmarks.schema import Outcome, Result
from benchmarks.tables import table
from mlxkv.errors import MlxkvError, UnsupportedError
from mlxkv.kernels import metal
from mlxkv.kernels.operations import Example, Operation, arrays, iter_examples

PHASE = 8
COPY_BYTES = 2**28
WARM_UP = 3


def run(quick: bool) -> Outcome:
    """Measure all kernels. Raises UnsupportedError without Metal."""
    if not metal.available():
        raise UnsupportedError("the kernels cannot be measured here: that needs a Mac, where MLX runs Metal")
    rounds = 5 if quick else 20
    bandwidth = copy_bandwidth(rounds)
    samples = [measure(operation, example, rounds, bandwidth) for operation, example in iter_examples()]
    config = {
        "rounds": rounds, "warm_up": WARM_UP, "chip": mx.device_info()["device_name"], "macos": platform.mac_ver()[0],
        "copy_bytes": COPY_BYTES, "copy_gb_per_second": bandwidth / 1e9,
    }  # fmt: skip
    return Outcome(config, samples, [{name: row[name] for name in row if name != "seconds"} for row in samples])


def measure(operation: Operation, example: Example, rounds: int, bandwidth: float) -> dict[str, Any]:
    """Return one row of the table. Raises MlxkvError when the kernel disagrees with its reference."""
    arguments = example.arguments(example.tokens)
    mx.eval(arrays(arguments))
    if not operation.agrees(arguments):
        raise MlxkvError(f"{operation.name} ({example.label}) disagrees with its reference")
    calls = {"reference": _call(operation.reference, arguments), "metal": _call(operation.metal, arguments)}
    seconds = timed(calls, rounds)
    medians = {path: median(each) for path, each in seconds.items()}
    moved = sum(leaf.nbytes for leaf in [*arrays(arguments), *arrays(calls["metal"]())])
    speed = moved / medians["metal"]
    return {
        "kernel": operation.name,
        "shape": f"{example.tokens:,} tokens, {example.label}",
        "reference_ms": 1e3 * medians["reference"],
        "metal_ms": 1e3 * medians["metal"],
        "times_faster": medians["reference"] / medians["metal"],
        "bytes": moved,
        "gb_per_second": speed / 1e9,
        "of_copy": speed / bandwidth,
        "seconds": seconds,
    }


def timed(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each round, the calls in turn."""
    for _ in range(WARM_UP):
        for call in calls.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            mx.synchronize()
            start = perf_counter()
            call()
            seconds[name].append(perf_counter() - start)
    return seconds


def copy_bandwidth(rounds: int, size: int = COPY_BYTES) -> float:
    """Return bytes a second, read and written, of adding 1 to an array of `size` bytes."""
    x = mx.zeros(size // 4)
    return 2 * x.nbytes / median(timed({"copy": _call(lambda: (x + 1,), ())}, rounds)["copy"])


def _call(function: Callable[..., Any], arguments: tuple) -> Callable[[], Any]:
    """Return the call as a function that returns once the result is in memory."""

    def call() -> Any:
        result = function(*arguments)
        mx.eval(arrays(result))
        return result

    return call


def section(result: Result) -> str:
    rows, config = result["summary"], result["config"]
    slow = [row["kernel"] for row in rows if row["times_faster"] < 1]
    slower = f"; slower: {', '.join(dict.fromkeys(slow))}" if slow else ""
    found = (
        f"{len(rows) - len(slow)} of {len(rows)} measurements on {config['chip']}, macOS {config['macos']}, are faster than"
        f" the plain operations{slower}. A copy of"
        f" {config['copy_bytes'] >> 20} MB runs at {config['copy_gb_per_second']:.0f} GB/s."
    )
    heads = ("kernel, shape", "reference ms", "Metal ms", "times faster", "GB/s", "of copy")
    cells = [
        [
            f"{row['kernel']}, {row['shape']}", f"{row['reference_ms']:.3f}", f"{row['metal_ms']:.3f}",
            f"{row['times_faster']:.1f}x", f"{row['gb_per_second']:.1f}", f"{row['of_copy']:.0%}",
        ]
        for row in rows
    ]  # fmt: skip
    return f"{found}\n\n{table(heads, cells)}"

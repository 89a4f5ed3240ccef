"""How much faster is each Metal kernel than the plain MLX or NumPy operations that define it? Needs a Mac.

Reference and kernel get the same arguments, must agree first, and are timed in turn, several times over, each until
its result is there; medians count. Bytes are those of arguments and results, each moved once, so GB/s is what a
caller gets; beside it stands the fraction of what a big copy reaches on this machine in the same run.

    python -m benchmarks.kernels [--rounds 20]
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter
from typing import Any

import mlx.core as mx
from rich.console import Console
from rich.table import Table

from benchmarks.schema import write_result
from mlxkv.errors import MlxkvError, UnsupportedError
from mlxkv.kernels import metal
from mlxkv.kernels.examples import Example, all_examples, arrays

COPY_BYTES = 2**28
WARM_UP = 3


def measure(example: Example, rounds: int, bandwidth: float) -> dict[str, Any]:
    """One row of the table. Raises MlxkvError when the kernel disagrees with its reference."""
    arguments = example.arguments(example.tokens)
    mx.eval(arrays(arguments))
    if not example.agrees(arguments):
        raise MlxkvError(f"{example.module}.{example.op} ({example.label}) disagrees with its reference")
    calls = {path: _call(example.function(path), arguments) for path in ("reference", "metal")}
    seconds = timed(calls, rounds)
    medians = {path: median(each) for path, each in seconds.items()}
    moved = sum(leaf.nbytes for leaf in [*arrays(arguments), *arrays(calls["metal"]())])
    speed = moved / medians["metal"]
    return {
        "kernel": f"{example.module}.{example.op}",
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
    """Seconds of each round, the calls in turn."""
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
    """Bytes a second, read and written, of adding 1 to an array of `size` bytes."""
    x = mx.zeros(size // 4)
    return 2 * x.nbytes / median(timed({"copy": _call(lambda: (x + 1,), ())}, rounds)["copy"])


def _call(function: Callable[..., Any], arguments: tuple) -> Callable[[], Any]:
    """The call as a function that returns once the result is in memory."""

    def call() -> Any:
        result = function(*arguments)
        mx.eval(arrays(result))
        return result

    return call


def table(found: Sequence[dict[str, Any]], title: str) -> Table:
    """The rows for reading."""
    out = Table(title=title)
    for name in ("kernel", "shape", "reference ms", "metal ms", "ratio", "GB/s", "of copy"):
        out.add_column(name, justify="left" if name in ("kernel", "shape") else "right")
    for row in found:
        times = (f"{row[name]:.3f}" for name in ("reference_ms", "metal_ms"))
        share = (f"{row['times_faster']:.1f}x", f"{row['gb_per_second']:.1f}", f"{row['of_copy']:.0%}")
        out.add_row(row["kernel"], row["shape"], *times, *share)
    return out


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args(words).rounds
    if not metal.available():
        print("benchmarks.kernels cannot measure here: it needs a Mac, where MLX runs Metal", file=sys.stderr)
        sys.exit(UnsupportedError.exit_code)
    bandwidth = copy_bandwidth(rounds)
    samples = [measure(example, rounds, bandwidth) for example in all_examples()]
    chip, system = mx.device_info()["device_name"], platform.mac_ver()[0]
    config = {"rounds": rounds, "warm_up": WARM_UP, "macos": system, "copy_gb_per_second": bandwidth / 1e9}
    title = f"{chip}, macOS {system}, a copy of {COPY_BYTES >> 20} MB runs at {bandwidth / 1e9:.0f} GB/s"
    Console().print(table(samples, title))
    summary = [{name: value for name, value in row.items() if name != "seconds"} for row in samples]
    print(write_result("kernels", config, samples, summary))


if __name__ == "__main__":
    main()

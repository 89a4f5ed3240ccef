"""Peak memory of compressing and decompressing 32K tokens of Qwen3-30B-A3B's cache at rank 512.

Each direction runs in a process of its own. Peak is the process's maximum resident size, input and output included,
so compressing starts from the whole cache and decompressing ends with it. Random numbers stand in for the cache:
they compress badly, which is the harder case. Quick: 8,192 tokens.
"""

from __future__ import annotations

import resource
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.schema import Outcome, Result
from benchmarks.tables import megabytes, table
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.methods.kvtc import KVTCStream
from mlxkv.codec.session import CacheCodec
from mlxkv.codec.stages.plan import Group, Plan
from mlxkv.models import kv_slots
from mlxkv.spec import CacheSpec, Rope

PHASE = 8
LAYERS, HEADS, DIM, RANK = 48, 4, 128, 512


def run(quick: bool) -> Outcome:
    tokens = 8_192 if quick else 32_768
    fp16 = 2 * 2 * LAYERS * HEADS * DIM * tokens
    samples = []
    with tempfile.TemporaryDirectory() as folder:
        for step in ("baseline", "compress", "decompress"):
            # A new interpreter for each: what one has peaked at cannot be taken back.
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                sample = process.submit(measured, step, tokens, Path(folder, "cache.mlxkv")).result()
            samples.append({**sample, "peak_over_fp16": round(sample["peak_bytes"] / fp16, 3)})
    geometry = {"layers": LAYERS, "heads": HEADS, "dim": DIM, "rank": RANK, "tokens": tokens, "fp16_bytes": fp16}
    return Outcome(geometry, samples, samples)


def measured(step: str, tokens: int, file: Path) -> dict[str, Any]:
    """Measure the seconds of a step, and the peak of the process that this runs in."""
    codec = CacheCodec(artifacts())
    start = perf_counter()
    if step == "compress":
        random = np.random.default_rng(0)
        tile = random.standard_normal((1, HEADS, 1024, DIM), dtype=np.float32).astype(np.float16)
        repeats = -(-tokens // 1024)
        k, v = ([np.tile(tile, (1, 1, repeats, 1))[:, :, :tokens] for _ in range(LAYERS)] for _ in range(2))
        start = perf_counter()
        file.write_bytes(codec.compress(k, v))
    elif step == "decompress":
        codec.decompress(file)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    seconds = round(perf_counter() - start, 1)
    return {"step": step, "seconds": seconds, "peak_bytes": peak, "mlx_peak_bytes": mx.get_peak_memory()}


def artifacts() -> CalibrationArtifacts:
    """Return artifacts of the model's geometry, with a random basis."""
    spec = CacheSpec("qwen3_moe", (kv_slots(HEADS, DIM, Rope(DIM, base=1e6)),) * LAYERS)
    width = LAYERS * HEADS * DIM
    basis = np.random.default_rng(1).standard_normal((width, RANK), dtype=np.float32) / np.sqrt(width)
    part = KVTCStream(np.zeros(width, np.float32), basis.astype(np.float16), Plan((Group(64, "int4"),) * (RANK // 64)))
    return CalibrationArtifacts(part, part, spec, {"method": "kvtc"})


def brief(result: Result) -> str:
    """Say what a README shows: the finding without its table."""
    return section(result).partition("\n")[0]


def section(result: Result) -> str:
    steps, config = {row["step"]: row for row in result["summary"]}, result["config"]
    found = (
        f"At {config['tokens']:,} tokens, {megabytes(config['fp16_bytes'])} of fp16 cache, the peak is"
        f" {steps['compress']['peak_over_fp16']:.2f} times the cache to compress and"
        f" {steps['decompress']['peak_over_fp16']:.2f} times to decompress, the cache itself included."
    )
    heads = ("step", "peak", "times the fp16 cache", "seconds")
    cells = [
        [step, megabytes(row["peak_bytes"]), f"{row['peak_over_fp16']:.2f}", f"{row['seconds']:.1f}"]
        for step, row in steps.items()
    ]
    return f"{found}\n\n{table(heads, cells)}"

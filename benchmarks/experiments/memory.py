"""Peak memory: reading a prompt into live caches and with `--kv-bits`, and compressing 32K tokens of Qwen3-30B-A3B's cache at rank 512.

A prompt is read by mlx-lm's own loop, in its chunks, by the first layers of SmolLM2, and two tokens are generated; peak is that of MLX's
allocator above the weights. `--kv-bits` quantizes from the first token, as with `--quantized-kv-start 0`.

Compressing and decompressing: peak is the process's maximum resident size, input and output included, so compressing
starts from the whole cache and decompressing ends with it. Random numbers stand in for the cache: they compress badly,
which is the harder case. Everything runs in a process of its own. Quick: fewer tokens.
"""

from __future__ import annotations

import gc
import os
import resource
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from benchmarks import recorded, texts
from benchmarks.schema import MODEL, Outcome, Result
from benchmarks.tables import megabytes, table
from mlxkv import lm
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.methods.kvtc import KVTCStream
from mlxkv.codec.session import CacheCodec
from mlxkv.codec.stages.plan import Group, Plan
from mlxkv.live import make_cache
from mlxkv.models import kv_slots
from mlxkv.spec import CacheSpec, Rope

PHASE = 8
LAYERS, HEADS, DIM, RANK = 48, 4, 128, 512
READ = ((4_096, 6), (16_384, 2))  # tokens, and layers that read them in a minute or two
QUICK_READ = ((512, 2),)
CHUNK = 2048  # tokens: mlx-lm's prefill_step_size
KV_BITS = {"KVCache": None, "--kv-bits 8": 8, "--kv-bits 4": 4}  # mlx-lm's own
CACHES = (*KV_BITS, "int8", "int4")


def run(quick: bool) -> Outcome:
    tokens = 8_192 if quick else 32_768
    fp16 = 2 * 2 * LAYERS * HEADS * DIM * tokens
    samples = []
    load = round(os.getloadavg()[0], 2)
    with tempfile.TemporaryDirectory() as folder:
        for step in ("baseline", "compress", "decompress"):
            sample = alone(measured, step, tokens, Path(folder, "cache.mlxkv"))
            samples.append({**sample, "peak_over_fp16": round(sample["peak_bytes"] / fp16, 3)})
    samples += [
        alone(read, cache, length, layers) for length, layers in (QUICK_READ if quick else READ) for cache in CACHES
    ]
    config = {
        "layers": LAYERS, "heads": HEADS, "dim": DIM, "rank": RANK, "tokens": tokens, "fp16_bytes": fp16,
        "model": MODEL, "chunk": CHUNK, "load_average": load, "threads": os.environ.get("OPENBLAS_NUM_THREADS", "all"),
    }  # fmt: skip
    return Outcome(config, samples, samples)


def alone(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Call a function in an interpreter of its own: what one has peaked at cannot be taken back."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def read(cache: str, length: int, layers: int, name: str = MODEL) -> dict[str, Any]:
    """Let a model's first layers read a prompt and generate two tokens, and measure what that takes beside the weights.

    Parameters
    ----------
    cache
        One of CACHES.
    length
        Tokens of the prompt.
    layers
        Layers of the model.
    name
        The model's.
    """
    model, tokenizer = lm.load(name)
    recorded.shortened(model, layers)
    tokens = tokenizer.encode("\n".join(texts.documentation(held_out=True)[1:60]))[: length + 1]
    held = make_prompt_cache(model) if cache in KV_BITS else make_cache(model, cache)
    gc.collect()
    mx.clear_cache()
    weights, start = mx.get_active_memory(), perf_counter()
    mx.reset_peak_memory()
    options: dict[str, Any] = {"kv_bits": KV_BITS.get(cache), "quantized_kv_start": 0, "prefill_step_size": CHUNK}
    for _ in zip(range(2), generate_step(mx.array(tokens), model, max_tokens=2, prompt_cache=held, **options)):
        pass
    return {
        "cache": cache, "length": length, "layers": layers, "peak_bytes": mx.get_peak_memory() - weights,
        "held_bytes": sum(entry.nbytes for entry in held), "seconds": round(perf_counter() - start, 1),
    }  # fmt: skip


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
    """Say what a README shows: the findings without their tables."""
    return " ".join(filter(None, (compressing_found(result), reading_found(reading(result)))))


def compressing_found(result: Result) -> str:
    """Say what compressing and decompressing take at most."""
    steps, config = {row["step"]: row for row in result["summary"] if "step" in row}, result["config"]
    return (
        f"At {config['tokens']:,} tokens, {megabytes(config['fp16_bytes'])} of fp16 cache, the peak is"
        f" {steps['compress']['peak_over_fp16']:.2f} times the cache to compress and"
        f" {steps['decompress']['peak_over_fp16']:.2f} times to decompress, the cache itself included."
    )


def reading(result: Result) -> list[dict[str, Any]]:
    """Return the rows about reading a prompt."""
    return [row for row in result["summary"] if "cache" in row]


def reading_found(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say what reading the longest prompt takes at most; nothing where none was read."""
    length = max((row["length"] for row in rows), default=0)
    longest = [row for row in rows if row["length"] == length]
    said = ", ".join(f"{megabytes(row['peak_bytes'])} with `{row['cache']}`" for row in longest)
    if not longest:
        return ""
    return f"Reading {length:,} tokens takes {said} at most, beside the weights of {longest[0]['layers']} layers."


def section(result: Result) -> str:
    """Show both tables."""
    steps = [row for row in result["summary"] if "step" in row]
    cells = [
        [row["step"], megabytes(row["peak_bytes"]), f"{row['peak_over_fp16']:.2f}", f"{row['seconds']:.1f}"]
        for row in steps
    ]
    parts = [compressing_found(result), table(("step", "peak", "times the fp16 cache", "seconds"), cells)]
    if rows := reading(result):
        heads = ("cache", "tokens", "layers", "peak", "of KVCache's", "held at the end", "seconds")
        parts += [
            f"{reading_found(rows)} In chunks of {result['config']['chunk']:,}, of SmolLM2's first layers; float32 where there is no GPU,"
            " and there mlx-lm's attention holds the scores of a whole chunk in any of its caches.",
            table(heads, [read_cells(row, rows) for row in rows]),
        ]
    return "\n\n".join(parts)


def read_cells(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a row of the second table."""
    base = next(other for other in rows if (other["cache"], other["length"]) == ("KVCache", row["length"]))
    return [
        f"`{row['cache']}`", f"{row['length']:,}", str(row["layers"]), megabytes(row["peak_bytes"]),
        f"{row['peak_bytes'] / base['peak_bytes']:.2f}", megabytes(row["held_bytes"]), f"{row['seconds']:.1f}",
    ]  # fmt: skip

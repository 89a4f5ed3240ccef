"""Peak memory of compressing and decompressing 32K tokens of Qwen3-30B-A3B's cache at rank 512.

Each direction runs in a process of its own. Peak is the process's maximum resident size, input and output included,
so compressing starts from the whole cache and decompressing ends with it. Random numbers stand in for the cache:
they compress badly, which is the harder case.

    python -m benchmarks.memory [--tokens 32768]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import mlx.core as mx
import numpy as np

from benchmarks.schema import write_result
from mlxkv.cache import CacheSpec, Rope
from mlxkv.codec.artifacts import CalibrationArtifacts, StreamArtifacts
from mlxkv.codec.kvtc import KVTCCacheCodec
from mlxkv.codec.plan import Group, Plan
from mlxkv.models import keys_and_values

LAYERS, HEADS, DIM, RANK = 48, 4, 128, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--step", choices=("baseline", "compress", "decompress"), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(_step(arguments.step, arguments.tokens, arguments.file)))
        return
    fp16 = 2 * 2 * LAYERS * HEADS * DIM * arguments.tokens
    samples = []
    with tempfile.TemporaryDirectory() as folder:
        for step in ("baseline", "compress", "decompress"):
            command = [sys.executable, "-m", "benchmarks.memory", "--step", step, "--tokens", str(arguments.tokens)]
            out = subprocess.run(
                [*command, "--file", f"{folder}/cache.mlxkv"], capture_output=True, text=True, check=True
            )
            samples.append(json.loads(out.stdout.splitlines()[-1]))
            samples[-1]["peak_over_fp16"] = round(samples[-1]["peak_bytes"] / fp16, 3)
            print(samples[-1])
    geometry = {
        "layers": LAYERS,
        "heads": HEADS,
        "dim": DIM,
        "rank": RANK,
        "tokens": arguments.tokens,
        "fp16_bytes": fp16,
    }
    print(write_result("memory", geometry, samples, samples))


def _step(step: str, tokens: int, file: Path) -> dict[str, float | str]:
    codec = KVTCCacheCodec(_artifacts())
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


def _artifacts() -> CalibrationArtifacts:
    spec = CacheSpec("qwen3_moe", (keys_and_values(HEADS, DIM, Rope(DIM, base=1e6)),) * LAYERS)
    width = LAYERS * HEADS * DIM
    basis = np.random.default_rng(1).standard_normal((width, RANK), dtype=np.float32) / np.sqrt(width)
    part = StreamArtifacts(
        np.zeros(width, np.float32), basis.astype(np.float16), Plan((Group(64, "int4"),) * (RANK // 64))
    )
    return CalibrationArtifacts(part, part, spec, {})


if __name__ == "__main__":
    main()

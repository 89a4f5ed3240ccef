"""Is reading a compressed cache faster than computing it again? Prefill, compress and decompress, in one run.

The three are timed in turn, several times over, so that a slow spell of the machine hits all of them; the ratio of
medians is the result.

    python -m benchmarks.codec_speed [--tokens 2048] [--rounds 3]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from mlx_lm.models.cache import make_prompt_cache

from benchmarks import texts
from benchmarks.cr_sweep import MODEL, dump_all
from benchmarks.schema import write_result
from mlxkv import lm
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.calibrate import calibrate
from mlxkv.codec.kvtc import KVTCCacheCodec, Settings

RATIOS = (4, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model, tokenizer = lm.load(MODEL)
    calibration = {"texts": 6, "tokens": 1536}
    with tempfile.TemporaryDirectory() as folder:
        files = dump_all(model, tokenizer, Path(folder), calibration)
        codecs = {ratio: KVTCCacheCodec(calibrate(files, Settings(ratio))) for ratio in RATIOS}
    saved = tempfile.TemporaryDirectory()
    codecs[RATIOS[-1]].artifacts.save(saved.name)
    tokens = texts.same_kind(tokenizer, arguments.tokens, 1)[0]
    dump = lm.dump(model, tokens, name=MODEL, dtype="float16")
    samples: list[dict[str, Any]] = []
    for _ in range(arguments.rounds):
        start = perf_counter()
        lm.prefill(model, tokens, make_prompt_cache(model))
        samples.append({"step": "prefill", "seconds": perf_counter() - start})
        for ratio, codec in codecs.items():
            start = perf_counter()
            blob = codec.compress_dump(dump)
            samples.append({"step": f"compress {ratio}x", "seconds": perf_counter() - start, "bytes": len(blob)})
            start = perf_counter()
            back = codec.decompress_dump(blob)
            samples.append({"step": f"decompress {ratio}x", "seconds": perf_counter() - start})
            lm.restore(model, back)
            samples.append({"step": f"decompress {ratio}x and restore into mlx-lm", "seconds": perf_counter() - start})
        start = perf_counter()
        CalibrationArtifacts.from_dir(saved.name)
        samples.append(
            {"step": f"read the artifacts ({RATIOS[-1]}x), once a process", "seconds": perf_counter() - start}
        )
    saved.cleanup()
    seconds = {
        step: median(s["seconds"] for s in samples if s["step"] == step)
        for step in dict.fromkeys(s["step"] for s in samples)
    }
    summary = [
        {
            "step": step,
            "median_seconds": round(value, 3),
            "times_faster_than_prefill": round(seconds["prefill"] / value, 1),
        }
        for step, value in seconds.items()
    ]
    for row in summary:
        print(row)
    config = {"model": MODEL, "tokens": arguments.tokens, "rounds": arguments.rounds, "calibration": calibration}
    print(write_result("codec_speed", config, samples, summary))


if __name__ == "__main__":
    main()

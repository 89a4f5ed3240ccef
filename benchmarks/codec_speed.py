"""Is reading a compressed cache faster than computing it again? Prefill, compress and decompress, in one run.

The three are timed in turn, several times over, so that a slow spell of the machine hits all of them; the ratio of
medians is the result. Quick: 512 tokens, a small calibration and two rounds.
"""

from __future__ import annotations

import tempfile
from statistics import median
from time import perf_counter
from typing import Any

from mlx_lm.models.cache import make_prompt_cache

from benchmarks import calibration, texts
from benchmarks.held_out import MODEL
from benchmarks.schema import Outcome, Result
from benchmarks.tables import table
from mlxkv import lm
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.codec import KVTCCacheCodec

PHASE = 8
RATIOS = (4, 16)


def run(quick: bool) -> Outcome:
    model, tokenizer = lm.load(MODEL)
    size = calibration.QUICK if quick else {"texts": 6, "tokens": 1536}
    length, rounds = (512, 2) if quick else (2048, 3)
    artifacts = calibration.calibrated(model, tokenizer, size, RATIOS)
    codecs = {ratio: KVTCCacheCodec(learnt) for ratio, learnt in artifacts.items()}
    tokens = texts.same_kind(tokenizer, length, 1)[0]
    dump = lm.dump(model, tokens, name=MODEL, dtype="float16")
    samples: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as saved:
        codecs[RATIOS[-1]].artifacts.save(saved)
        for _ in range(rounds):
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
                step = f"decompress {ratio}x and restore into mlx-lm"
                samples.append({"step": step, "seconds": perf_counter() - start})
            start = perf_counter()
            CalibrationArtifacts.from_dir(saved)
            step = f"read the artifacts ({RATIOS[-1]}x), once a process"
            samples.append({"step": step, "seconds": perf_counter() - start})
    config = {"model": MODEL, "tokens": length, "rounds": rounds, "calibration": size}
    return Outcome(config, samples, summarise(samples))


def summarise(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the rounds, and how many times faster than prefill they are."""
    steps = dict.fromkeys(sample["step"] for sample in samples)
    seconds = {step: median(s["seconds"] for s in samples if s["step"] == step) for step in steps}
    return [
        {
            "step": step,
            "median_seconds": round(value, 3),
            "times_faster_than_prefill": round(seconds["prefill"] / value, 1),
        }
        for step, value in seconds.items()
    ]


def section(result: Result) -> str:
    rows, config = result["summary"], result["config"]
    back = [row["times_faster_than_prefill"] for row in rows if row["step"].endswith("restore into mlx-lm")]
    verdict = "Yes" if min(back) > 1 else "No" if max(back) < 1 else "At some ratios"
    found = (
        f"{verdict}: reading {config['tokens']:,} tokens back into mlx-lm is {min(back):.1f} to {max(back):.1f} times as fast"
        f" as computing them again (medians of {config['rounds']} rounds in turn)."
    )
    cells = [[row["step"], f"{row['median_seconds']:.2f}", f"{row['times_faster_than_prefill']:.1f}"] for row in rows]
    return f"{found}\n\n{table(('step', 'seconds', 'times faster than prefill'), cells)}"

"""What refitting shift and scale by least squares buys, at a 16x budget on SmolLM2: 0 refits is plain min-max.

The plan is allocated anew for each number of refits, on the same dumps and held-out texts as `cr_sweep`.

    python -m benchmarks.refits
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
from rich.progress import track

from benchmarks.cr_sweep import MODEL, dump_all, prefixes, summarise
from benchmarks.schema import write_result
from mlxkv import lm
from mlxkv.codec import quantize
from mlxkv.codec.calibrate import calibrate
from mlxkv.codec.kvtc import KVTCCacheCodec, Settings
from mlxkv.evaluate import fidelity

RATIO = 16
REFITS = (0, 1, 3)


def main() -> None:
    model, tokenizer = lm.load(MODEL)
    calibration = {"texts": 10, "tokens": 1536}
    samples = []
    with tempfile.TemporaryDirectory() as folder:
        files = dump_all(model, tokenizer, Path(folder), calibration)
        starts = {key: start for key, start in prefixes(model, tokenizer, quick=False).items() if key[0] != "long"}
        for refits in track(REFITS, "refits"):
            quantize.REFITS = refits
            codec = KVTCCacheCodec(calibrate(files, Settings(RATIO)))
            for (kind, text), start in starts.items():
                record = fidelity.evaluate(model, codec, start)
                samples.append({"refits": refits, "compression_ratio": RATIO, "kind": kind, "text": text, **record})
    summary = []
    for refits in REFITS:
        error = normal_error(refits)
        rows = summarise([sample for sample in samples if sample["refits"] == refits])
        summary += [{"refits": refits, "int2_error_of_normals": error, **row} for row in rows]
    for row in summary:
        print(row)
    config = {"model": MODEL, "dtype": "float16", "calibration": calibration, "predict": 200, "seed": 0}
    print(write_result("refits", config, samples, summary))


def normal_error(refits: int) -> float:
    """Mean squared error of 2-bit groups of 64 standard normal numbers."""
    x = mx.array(np.random.default_rng(0).standard_normal((4096, 64), dtype=np.float32))
    quantize.REFITS = refits
    return round(float(mx.square(quantize.dequantize(*quantize.quantize(x, "int2"), "int2") - x).mean()), 4)


if __name__ == "__main__":
    main()

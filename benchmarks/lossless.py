"""DEFLATE or rANS behind the codec? Bytes and seconds of the same caches with each, and how fast rANS itself runs here.

Both codings are timed in turn, several times over, and medians count. The symbols of the second table follow a
geometric distribution, coded with one static table by the plain operations (no kernel, one thread).

    python -m benchmarks.lossless [--tokens 2048] [--rounds 5]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks import texts
from benchmarks.cr_sweep import MODEL, dump_all
from benchmarks.schema import write_result
from mlxkv import lm
from mlxkv.codec.calibrate import calibrate
from mlxkv.codec.kvtc import KVTCCacheCodec, Settings
from mlxkv.codec.summary import summary
from mlxkv.container import Reader
from mlxkv.kernels import rans

RATIOS = (4, 16)
CODINGS = ("deflate", "rans")
LANES = (256, 1024, 4096)
SYMBOLS = 2**22
CALIBRATION = {"texts": 6, "tokens": 1536}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    samples = [*coder(arguments.rounds), *caches(arguments.tokens, arguments.rounds)]
    medians = summarise(samples)
    for row in medians:
        print(row)
    config = {"model": MODEL, "tokens": arguments.tokens, "rounds": arguments.rounds, "calibration": CALIBRATION}
    print(write_result("lossless", {**config, "symbols": SYMBOLS}, samples, medians))


def coder(rounds: int) -> list[dict[str, Any]]:
    """rANS over SYMBOLS bytes: million symbols a second, and stream bytes over the table's cross-entropy."""
    symbols = np.minimum(np.random.default_rng(0).geometric(0.2, SYMBOLS), 255).astype(np.uint8)
    counts = np.bincount(symbols, minlength=256)
    tables = rans.frequencies(counts[None])
    used = counts > 0
    ideal = -(counts[used] * np.log2(tables[0][used] / rans.TOTAL)).sum() / 8
    model = (tables, np.zeros(-(-SYMBOLS // 4096), np.uint8), 4096)
    samples = []
    for _ in range(rounds):
        for lanes in LANES:
            encoding, streams = timed(rans.reference_encode, symbols, *model, lanes)
            decoding, _ = timed(rans.reference_decode, streams, *model, SYMBOLS)
            samples.append(
                {
                    "what": f"rANS, {lanes:,} lanes",
                    "encode_million_per_second": SYMBOLS / encoding / 1e6,
                    "decode_million_per_second": SYMBOLS / decoding / 1e6,
                    "over_cross_entropy": (2 * streams.words.size + 4 * lanes) / ideal,
                }
            )
    return samples


def caches(tokens: int, rounds: int) -> list[dict[str, Any]]:
    """One held-out cache at each ratio with each coding."""
    model, tokenizer = lm.load(MODEL)
    with tempfile.TemporaryDirectory() as folder:
        files = dump_all(model, tokenizer, Path(folder), CALIBRATION)
        artifacts = {ratio: calibrate(files, Settings(ratio)) for ratio in RATIOS}
    dump = lm.dump(model, texts.same_kind(tokenizer, tokens, 1)[0], name=MODEL, dtype="float16")
    codecs = {
        (ratio, coding): KVTCCacheCodec(artifacts[ratio], lossless=coding) for ratio in RATIOS for coding in CODINGS
    }
    samples = []
    for _ in range(rounds):
        for (ratio, coding), codec in codecs.items():
            compressing, blob = timed(codec.compress_dump, dump)
            decompressing, _ = timed(codec.decompress_dump, blob)
            with Reader(blob) as reader:
                facts = summary(reader)
            bytes_of = {key: facts[key] for key in ("file_bytes", "coded_bytes", "sink_and_window_bytes")}
            seconds = {"compress_seconds": compressing, "decompress_seconds": decompressing}
            samples.append({"what": f"{ratio}x, {coding}", **bytes_of, **seconds})
    return samples


def summarise(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the rounds."""
    rows = []
    for what in dict.fromkeys(sample["what"] for sample in samples):
        alike = [sample for sample in samples if sample["what"] == what]
        rows.append({"what": what, **{key: median(s[key] for s in alike) for key in alike[0] if key != "what"}})
    return rows


def timed(call: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Seconds and the result."""
    start = perf_counter()
    result = call(*arguments)
    return perf_counter() - start, result


if __name__ == "__main__":
    main()

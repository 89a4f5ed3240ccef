"""DEFLATE or rANS behind the codec? Bytes and seconds of the same caches with each, and how fast rANS itself runs here.

Both codings are timed in turn, several times over, and medians count. The symbols of the second table follow a
geometric distribution, coded with one static table by the plain operations (no kernel, one thread). Quick: 512 tokens,
a small calibration and two rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks import calibration, texts
from benchmarks.held_out import MODEL
from benchmarks.schema import Outcome, Result
from benchmarks.tables import megabytes, percent, table
from mlxkv import lm
from mlxkv.codec.session import CacheCodec
from mlxkv.codec.summary import summary
from mlxkv.io.container import Reader
from mlxkv.kernels import rans

PHASE = 8
RATIOS = (4, 16)
CODINGS = ("deflate", "rans")
LANES = (256, 1024, 4096)
SYMBOLS = 2**22


def run(quick: bool) -> Outcome:
    tokens, rounds = (512, 2) if quick else (2048, 5)
    size = calibration.QUICK if quick else {"texts": 6, "tokens": 1536}
    samples = [*coder(rounds), *caches(tokens, rounds, size)]
    config = {"model": MODEL, "tokens": tokens, "rounds": rounds, "calibration": size, "symbols": SYMBOLS}
    return Outcome(config, samples, summarise(samples))


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


def caches(tokens: int, rounds: int, size: dict[str, int]) -> list[dict[str, Any]]:
    """One held-out cache at each ratio with each coding."""
    model, tokenizer = lm.load(MODEL)
    artifacts = calibration.calibrated(model, tokenizer, size, RATIOS)
    dump = lm.dump(model, texts.same_kind(tokenizer, tokens, 1)[0], name=MODEL, dtype="float16")
    codecs = {(ratio, coding): CacheCodec(artifacts[ratio], lossless=coding) for ratio in RATIOS for coding in CODINGS}
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


def section(result: Result) -> str:
    caches = {tuple(row["what"].split(", ")): row for row in result["summary"] if "file_bytes" in row}
    coder = [row for row in result["summary"] if "file_bytes" not in row]
    pairs = [(caches[ratio, "rans"], caches[ratio, "deflate"]) for ratio in dict.fromkeys(ratio for ratio, _ in caches)]
    shares = {
        key: [rans[key] / deflate[key] for rans, deflate in pairs]
        for key in ("file_bytes", "compress_seconds", "decompress_seconds")
    }
    found = (
        f"With rANS a file is {percent(min(shares['file_bytes']))} to {percent(max(shares['file_bytes']))} of what it is with"
        f" DEFLATE; compressing takes {min(shares['compress_seconds']):.2f} to {max(shares['compress_seconds']):.2f} times as"
        f" long, decompressing {min(shares['decompress_seconds']):.2f} to {max(shares['decompress_seconds']):.2f} times."
    )
    heads = ("budget, last stage", "file", "coded middle", "compress", "decompress")
    cells = [
        [", ".join(key), megabytes(row["file_bytes"]), megabytes(row["coded_bytes"])]
        + [f"{row[step]:.2f} s" for step in ("compress_seconds", "decompress_seconds")]
        for key, row in caches.items()
    ]
    speeds = ", ".join(
        f"{row['encode_million_per_second']:.0f} / {row['decode_million_per_second']:.0f} with {row['what'].removeprefix('rANS, ')}"
        for row in coder
    )
    note = f"rANS alone, in NumPy on one thread, encodes / decodes {speeds} (million symbols a second)."
    cache = (
        f"One cache of {result['config']['tokens']:,} tokens, medians of {result['config']['rounds']} rounds in turn."
    )
    return "\n\n".join([found, cache, table(heads, cells), note])

"""Which quality meets a target: so many bytes, or so much divergence of what the model predicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlxkv.codec.session import CacheCodec
from mlxkv.dump import KVDump
from mlxkv.errors import InputError
from mlxkv.evaluate.tasks.fidelity import evaluate
from mlxkv.evaluate.variants import baseline, codec_variant

TOLERANCE = 0.02  # of the target
SAMPLED_BLOCKS = 4  # of a dump that is longer, whose bytes stand for all
QUALITY_LADDER = range(10, 91, 10)  # qualities that a divergence is measured at
PREDICTED_TOKENS = 128  # tokens, the newest of the dump
_ROUNDS, _PROBES = 4, 8
_GROWTH = 1.6  # times more bytes for ten points of quality, about


def compress_to_bytes(
    codec: CacheCodec, dump: KVDump, target: float, progress: Callable[[int], None] | None = None
) -> tuple[CacheCodec, bytes]:
    """The dump in a whole file within 2 % of `target` bytes, and the codec of that quality.

    The quality is found on the code lengths of up to four blocks, then corrected by whole files. Raises InputError for
    a target beyond what qualities 0 to 100 reach, and for a method without a quality.
    """
    if codec.quality is None:
        raise InputError("these artifacts are of a method with one ratio: calibrate for another, or with kvtc-rd")
    fixed, aim = codec.fixed_bytes(dump), float(target)
    blob = b""
    for _ in range(_ROUNDS):
        if aim <= fixed:
            break
        codec = codec.with_quality(_quality_for(codec, dump, aim - fixed))
        blob = codec.compress_dump(dump, progress)
        if abs(len(blob) / target - 1) <= TOLERANCE:
            return codec, blob
        aim *= target / len(blob)
    reached = f"quality {codec.quality:.4g} makes {len(blob):,}, and " if blob else ""
    advice = "ask for less" if 0 < len(blob) < target else "a shorter window makes smaller files"
    raise InputError(
        f"{target:,.0f} bytes are not met: {reached}sinks, tokens and a raw window, which no quality changes, take about {fixed:,};"
        f" {advice}"
    )


def _quality_for(codec: CacheCodec, dump: KVDump, coded: float) -> float:
    """The quality whose coded tokens are estimated to take so many bytes: Newton's method within a bracket."""
    quality, low, high = 35.0, 0.0, 100.0
    for _ in range(_PROBES):
        found = codec.with_quality(quality).coded_bytes(dump, SAMPLED_BLOCKS)
        if abs(found / coded - 1) < TOLERANCE / 10:
            break
        low, high = (low, quality) if found > coded else (quality, high)
        step = 10 * math.log(coded / max(found, 1)) / math.log(_GROWTH)
        quality = quality + step if low < quality + step < high else (low + high) / 2
    return quality


def quality_for_kl(codec: CacheCodec, model: Any, tokens: Sequence[int], target: float) -> float:
    """The least quality at which predictions from the decoded cache diverge by no more than `target` nats a token.

    Measured on the newest 128 tokens (of a short text the newest half), predicted from a cache of those before, at
    qualities 10, 20, … 90, and interpolated in the logarithm between. Raises InputError for a target that none meets.
    """
    if codec.quality is None:
        raise InputError("these artifacts are of a method with one ratio: calibrate for another, or with kvtc-rd")
    if not target > 0 or not math.isfinite(target):
        raise InputError(f"the divergence to reach is a number of nats above 0, not {target}")
    at = max(len(tokens) - PREDICTED_TOKENS - 1, len(tokens) // 2)
    variants = [baseline(), *(codec_variant(codec.with_quality(quality), str(quality)) for quality in QUALITY_LADDER)]
    found = [record["kl"] for record in evaluate(model, variants, tokens, at)[1:]]
    # What noise has put out of order counts as the worse of both.
    kl = np.maximum.accumulate(found[::-1])[::-1]
    if kl[-1] > target:
        raise InputError(
            f"quality {QUALITY_LADDER[-1]} still diverges by {kl[-1]:.2g} nats: raise the target, {target:.2g}, or --recent"
        )
    return float(np.interp(-math.log(target), -np.log(np.maximum(kl, 1e-12)), QUALITY_LADDER))

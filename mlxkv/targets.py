"""Which quality meets a target: so many bytes, or so much divergence of what the model predicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlxkv.cache import KVDump
from mlxkv.codec.codec import KVTCCacheCodec
from mlxkv.errors import InputError
from mlxkv.evaluate._variants import coded, whole
from mlxkv.evaluate.fidelity import evaluate

WITHIN = 0.02  # of the target
BLOCKS = 4  # of a dump that is longer, whose bytes stand for all
LADDER = range(10, 91, 10)  # qualities that a divergence is measured at
PREDICTED = 128  # tokens, the newest of the dump
_ROUNDS, _PROBES = 4, 12


def compress_to_bytes(
    codec: KVTCCacheCodec, dump: KVDump, target: float, progress: Callable[[int], None] | None = None
) -> tuple[KVTCCacheCodec, bytes]:
    """The dump in a whole file within 2 % of `target` bytes, and the codec of that quality.

    The quality is found by bisection on the coded bytes of up to four blocks, then by whole files. Raises InputError for
    a target beyond what qualities 0 to 100 reach, and for a method without a quality.
    """
    if codec.quality is None:
        raise InputError("these artifacts are of a method with one ratio: calibrate for another, or with kvtc-rd")
    aim = float(target)
    for _ in range(_ROUNDS):
        codec = codec.at(_bisected(codec, dump, aim))
        blob = codec.compress_dump(dump, progress)
        if abs(len(blob) / target - 1) <= WITHIN:
            return codec, blob
        if not 0 < codec.quality < 100:  # type: ignore[operator]
            break
        aim *= target / len(blob)
    raise InputError(
        f"{target:,.0f} bytes are not met: quality {codec.quality:.4g} makes {len(blob):,}, of which sinks, window and"
        f" tokens, which it does not change, are {len(blob) - codec.coded_bytes(dump):,}; a shorter window makes smaller files"
    )


def _bisected(codec: KVTCCacheCodec, dump: KVDump, target: float) -> float:
    """The quality whose estimated file has `target` bytes."""
    uncoded = len(codec.at(0).compress_dump(dump)) - codec.at(0).coded_bytes(dump)
    low, high = 0.0, 100.0
    for _ in range(_PROBES):
        middle = (low + high) / 2
        if uncoded + codec.at(middle).coded_bytes(dump, BLOCKS) > target:
            high = middle
        else:
            low = middle
    return high if high == 100 else low


def quality_for_kl(codec: KVTCCacheCodec, model: Any, tokens: Sequence[int], target: float) -> float:
    """The least quality at which predictions from the decoded cache diverge by no more than `target` nats a token.

    Measured on the newest 128 tokens (of a short text the newest half), predicted from a cache of those before, at
    qualities 10, 20, … 90, and interpolated in the logarithm between. Raises InputError for a target that none meets.
    """
    if codec.quality is None:
        raise InputError("these artifacts are of a method with one ratio: calibrate for another, or with kvtc-rd")
    if not target > 0 or not math.isfinite(target):
        raise InputError(f"the divergence to reach is a number of nats above 0, not {target}")
    at = max(len(tokens) - PREDICTED - 1, len(tokens) // 2)
    variants = [whole(), *(coded(codec.at(quality), str(quality)) for quality in LADDER)]
    found = [record["kl"] for record in evaluate(model, variants, tokens, at)[1:]]
    # What noise has put out of order counts as the worse of both.
    kl = np.maximum.accumulate(found[::-1])[::-1]
    if kl[-1] > target:
        raise InputError(
            f"quality {LADDER[-1]} still diverges by {kl[-1]:.2g} nats: raise the target, {target:.2g}, or --w"
        )
    return float(np.interp(-math.log(target), -np.log(np.maximum(kl, 1e-12)), LADDER))

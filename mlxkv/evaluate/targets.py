"""The quality of a codec that meets a target: a number of bytes, or a divergence of the model's predictions."""

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
BEST_QUALITY = 100.0
QUALITY_LADDER = range(10, 91, 10)  # qualities that a divergence is measured at
PREDICTED_TOKENS = 128  # tokens, the newest of the dump
_ROUNDS, _PROBES = 4, 8
_ESTIMATE_ERROR = 0.2  # of estimated bytes: a target that is out of reach by more is refused at once
_GROWTH = 1.6  # times more bytes for ten points of quality, about


def check_target(codec: CacheCodec, target: object) -> float:
    """Refuse a target that no compression can meet, before any work for it.

    Parameters
    ----------
    codec
        The codec that is to meet it.
    target
        A ratio, bytes, or nats.

    Returns
    -------
    float
        The target, finite and above 0.

    Raises
    ------
    InputError
        For anything but a finite number above 0, and for a codec whose artifacts fix the ratio.
    """
    if codec.quality is None:
        raise InputError("these artifacts are of a method with one ratio: calibrate for another, or with kvtc-rd")
    if type(target) not in (int, float) or not 0 < target < math.inf:  # type: ignore[operator]
        raise InputError(f"a target is a finite number above 0 (times smaller, bytes or nats above 0), not {target!r}")
    return float(target)  # type: ignore[arg-type]


def compress_to_bytes(
    codec: CacheCodec, dump: KVDump, target: float, progress: Callable[[int], None] | None = None
) -> tuple[CacheCodec, bytes]:
    """Compress a dump to a file within 2 % of a size, or to the best quality where even that is smaller.

    Parameters
    ----------
    codec
        A codec of a method with a quality, such as `kvtc-rd`; its own quality does not matter.
    dump
        The cache to compress.
    target
        Bytes of the file, header included.
    progress
        As in `CacheCodec.compress_dump`; the dump is compressed up to four times.

    Returns
    -------
    codec : CacheCodec
        The codec with the quality that was found, 0 to 100.
    blob : bytes
        The file; smaller than the target by more than 2 % only at quality 100.

    Raises
    ------
    InputError
        For a target below what quality 0 reaches, and for what `check_target` refuses.

    Notes
    -----
    The quality is found on the code lengths of up to four blocks and then corrected by the sizes of complete files.
    """
    target = check_target(codec, target)
    fixed, aim = codec.fixed_bytes(dump), target
    least, most = (codec.with_quality(end).coded_bytes(dump, SAMPLED_BLOCKS) for end in (0.0, BEST_QUALITY))
    if fixed + least * (1 - _ESTIMATE_ERROR) > target:
        raise InputError(_too_few(target, fixed, least))
    for _ in range(_ROUNDS):
        needed = aim - fixed
        if needed >= most or needed <= least:
            codec = codec.with_quality(BEST_QUALITY if needed >= most else 0.0)
        else:
            codec = codec.with_quality(_quality_for(codec, dump, needed))
        blob = codec.compress_dump(dump, progress)
        at_best = codec.quality == BEST_QUALITY and len(blob) < target
        if at_best or abs(len(blob) / target - 1) <= TOLERANCE:
            return codec, blob
        aim *= target / len(blob)
    raise InputError(_too_few(target, fixed, len(blob) - fixed))


def _too_few(target: float, fixed: float, coded: float) -> str:
    """Say why a file cannot be as small as asked."""
    return (
        f"{target:,.0f} bytes are not met: header, sinks, tokens and unquantized recent tokens, which no quality changes,"
        f" take about {fixed:,.0f} and coded tokens about {coded:,.0f} more; fewer recent tokens make smaller files"
    )


def quality_for_kl(codec: CacheCodec, model: Any, tokens: Sequence[int], target: float) -> float:
    """Return the least quality at which predictions from the decoded cache diverge by no more than a target.

    Parameters
    ----------
    codec
        A codec of a method with a quality, such as `kvtc-rd`; its own quality does not matter.
    model
        A model that mlx-lm loaded.
    tokens
        The text; its newest 128 tokens, of a text below 258 tokens the newest half, are predicted from a cache of those
        before.
    target
        Nats, above 0: the mean of KL(untouched cache || decoded cache) over the predicted tokens.

    Returns
    -------
    float
        10 to 90; 10 also where that diverges less than asked.

    Raises
    ------
    InputError
        For a target that quality 90 does not reach, for one that is no number above 0, and for a method without a
        quality.

    Notes
    -----
    Measured at qualities 10, 20, ... 90, and interpolated linearly in the logarithm of the divergence between them.
    """
    target = check_target(codec, target)
    context_tokens = max(len(tokens) - PREDICTED_TOKENS - 1, len(tokens) // 2)
    variants = [baseline(), *(codec_variant(codec.with_quality(quality), str(quality)) for quality in QUALITY_LADDER)]
    found = [record["kl"] for record in evaluate(model, variants, tokens, context_tokens)[1:]]
    # What noise has put out of order counts as the worse of both.
    kl = np.maximum.accumulate(found[::-1])[::-1]
    if kl[-1] > target:
        raise InputError(
            f"quality {QUALITY_LADDER[-1]} still diverges by {kl[-1]:.2g} nats: raise the target, {target:.2g}, or --recent"
        )
    return float(np.interp(-math.log(target), -np.log(np.maximum(kl, 1e-12)), QUALITY_LADDER))


def _quality_for(codec: CacheCodec, dump: KVDump, coded_bytes: float) -> float:
    """Return the quality whose coded tokens are estimated to take so many bytes: Newton's method within a bracket."""
    quality, low, high = 35.0, 0.0, 100.0
    for _ in range(_PROBES):
        found = codec.with_quality(quality).coded_bytes(dump, SAMPLED_BLOCKS)
        if abs(found / coded_bytes - 1) < TOLERANCE / 10:
            break
        low, high = (low, quality) if found > coded_bytes else (quality, high)
        step = 10 * math.log(coded_bytes / max(found, 1)) / math.log(_GROWTH)
        quality = quality + step if low < quality + step < high else (low + high) / 2
    return quality

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
QUALITY_LADDER = range(10, 91, 10)  # qualities that a divergence is measured at
PREDICTED_TOKENS = 128  # tokens, the newest of the dump
_ROUNDS, _PROBES = 4, 8
_GROWTH = 1.6  # times more bytes for ten points of quality, about


def compress_to_bytes(
    codec: CacheCodec, dump: KVDump, target: float, progress: Callable[[int], None] | None = None
) -> tuple[CacheCodec, bytes]:
    """Compress a dump to a file within 2 % of a size.

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
        The file.

    Raises
    ------
    InputError
        For a target beyond what qualities 0 to 100 reach, and for a method without a quality.

    Notes
    -----
    The quality is found on the code lengths of up to four blocks and then corrected by the sizes of complete files.
    """
    _check_has_quality(codec)
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
    advice = "ask for less" if 0 < len(blob) < target else "fewer recent tokens make smaller files"
    raise InputError(
        f"{target:,.0f} bytes are not met: {reached}header, sinks, tokens and unquantized recent tokens, which no quality "
        f"changes, take about {fixed:,}; {advice}"
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
        10 to 90.

    Raises
    ------
    InputError
        For a target that quality 90 does not reach, for one that is no number above 0, and for a method without a
        quality.

    Notes
    -----
    Measured at qualities 10, 20, ... 90, and interpolated linearly in the logarithm of the divergence between them.
    """
    _check_has_quality(codec)
    if not target > 0 or not math.isfinite(target):
        raise InputError(f"the divergence to reach is a number of nats above 0, not {target}")
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


def _check_has_quality(codec: CacheCodec) -> None:
    """Raise InputError for a codec whose artifacts fix the ratio."""
    if codec.quality is None:
        raise InputError("these artifacts are of a method with one ratio: calibrate for another, or with kvtc-rd")


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

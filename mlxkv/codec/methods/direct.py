"""Lossy coding without calibration: a block tells all that its numbers need to be decoded.

    rows [n, p] --minus each channel's mean, over its head's scale--> one step, dead zone--> integers --fixed tables, rANS--> bytes

Keys come with their rotation undone, so that a channel is alike in all tokens. One step serves all channels of a head, so
those that vary little take few bits; the entropy coder learns how much each varies from the block itself.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np

from mlxkv.codec.methods._uncalibrated import UncalibratedMethod, UncalibratedStream
from mlxkv.codec.methods.base import BlockCoder, CodecConfig, StreamArtifacts, codec_methods
from mlxkv.codec.stages import entropy
from mlxkv.codec.stages.dead_zone import dequantize, quantize
from mlxkv.errors import FormatError, InputError

STEP = {"k": 4.0, "v": 4.0}  # at quality 0, in scales of a head
MEAN_STEPS = 16  # of a mean to one of a number
SCALE_STEPS = 8  # of a scale to a doubling
SIDE_ROWS = 2  # rows of codes before those of tokens: means, scales
_FINEST = 2.0**-20  # of a scale to the largest mean of its head, so that all integers stay small
_SIDE = struct.Struct("<I")


@dataclass(frozen=True, kw_only=True)
class DirectConfig(CodecConfig):
    """Settings of the `direct` method, which has no calibration: none has an effect."""


def _checked_quality(quality: object) -> float:
    """Check that a quality is a number from 0 to 100 and return it."""
    if not isinstance(quality, int | float) or isinstance(quality, bool) or not 0 <= quality <= 100:
        raise InputError(f"the quality of direct is a number from 0 to 100, not {quality!r}")
    return quality


class DirectCoder(BlockCoder):
    """Coder of blocks.

    Parameters
    ----------
    streams
        Artifacts of "k" and "v".
    """

    default_quality = 35.0
    window_quality_bonus = 20.0

    def __init__(self, streams: Mapping[str, UncalibratedStream]) -> None:
        self._parts = streams

    def check_quality(self, quality: object) -> None:
        """Accept numbers from 0 to 100."""
        _checked_quality(quality)

    def encode(self, rows: Mapping[str, mx.array], quality: float | None) -> dict[str, np.ndarray]:
        """Return each stream's integers `[2 + n, p]` int32: means and scales of the channels, then the tokens'."""
        steps = 2 ** (-_checked_quality(quality) / 10)
        return {name: self._encode(name, x, STEP[name] * steps) for name, x in rows.items()}

    def _encode(self, name: str, x: mx.array, step: float) -> np.ndarray:
        part = self._parts[name]
        mean = x.mean(axis=0)
        by_head = (x - mean).reshape(len(x), part.heads, part.dim)
        spread = mx.sqrt(mx.square(by_head).mean(axis=(0, 2)))
        spread = mx.maximum(spread, _FINEST * mx.abs(mean).reshape(part.heads, part.dim).max(axis=1))
        exponents = np.rint(SCALE_STEPS * np.log2(np.maximum(np.array(spread, np.float64), 2.0**-100))).astype(np.int32)
        exponents = np.repeat(exponents, part.dim)
        scale = step * _scales(exponents)
        means = np.rint(np.array(mean, np.float64) / scale * MEAN_STEPS).astype(np.int32)
        centred = x - mx.array((means * (scale / MEAN_STEPS)).astype(np.float32))
        return np.concatenate(
            [means[None], exponents[None], quantize(centred / mx.array(scale.astype(np.float32)), 1.0)]
        )

    def pack(self, name: str, codes: np.ndarray) -> bytes:
        """Entropy-code integers."""
        means, exponents = codes[:SIDE_ROWS]
        planes = means.astype("<i4").view(np.uint8).reshape(-1, 4).T.tobytes()
        side = zlib.compress(planes + exponents[:: self._parts[name].dim].astype("<i2").tobytes(), 9)
        return _SIDE.pack(len(side)) + side + entropy.encode(codes[SIDE_ROWS:], _tables())

    def estimate(self, name: str, codes: np.ndarray) -> float:
        """Estimate the bytes that `pack` makes from code lengths."""
        return entropy.estimate(codes[SIDE_ROWS:], _tables()) + 1.5 * self._parts[name].width

    def is_size(self, name: str, tokens: int, size: int, coding: str) -> bool:
        """Check that the section is stored plain and has at least one byte per row."""
        return coding == "raw" and size >= tokens

    def unpack(self, blocks: Sequence[Mapping[str, bytes]], tokens: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """Return the integers of all blocks."""
        return [
            {name: self._unpack(name, data, count) for name, data in payloads.items()}
            for payloads, count in zip(blocks, tokens)
        ]

    def _unpack(self, name: str, data: bytes, tokens: int) -> np.ndarray:
        part = self._parts[name]
        if len(data) < _SIDE.size:
            raise FormatError("a coded block is truncated")
        end = _SIDE.size + _SIDE.unpack_from(data)[0]
        inflater = zlib.decompressobj()
        size = 4 * part.width + 2 * part.heads
        try:
            side = inflater.decompress(data[_SIDE.size : end], size + 1)
        except zlib.error as error:
            raise FormatError(f"the means of a block do not inflate: {error}") from None
        if end > len(data) or len(side) != size or not inflater.eof or inflater.unused_data:
            raise FormatError(f"the means of a block are not of {part.width} channels")
        planes = np.frombuffer(side, np.uint8, 4 * part.width).reshape(4, -1)
        means = np.ascontiguousarray(planes.T).view("<i4").ravel()
        exponents = np.repeat(np.frombuffer(side, "<i2", offset=4 * part.width).astype(np.int32), part.dim)
        (integers,) = entropy.decode([entropy.Section(data[end:], _tables(), tokens, part.width)])
        return np.concatenate([means[None], exponents[None], integers])

    def decode(self, codes: Mapping[str, np.ndarray], tokens: int, quality: float | None) -> dict[str, mx.array]:
        """Return each stream's rows from their integers."""
        steps = 2 ** (-_checked_quality(quality) / 10)
        rows = {}
        for name, integers in codes.items():
            scale = STEP[name] * steps * _scales(integers[1])
            mean = (integers[0] * (scale / MEAN_STEPS)).astype(np.float32)
            rows[name] = dequantize(integers[SIDE_ROWS:], 1.0) * mx.array(scale.astype(np.float32)) + mx.array(mean)
        return rows


def _scales(exponents: np.ndarray) -> np.ndarray:
    """Return scales float64 of exponents, which count eighths of a doubling."""
    return np.exp2(exponents.clip(-1000, 1000) / SCALE_STEPS)


@cache
def _tables() -> np.ndarray:
    """Return the frequencies `[64, 256]` of all classes, made of integers alone so that they are equal everywhere."""
    return entropy.learn_tables(np.stack([_laplace(0.02 * 1.15**k) for k in range(64)]))


def _laplace(mean: float) -> np.ndarray:
    share = mean / (1 + mean)
    return (share ** np.arange(129) * 1e6).astype(np.int64)


@codec_methods.register("direct")
class Direct(UncalibratedMethod):
    """Lossy coding without calibration."""

    config_class = DirectConfig
    kind = "direct 1"

    def coder(self, streams: Mapping[str, StreamArtifacts]) -> DirectCoder:
        """Return a `DirectCoder`."""
        return DirectCoder(self.checked(streams))

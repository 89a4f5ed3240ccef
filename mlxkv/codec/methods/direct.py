"""Lossy coding without calibration: a block tells all that its numbers need to be decoded.

    rows [n, p] --minus each channel's mean, over its head's scale--> steps --reflections along tokens--> components
    --dead zone--> integers --fixed tables, rANS--> bytes

Keys come with their rotation undone, so that a channel is alike in all tokens. The scale makes errors alike in all heads, in
proportion to what varies there. Reflections gather what the tokens of a block have in common in a few components; keys and
values share them. Integers are coded with tables of the size of their channel times that of their component.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxkv.codec.methods._uncalibrated import UncalibratedMethod, UncalibratedStream
from mlxkv.codec.methods.base import BlockCoder, CodecConfig, StreamArtifacts, codec_methods
from mlxkv.codec.stages import entropy, reflections
from mlxkv.codec.stages.dead_zone import dequantize, quantize
from mlxkv.errors import FormatError, InputError

STEPS = {"k": 4.0, "v": 4.0}  # at quality 0, in scales of a head
MEAN_STEPS = 16  # of a mean to one of a number
SCALE_STEPS = 8  # of a scale to a doubling
MOST_EXPONENT = 400  # of scales, up or down: all that is decoded is finite
_FINEST = 2.0**-17  # of a scale to the largest mean of its head, so that integers stay below 2**30 at every quality
_SIDE = struct.Struct("<IH")  # bytes of the deflated side information, number of reflections


@dataclass(frozen=True, kw_only=True)
class DirectConfig(CodecConfig):
    """Settings of the `direct` method, which has no calibration: none has an effect."""


class Coded(NamedTuple):
    """A stream of a block.

    Parameters
    ----------
    vectors
        Reflections `[m, n]` int8 of both streams; those of values are with the keys.
    exponents
        Scales of heads as eighths of doublings, `[heads]` int16.
    means
        Means of channels `[p]` int32, in MEAN_STEPS to a step.
    integers
        Components `[n, p]` int32.
    sizes
        How they are coded; None when decoded.
    """

    vectors: np.ndarray
    exponents: np.ndarray
    means: np.ndarray
    integers: np.ndarray
    sizes: entropy.Sizes | None


def _step(quality: object, name: str) -> float:
    """Check a quality and return a stream's step, in scales; ten points of quality halve it."""
    if not isinstance(quality, int | float) or isinstance(quality, bool) or not 0 <= quality <= 100:
        raise InputError(f"the quality of direct is a number from 0 to 100, not {quality!r}")
    return STEPS[name] * 2 ** (-quality / 10)


class DirectCoder(BlockCoder):
    """Coder of blocks.

    Parameters
    ----------
    streams
        Artifacts of "k" and "v".
    """

    default_quality = 45.0
    window_quality_bonus = 10.0

    def __init__(self, streams: Mapping[str, UncalibratedStream]) -> None:
        self._parts = streams

    def check_quality(self, quality: object) -> None:
        """Accept numbers from 0 to 100."""
        _step(quality, "k")

    def encode(self, rows: Mapping[str, mx.array], quality: float | None) -> dict[str, Coded]:
        """Return each stream's integers, with what it takes to decode them."""
        parts, centred = {}, {}
        for name, x in rows.items():
            exponents, means = self._measure(name, x, _step(quality, name))
            scale, offset = self._scale_and_mean(name, exponents, means, _step(quality, name))
            parts[name], centred[name] = (exponents, means), (x - offset) / scale
        vectors = reflections.learn_reflections(mx.concatenate(list(centred.values()), axis=1))
        coded = {}
        for name, x in centred.items():
            components = reflections.reflect(vectors, x)
            sizes = entropy.sizes_of(np.array(components))
            stored = vectors if name == "k" else vectors[:0]
            coded[name] = Coded(stored, *parts[name], quantize(components, 1.0), sizes)
        return coded

    def _measure(self, name: str, x: mx.array, step: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the exponents of the heads' scales, and the channels' means as integers."""
        part = self._parts[name]
        mean = x.mean(axis=0)
        by_head = (x - mean).reshape(len(x), part.heads, part.dim)
        largest = mx.abs(mean).reshape(part.heads, part.dim).max(axis=1)
        spread = mx.maximum(mx.sqrt(mx.square(by_head).mean(axis=(0, 2))), _FINEST * largest)
        logs = np.log2(np.maximum(np.array(spread, np.float64), 1e-300))
        if not np.isfinite(logs).all():
            raise InputError("the cache holds NaN, infinite or enormous values")
        exponents = np.rint(SCALE_STEPS * logs).clip(-MOST_EXPONENT, MOST_EXPONENT).astype(np.int16)
        scale, _ = self._scale_and_mean(name, exponents, np.zeros(part.width, np.int32), step)
        return exponents, quantize(mean / scale * MEAN_STEPS, 1.0)

    def _scale_and_mean(
        self, name: str, exponents: np.ndarray, means: np.ndarray, step: float
    ) -> tuple[mx.array, mx.array]:
        """Return the step of each channel and its mean, `[p]` float32."""
        scales = step * np.exp2(exponents.astype(np.float64) / SCALE_STEPS)
        scale = np.repeat(scales, self._parts[name].dim)
        return mx.array(scale.astype(np.float32)), mx.array((means * scale / MEAN_STEPS).astype(np.float32))

    def pack(self, name: str, codes: Coded) -> bytes:
        """Code integers and side information."""
        planes = codes.means.astype("<i4").view(np.uint8).reshape(-1, 4).T.tobytes()
        side = zlib.compress(reflections.to_bytes(codes.vectors) + codes.exponents.astype("<i2").tobytes() + planes, 9)
        integers = entropy.encode(codes.integers, entropy.even_tables(), codes.sizes)
        return _SIDE.pack(len(side), len(codes.vectors)) + side + integers

    def estimate(self, name: str, codes: Coded) -> float:
        """Estimate the bytes that `pack` makes from code lengths."""
        side = 0.6 * codes.vectors.size + 1.5 * codes.means.size
        return side + entropy.estimate(codes.integers, entropy.even_tables(), codes.sizes)

    def is_size(self, name: str, tokens: int, size: int, coding: str) -> bool:
        """Check that the section is stored plain and has at least one byte per row."""
        return coding == "raw" and size >= tokens

    def unpack(self, blocks: Sequence[Mapping[str, bytes]], tokens: Sequence[int]) -> Iterator[dict[str, Coded]]:
        """Yield the integers of one block after the other: each has lanes enough, and together they take memory."""
        for payloads, count in zip(blocks, tokens):
            yield {name: self._unpack(name, data, count) for name, data in payloads.items()}

    def _unpack(self, name: str, data: bytes, tokens: int) -> Coded:
        """Return one stream of a block of n tokens."""
        part = self._parts[name]
        if len(data) < _SIDE.size:
            raise FormatError("a coded block is truncated")
        length, count = _SIDE.unpack_from(data)
        end, of_vectors = _SIDE.size + length, reflections.stored_bytes(count, tokens)
        if end > len(data) or (count and name != "k"):
            raise FormatError(f"a coded block claims {length} bytes of side information and {count} reflections")
        side = _inflated(data[_SIDE.size : end], of_vectors + 2 * part.heads + 4 * part.width)
        vectors = reflections.from_bytes(side[:of_vectors], count, tokens)
        exponents = np.frombuffer(side, "<i2", part.heads, of_vectors).astype(np.int16)
        if np.abs(exponents.astype(int)).max(initial=0) > MOST_EXPONENT:
            raise FormatError(f"scales of a coded block are beyond 2**{MOST_EXPONENT // SCALE_STEPS}")
        planes = np.frombuffer(side, np.uint8, offset=of_vectors + 2 * part.heads).reshape(4, -1)
        means = np.ascontiguousarray(planes.T).view("<i4").ravel().astype(np.int32)
        section = entropy.Section(data[end:], entropy.even_tables(), tokens, part.width, entropy.WIDE_SHIFTS)
        return Coded(vectors, exponents, means, entropy.decode([section])[0], None)

    def decode(self, codes: Mapping[str, Coded], tokens: int, quality: float | None) -> dict[str, mx.array]:
        """Return each stream's rows from their integers."""
        rows = {}
        for name, coded in codes.items():
            scale, mean = self._scale_and_mean(name, coded.exponents, coded.means, _step(quality, name))
            components = dequantize(coded.integers, 1.0)
            rows[name] = reflections.reflect_back(codes["k"].vectors, components) * scale + mean
        return rows


def _inflated(data: bytes, size: int) -> bytes:
    """Undo DEFLATE, never beyond the size that is needed."""
    inflater = zlib.decompressobj()
    try:
        side = inflater.decompress(data, size + 1)
    except zlib.error as error:
        raise FormatError(f"the side information of a block does not inflate: {error}") from None
    if len(side) != size or not inflater.eof or inflater.unused_data:
        raise FormatError(f"the side information of a block does not inflate to {size} bytes")
    return side


@codec_methods.register("direct")
class Direct(UncalibratedMethod):
    """Lossy coding without calibration."""

    config_class = DirectConfig
    kind = "direct 1"

    def coder(self, streams: Mapping[str, StreamArtifacts]) -> DirectCoder:
        """Return a `DirectCoder`."""
        return DirectCoder(self.checked(streams))

"""Bit-exact coding without calibration.

    cached numbers [n, p] --channel by channel, byte by byte--> planes --tables by channel, rANS--> bytes

The high bytes of a channel's numbers (sign, exponent, first bits of the fraction) are alike in all tokens, so 512 of them
share a table. The low bytes hardly repeat and mostly stay as they are.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxkv.codec.methods._uncalibrated import UncalibratedMethod, UncalibratedStream
from mlxkv.codec.methods.base import BlockCoder, CodecConfig, StreamArtifacts, codec_methods
from mlxkv.codec.unquantized import STORED_TYPES, encode_array, stored_values, to_numpy
from mlxkv.errors import FormatError, InputError
from mlxkv.io import lossless

TYPES = ("float16", "bfloat16", "float32")  # a section's first byte is an index
_PLANE = struct.Struct("<BQ")  # coding, stored bytes
_CODINGS = ("raw", "rans")


@dataclass(frozen=True, kw_only=True)
class ExactConfig(CodecConfig):
    """Settings of the `exact` method, which has no calibration: none has an effect."""


class ExactCoder(BlockCoder):
    """Coder of blocks, whose codes are the cached numbers themselves.

    Parameters
    ----------
    streams
        Artifacts of "k" and "v".
    """

    undoes_rotation = False

    def __init__(self, streams: Mapping[str, UncalibratedStream]) -> None:
        self._parts = streams

    def check_quality(self, quality: object) -> None:
        """Accept None alone: there is one quality."""
        if quality is not None:
            raise InputError(f"exact has no quality, got {quality!r}")

    def encode(self, rows: Mapping[str, mx.array], quality: float | None) -> dict[str, np.ndarray]:
        """Return each stream's numbers `[n, p]` float16 or float32."""
        return {name: to_numpy(x) for name, x in rows.items()}

    def pack(self, name: str, codes: np.ndarray) -> bytes:
        """Code the planes of bytes in the narrowest type that loses nothing."""
        kind, data = encode_array(codes)
        planes = np.frombuffer(data, np.uint8).reshape(*codes.shape, -1).transpose(2, 1, 0)
        parts = [bytes([TYPES.index(kind)])]
        for plane in planes:
            raw = plane.tobytes()
            coded = lossless.encode("rans", raw)
            coding = int(len(coded) < len(raw))
            stored = coded if coding else raw
            parts += [_PLANE.pack(coding, len(stored)), stored]
        return b"".join(parts)

    def estimate(self, name: str, codes: np.ndarray) -> float:
        """Return the bytes that `pack` makes."""
        return float(len(self.pack(name, codes)))

    def is_size(self, name: str, tokens: int, size: int, coding: str) -> bool:
        """Check that the section is stored plain and that planes of so many bytes may be in it."""
        return coding == "raw" and lossless.is_plausible("rans", tokens * self._parts[name].width, size)

    def unpack(self, blocks: Sequence[Mapping[str, bytes]], tokens: Sequence[int]) -> Iterator[dict[str, np.ndarray]]:
        """Yield the numbers of one block after the other: each has lanes enough."""
        for payloads, count in zip(blocks, tokens):
            yield {name: self._unpack(data, count, self._parts[name].width) for name, data in payloads.items()}

    def _unpack(self, data: bytes, tokens: int, width: int) -> np.ndarray:
        """Return numbers `[n, p]` of one section."""
        if not data or data[0] >= len(TYPES):
            raise FormatError(f"a block of exact numbers has the type {data[:1].hex()}")
        kind = TYPES[data[0]]
        size, at = np.dtype(STORED_TYPES[kind]).itemsize, 1
        planes = np.empty((width, tokens, size), np.uint8)
        for index in range(size):
            if len(data) < at + _PLANE.size:
                raise FormatError("a block of exact numbers is truncated")
            coding, stored = _PLANE.unpack_from(data, at)
            at += _PLANE.size
            if coding >= len(_CODINGS) or stored > len(data) - at:
                raise FormatError(f"a block of exact numbers claims coding {coding} of {stored} bytes")
            plane = lossless.decode(_CODINGS[coding], data[at : at + stored], tokens * width)
            planes[..., index] = np.frombuffer(plane, np.uint8).reshape(width, tokens)
            at += stored
        if at != len(data):
            raise FormatError(f"a block of exact numbers has {len(data) - at} bytes too many")
        return stored_values(planes.data, kind).reshape(width, tokens).T

    def decode(self, codes: Mapping[str, np.ndarray], tokens: int, quality: float | None) -> dict[str, mx.array]:
        """Return each stream's numbers."""
        return {name: mx.array(numbers) for name, numbers in codes.items()}


@codec_methods.register("exact")
class Exact(UncalibratedMethod):
    """Bit-exact coding without calibration."""

    config_class = ExactConfig
    kind = "exact 1"

    def coder(self, streams: Mapping[str, StreamArtifacts]) -> ExactCoder:
        """Return an `ExactCoder`."""
        return ExactCoder(self.checked(streams))

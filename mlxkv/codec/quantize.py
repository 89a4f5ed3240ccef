"""Stage 3: groups of coefficients to shift, scale and codes, and back.

Every token's group has its own 16-bit shift and scale. int2 and int4 are affine between the group's minimum and
maximum; fp8 is E4M3 (`mx.to_fp8`: 4 exponent bits, 3 mantissa bits, largest 448) around the group's mean.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

BITS = {"none": 0, "int2": 2, "int4": 4, "fp8": 8}
OVERHEAD_BITS = 32  # shift and scale
E4M3_MAX = 448.0
FLOAT16_MAX = 65504.0
REFITS = 3


def quantize(x: mx.array, kind: str) -> tuple[mx.array, mx.array, mx.array]:
    """x `[..., g]` float32 to shift `[...]`, scale `[...]` (float16) and codes `[..., g]` (uint8)."""
    low, high = x.min(axis=-1), x.max(axis=-1)
    if kind == "fp8":
        shift = x.mean(axis=-1).astype(mx.float16)
        center = shift.astype(mx.float32)
        scale = (mx.maximum(high - center, center - low) / E4M3_MAX).astype(mx.float16)
        return shift, scale, mx.to_fp8(_normalised(x, shift, scale))
    levels = 2 ** BITS[kind] - 1
    shift, scale = low.astype(mx.float16), ((high - low) / levels).astype(mx.float16)
    codes = _round(x, shift, scale, levels)
    for _ in range(REFITS):
        shift, scale = _least_squares(x, codes)
        codes = _round(x, shift, scale, levels)
    return shift, scale, codes.astype(mx.uint8)


def dequantize(shift: mx.array, scale: mx.array, codes: mx.array, kind: str) -> mx.array:
    """The inverse, `[..., g]` float32."""
    steps = mx.from_fp8(codes, mx.float32) if kind == "fp8" else codes.astype(mx.float32)
    return steps * scale.astype(mx.float32)[..., None] + shift.astype(mx.float32)[..., None]


def _round(x: mx.array, shift: mx.array, scale: mx.array, levels: int) -> mx.array:
    return mx.clip(mx.round(_normalised(x, shift, scale)), 0, levels)


def _least_squares(x: mx.array, codes: mx.array) -> tuple[mx.array, mx.array]:
    """The shift and scale that reproduce x best from these codes."""
    center, mean = codes.mean(axis=-1), x.mean(axis=-1)
    spread = codes - center[..., None]
    scale = (spread * (x - mean[..., None])).sum(axis=-1) / mx.maximum(mx.square(spread).sum(axis=-1), 1e-9)
    shift = mx.clip(mean - scale * center, -FLOAT16_MAX, FLOAT16_MAX)  # the line may leave the range of x
    return shift.astype(mx.float16), scale.astype(mx.float16)


def _normalised(x: mx.array, shift: mx.array, scale: mx.array) -> mx.array:
    wide = scale.astype(mx.float32)[..., None]
    return (x - shift.astype(mx.float32)[..., None]) / mx.where(wide == 0, 1.0, wide)


def pack(codes: np.ndarray, bits: int) -> bytes:
    """Flat uint8 codes below 2**bits to bytes, the first code in the lowest bits; zeros fill the last byte."""
    if bits == 8:
        return codes.tobytes()
    per_byte = 8 // bits
    padded = np.zeros(-(-codes.size // per_byte) * per_byte, dtype=np.uint8)
    padded[: codes.size] = codes.ravel()
    lanes = padded.reshape(-1, per_byte)
    out = lanes[:, 0].copy()
    for lane in range(1, per_byte):
        out |= lanes[:, lane] << np.uint8(lane * bits)
    return out.tobytes()


def unpack(data: bytes, count: int, bits: int) -> np.ndarray:
    """The inverse of `pack`: `count` codes as uint8."""
    raw = np.frombuffer(data, dtype=np.uint8)
    if bits == 8:
        return raw
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((raw[:, None] >> shifts) & np.uint8(2**bits - 1)).reshape(-1)[:count]


def packed_size(count: int, bits: int) -> int:
    """Bytes that `pack` makes of `count` codes."""
    return -(-count * bits // 8)

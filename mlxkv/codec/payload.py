"""Stage 4: one block of coefficients to bytes by the plan, and back.

For each run of equal groups: all shifts, all scales (low bytes first, then high bytes), then the packed codes,
component by component, so that DEFLATE meets alike bytes side by side.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlxkv.codec.plan import Plan, Run
from mlxkv.codec.quantize import BITS, FLOAT16_MAX, dequantize, pack, packed_size, quantize, unpack
from mlxkv.errors import InputError


def encode_block(plan: Plan, coefficients: mx.array) -> bytes:
    """Coefficients `[n, r]` float32 to `payload_size(plan, n)` bytes.

    Raises InputError for values that are not finite or beyond float16, the type of shifts.
    """
    if not (mx.abs(coefficients).max() <= FLOAT16_MAX).item():
        raise InputError("the cache holds NaN, infinite or enormous values: its coefficients do not fit float16")
    parts = []
    for run in plan.runs():
        groups = coefficients[:, run.start : run.stop].reshape(-1, run.count, run.size)
        shift, scale, codes = quantize(groups, run.kind)
        parts += [_byte_planes(shift), _byte_planes(scale), pack(np.array(codes.transpose(1, 2, 0)), BITS[run.kind])]
    return b"".join(parts)


def decode_block(plan: Plan, data: bytes, tokens: int) -> mx.array:
    """The inverse: `[tokens, r]` float32, zero where the plan codes nothing. `data` must be of the exact size."""
    parts, position, done = [], 0, 0
    for run in plan.runs():
        if run.start > done:
            parts.append(mx.zeros((tokens, run.start - done)))
        values, position = _decode_run(run, data, position, tokens)
        parts.append(values)
        done = run.stop
    if plan.rank > done:
        parts.append(mx.zeros((tokens, plan.rank - done)))
    return mx.concatenate(parts, axis=1)


def payload_size(plan: Plan, tokens: int) -> int:
    """Bytes that `encode_block` makes of `tokens` rows."""
    return sum(_side_bytes(run, tokens) * 2 + _code_bytes(run, tokens) for run in plan.runs())


def _decode_run(run: Run, data: bytes, position: int, tokens: int) -> tuple[mx.array, int]:
    side, codes = _side_bytes(run, tokens), _code_bytes(run, tokens)
    shift, scale = (_from_planes(data[p : p + side], run.count) for p in (position, position + side))
    position += 2 * side
    count = run.count * run.size * tokens
    flat = unpack(data[position : position + codes], count, BITS[run.kind])
    values = dequantize(shift, scale, mx.array(flat.reshape(run.count, run.size, tokens)).transpose(0, 2, 1), run.kind)
    return values.swapaxes(0, 1).reshape(tokens, run.count * run.size), position + codes


def _side_bytes(run: Run, tokens: int) -> int:
    return 2 * run.count * tokens


def _code_bytes(run: Run, tokens: int) -> int:
    return packed_size(run.count * run.size * tokens, BITS[run.kind])


def _byte_planes(values: mx.array) -> bytes:
    """float16 `[n, count]` to the low bytes of `[count, n]`, then the high bytes."""
    return np.ascontiguousarray(values.T, dtype="<f2").view(np.uint8).reshape(-1, 2).T.tobytes()


def _from_planes(data: bytes, count: int) -> mx.array:
    """The inverse of `_byte_planes`, as `[count, n]`."""
    planes = np.frombuffer(data, dtype=np.uint8).reshape(2, -1)
    return mx.array(np.ascontiguousarray(planes.T).view("<f2").reshape(count, -1))

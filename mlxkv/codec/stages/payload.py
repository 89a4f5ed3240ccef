"""Stage 4: one block of coefficients to bytes by the plan, and back."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlxkv.codec.stages.plan import Plan
from mlxkv.codec.stages.quantize import FLOAT16_MAX, fit
from mlxkv.errors import InputError
from mlxkv.kernels import groups


def encode_block(plan: Plan, coefficients: mx.array) -> bytes:
    """Coefficients `[r, n]` float32 to `payload_size(plan, n)` bytes.

    Raises InputError for values that are not finite or beyond float16, the type of shifts.
    """
    if not (mx.abs(coefficients).max() <= FLOAT16_MAX).item():
        raise InputError("the cache holds NaN, infinite or enormous values: its coefficients do not fit float16")
    runs, tokens = list(plan.runs()), coefficients.shape[1]
    sides = [fit(coefficients[run.start : run.stop].reshape(run.count, run.size, tokens), run.kind) for run in runs]
    nothing = mx.zeros((0, tokens), mx.float16)
    shifts = mx.concatenate([nothing, *(shift for shift, _ in sides)])
    scales = mx.concatenate([nothing, *(scale for _, scale in sides)])
    return np.array(groups.pack(coefficients, shifts, scales, runs)).tobytes()


def decode_block(plan: Plan, data: bytes, tokens: int) -> mx.array:
    """The inverse: `[r, tokens]` float32, zero where the plan codes nothing. `data` must be of the exact size."""
    return groups.unpack(mx.array(np.frombuffer(data, np.uint8)), list(plan.runs()), plan.rank, tokens)


def payload_size(plan: Plan, tokens: int) -> int:
    """Bytes that `encode_block` makes of `tokens` rows."""
    return groups.payload_size(list(plan.runs()), tokens)

"""Blocks of coefficients to packed bytes according to a bit plan, and back."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlxkv.codec.stages.plan import Plan
from mlxkv.codec.stages.quantize import FLOAT16_MAX, fit
from mlxkv.errors import FormatError, InputError
from mlxkv.kernels import groups


def encode_block(plan: Plan, coefficients: mx.array) -> bytes:
    """Quantize and pack one block of coefficients.

    Parameters
    ----------
    plan
        Groups of components and their types.
    coefficients
        Coefficients `[r, n]` float32 of n tokens, r the plan's rank.

    Returns
    -------
    bytes
        `payload_size(plan, n)` bytes.

    Raises
    ------
    InputError
        For values that are not finite or exceed float16, the type of shifts (the groups' offsets).
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
    """Return the inverse of `encode_block`.

    Parameters
    ----------
    plan
        The plan that the data was coded with.
    data
        Exactly `payload_size(plan, tokens)` bytes.
    tokens
        Number of tokens n.

    Returns
    -------
    mx.array
        Coefficients `[r, n]` float32, zero where the plan codes nothing.

    Raises
    ------
    FormatError
        When the data holds NaN or infinite values.
    """
    payload, runs = np.frombuffer(data, np.uint8), list(plan.runs())
    _check_finite(payload, runs, tokens)
    return groups.unpack(mx.array(payload), runs, plan.rank, tokens)


def _check_finite(payload: np.ndarray, runs: list[groups.Run], tokens: int) -> None:
    """Look at the exponents of shifts and scales, and at fp8 codes: few bytes, where rows would be many."""
    start = 0
    for run in runs:
        count, stop = run.count * tokens, start + run.payload_bytes(tokens)
        sides = payload[start : start + 4 * count].reshape(4, count)[1::2]  # high bytes of shifts, then of scales
        codes = payload[start + 4 * count : stop] if run.kind == "fp8" else payload[:0]
        if ((sides & 0x7C) == 0x7C).any() or ((codes & 0x7F) == 0x7F).any():
            raise FormatError("a block holds NaN or infinite values")
        start = stop


def payload_size(plan: Plan, tokens: int) -> int:
    """Return the number of bytes that `encode_block` makes.

    Parameters
    ----------
    plan
        Groups of components and their types.
    tokens
        Number of tokens n.

    Returns
    -------
    int
        Bytes.
    """
    return groups.payload_size(list(plan.runs()), tokens)

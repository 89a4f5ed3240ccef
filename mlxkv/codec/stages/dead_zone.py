"""Uniform quantization with a dead zone: coefficients to integers with one step size, and back."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlxkv.errors import InputError

DEAD_ZONE_ROUNDING = 0.40  # below 1/2: the dead zone around 0 is wider than a step
RECONSTRUCTION_OFFSET = 0.12  # in steps: shrunken vectors flatten attention, which costs more than their squared error
MAX_MAGNITUDE = 2**30  # of an integer


def quantize(coefficients: mx.array, step: float) -> np.ndarray:
    """Round coefficients to integers.

    Parameters
    ----------
    coefficients
        Coefficients `[n, r]` float32.
    step
        Width of a quantization interval, above 0.

    Returns
    -------
    np.ndarray
        Integers `[n, r]` int32.

    Raises
    ------
    InputError
        For values that are not finite or far beyond any cache.

    Examples
    --------
    >>> quantize(mx.array([[0.55, 0.65, -1.7]]), step=1.0).tolist()
    [[0, 1, -2]]
    """
    magnitudes = mx.abs(coefficients) / step
    if magnitudes.size and not (magnitudes.max() < MAX_MAGNITUDE).item():
        raise InputError("the cache holds NaN, infinite or enormous values")
    return np.array((mx.sign(coefficients) * mx.floor(magnitudes + DEAD_ZONE_ROUNDING)).astype(mx.int32))


def dequantize(integers: np.ndarray, step: float) -> mx.array:
    """Return the coefficients that integers represent, slightly farther from 0 than the multiples of the step.

    Parameters
    ----------
    integers
        Integers `[n, r]` int32.
    step
        Width of a quantization interval, as for `quantize`.

    Returns
    -------
    mx.array
        Coefficients `[n, r]` float32.
    """
    q = mx.array(integers).astype(mx.float32)
    return (q + RECONSTRUCTION_OFFSET * mx.sign(q)) * step

"""Shift and scale of each group of coefficients. mlxkv/kernels/groups.py rounds and packs with them.

Each group of each token has its own float16 shift (the offset added to scaled codes) and scale: a coefficient is
`shift + scale * code`. int2 and int4 span the group's minimum to its maximum, then are refitted by least squares; fp8 is
E4M3 around the group's mean.
"""

from __future__ import annotations

import mlx.core as mx

from mlxkv.kernels.groups import BITS, from_codes, to_codes

E4M3_MAX = 448.0
FLOAT16_MAX = 65504.0
REFITS = 3


def fit(x: mx.array, kind: str) -> tuple[mx.array, mx.array]:
    """Return the shift and scale of groups of coefficients.

    Parameters
    ----------
    x
        Groups `[count, size, n]` float32: `count` groups of `size` components of n tokens.
    kind
        "int2", "int4" or "fp8".

    Returns
    -------
    tuple[mx.array, mx.array]
        Shift (offset) and scale `[count, n]` float16.

    Notes
    -----
    Refitting by least squares departs from KVTC (arXiv 2511.01815), which derives both from the group's extremes. The
    format is unaffected.
    """
    low, high = x.min(axis=1), x.max(axis=1)
    if kind == "fp8":
        shift = x.mean(axis=1).astype(mx.float16)
        center = shift.astype(mx.float32)
        return shift, (mx.maximum(high - center, center - low) / E4M3_MAX).astype(mx.float16)
    shift, scale = low.astype(mx.float16), ((high - low) / (2 ** BITS[kind] - 1)).astype(mx.float16)
    for _ in range(REFITS):
        shift, scale = _least_squares(x, to_codes(x, shift, scale, kind).astype(mx.float32))
    return shift, scale


def quantization_round_trip(x: mx.array, kind: str) -> mx.array:
    """Quantize groups and return the restored coefficients.

    Parameters
    ----------
    x
        Groups `[count, size, n]` float32.
    kind
        "int2", "int4" or "fp8".

    Returns
    -------
    mx.array
        Restored groups `[count, size, n]` float32.
    """
    shift, scale = fit(x, kind)
    return from_codes(to_codes(x, shift, scale, kind), shift, scale, kind)


def _least_squares(x: mx.array, codes: mx.array) -> tuple[mx.array, mx.array]:
    """Return the shift and scale that reproduce x from these codes with the least squared error."""
    center, mean = codes.mean(axis=1), x.mean(axis=1)
    spread = codes - center[:, None]
    scale = (spread * (x - mean[:, None])).sum(axis=1) / mx.maximum(mx.square(spread).sum(axis=1), 1e-9)
    # The fitted line may leave the range of x.
    sides = (mx.clip(side, -FLOAT16_MAX, FLOAT16_MAX) for side in (mean - scale * center, scale))
    shift, scale = (side.astype(mx.float16) for side in sides)
    return shift, scale

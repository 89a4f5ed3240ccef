"""Descriptions of mlx-lm's rope modules."""

from __future__ import annotations

from typing import Any

from mlxkv.errors import UnsupportedError
from mlxkv.spec import Rope


def read_rope(module: Any) -> Rope:
    """Describe the rotation that a live model's rope module applies.

    Parameters
    ----------
    module
        `mlx.nn.RoPE`, or one of the modules of `mlx_lm/models/rope_utils.py`.

    Returns
    -------
    Rope
        The rotation.

    Raises
    ------
    UnsupportedError
        For angles that depend on more than the position (dynamic NTK scaling).

    Examples
    --------
    >>> import mlx.nn as nn
    >>> read_rope(nn.RoPE(8, base=500000.0)).base
    500000.0
    """
    kind = type(module).__name__
    dims = module.dim if kind == "SuScaledRoPE" else module.dims
    if kind == "RoPE":
        return Rope(dims, base=float(module.base), traditional=module.traditional, scale=float(module.scale))
    if kind in ("Llama3RoPE", "YarnRoPE", "SuScaledRoPE", "ProportionalRoPE"):
        gain = getattr(module, "mscale", getattr(module, "_scale", 1.0))
        traditional = getattr(module, "traditional", False)
        return Rope(dims, freqs=tuple(module._freqs.tolist()), traditional=traditional, gain=float(gain))
    raise UnsupportedError(f"cannot undo {kind}: its angles do not depend on the position alone")

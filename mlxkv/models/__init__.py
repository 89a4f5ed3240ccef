"""Adapters: one file for each mlx-lm model module, each with `spec(model) -> CacheSpec`.

The file name is the registry: a model whose class lives in `mlx_lm.models.qwen3` is described by
`mlxkv/models/qwen3.py`. Everything is read from the live model, never from a table of known models.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from mlxkv.errors import UnsupportedError
from mlxkv.spec import CacheSpec, Rope, Slot


def available() -> list[str]:
    """Names of all adapters."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def model_type(model: Any) -> str:
    """The mlx-lm module that implements the model; Mistral, say, is implemented by `llama`."""
    return type(model).__module__.rpartition(".")[2]


def cache_spec(model: Any) -> CacheSpec:
    """What this live model caches. Raises UnsupportedError naming the file to add when there is no adapter."""
    name = model_type(model)
    if name not in available():
        raise UnsupportedError(
            f"no adapter for model type {name!r}: add mlxkv/models/{name}.py with spec(model) -> CacheSpec"
            f" (adapters exist for {', '.join(available())})"
        )
    return importlib.import_module(f"{__name__}.{name}").spec(model)


def kv_slots(heads: int, dim: int, rope: Rope | None) -> tuple[Slot, Slot]:
    """The usual pair: rotated keys and plain values, both `[B, heads, T, dim]`."""
    return Slot("keys", heads, dim, rope), Slot("values", heads, dim)


def read_rope(module: Any) -> Rope:
    """Describe one of mlx-lm's rope modules (`mlx.nn.RoPE` or those of `mlx_lm/models/rope_utils.py`).

    Raises UnsupportedError for rope whose angles depend on more than the position (dynamic NTK).
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


def head_dim(attention: Any) -> int:
    """Width of one key head, from the key projection itself, plain or quantized."""
    return attention.k_proj.weight.shape[0] // attention.n_kv_heads

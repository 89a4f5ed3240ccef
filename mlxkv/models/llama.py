"""Llama and the models mlx-lm runs as Llama (SmolLM2, Mistral): rotated keys and values on every layer."""

from __future__ import annotations

from typing import Any

from mlxkv.cache import CacheSpec
from mlxkv.errors import UnsupportedError
from mlxkv.models import head_dim, keys_and_values, model_type, read_rope


def spec(model: Any) -> CacheSpec:
    """Raises UnsupportedError for models with sliding-window layers, whose caches drop old tokens."""
    if any(getattr(layer, "use_sliding", False) for layer in model.layers):
        raise UnsupportedError("sliding-window layers keep only their last tokens; such a cache cannot be dumped whole")
    attention = [layer.self_attn for layer in model.layers]
    layers = tuple(keys_and_values(a.n_kv_heads, head_dim(a), read_rope(a.rope)) for a in attention)
    return CacheSpec(model_type(model), layers)

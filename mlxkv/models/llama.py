"""Llama and the models mlx-lm runs as Llama (SmolLM2, Mistral): rotated keys and values on every layer."""

from __future__ import annotations

from typing import Any

from mlxkv.models import head_dim, kv_slots, model_type, read_rope
from mlxkv.spec import CacheSpec


def spec(model: Any) -> CacheSpec:
    """Sliding-window layers, whose caches give up old tokens by themselves, are not described."""
    attention = [None if getattr(layer, "use_sliding", False) else layer.self_attn for layer in model.layers]
    layers = tuple(a and kv_slots(a.n_kv_heads, head_dim(a), read_rope(a.rope)) for a in attention)
    return CacheSpec(model_type(model), layers)

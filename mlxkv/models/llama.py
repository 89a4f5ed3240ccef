"""Llama and the models mlx-lm runs as Llama (SmolLM2, Mistral): rotated keys and values on every layer."""

from __future__ import annotations

from typing import Any

from mlxkv.models import adapters, head_dim, kv_slots, model_type, read_rope
from mlxkv.spec import CacheSpec


@adapters.register("llama")
def spec(model: Any) -> CacheSpec:
    """Describe the cache of a Llama-like model.

    Parameters
    ----------
    model
        A loaded mlx-lm model.

    Returns
    -------
    CacheSpec
        Keys and values of every layer but those with a sliding window, whose caches drop old tokens by themselves.
    """
    attention = [None if getattr(layer, "use_sliding", False) else layer.self_attn for layer in model.layers]
    layers = tuple(a and kv_slots(a.n_kv_heads, head_dim(a), read_rope(a.rope)) for a in attention)
    return CacheSpec(model_type(model), layers)

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
        Keys and values of every layer, with the window of those that have a sliding one.
    """
    layers = []
    for layer in model.layers:
        attention = layer.self_attn
        window = model.model.sliding_window if getattr(layer, "use_sliding", False) else None
        layers.append(kv_slots(attention.n_kv_heads, head_dim(attention), read_rope(attention.rope), window))
    return CacheSpec(model_type(model), tuple(layers))

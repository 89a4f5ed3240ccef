"""Liquid LFM2: attention on some layers, short convolutions (an ArraysCache, not keys and values) on the others."""

from __future__ import annotations

from typing import Any

from mlxkv.models import adapters, head_dim, kv_slots, model_type, read_rope
from mlxkv.spec import CacheSpec


@adapters.register("lfm2")
def spec(model: Any) -> CacheSpec:
    """Describe the cache of an LFM2 model.

    Parameters
    ----------
    model
        A loaded mlx-lm model.

    Returns
    -------
    CacheSpec
        Keys and values of the attention layers; LFM2-8B-A1B has 6 of them among 24 layers (2, 6, 10, 14, 18 and 21).
    """
    attention = [layer.self_attn if layer.is_attention_layer else None for layer in model.layers]
    layers = tuple(a and kv_slots(a.n_kv_heads, head_dim(a), read_rope(a.rope)) for a in attention)
    return CacheSpec(model_type(model), layers)

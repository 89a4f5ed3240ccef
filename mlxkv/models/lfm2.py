"""Liquid LFM2: attention on some layers, short convolutions (an ArraysCache, not keys and values) on the others."""

from __future__ import annotations

from typing import Any

from mlxkv.models import head_dim, kv_slots, model_type, read_rope
from mlxkv.spec import CacheSpec


def spec(model: Any) -> CacheSpec:
    """LFM2-8B-A1B caches 6 of its 24 layers: 2, 6, 10, 14, 18 and 21."""
    attention = [layer.self_attn if layer.is_attention_layer else None for layer in model.layers]
    layers = tuple(a and kv_slots(a.n_kv_heads, head_dim(a), read_rope(a.rope)) for a in attention)
    return CacheSpec(model_type(model), layers)

"""GPT-2: learned absolute positions, so neither keys nor values are rotated; as many key heads as query heads."""

from __future__ import annotations

from typing import Any

from mlxkv.models import kv_slots, model_type
from mlxkv.spec import CacheSpec


def spec(model: Any) -> CacheSpec:
    attention = [layer.attn for layer in model.layers]
    return CacheSpec(model_type(model), tuple(kv_slots(a.n_head, a.head_dim, None) for a in attention))

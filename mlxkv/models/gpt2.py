"""GPT-2: learned absolute positions, so neither keys nor values are rotated; as many key heads as query heads."""

from __future__ import annotations

from typing import Any

from mlxkv.cache import CacheSpec
from mlxkv.models import keys_and_values, model_type


def spec(model: Any) -> CacheSpec:
    attention = [layer.attn for layer in model.layers]
    return CacheSpec(model_type(model), tuple(keys_and_values(a.n_head, a.head_dim, None) for a in attention))

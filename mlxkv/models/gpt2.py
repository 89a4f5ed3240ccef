"""GPT-2: learned absolute positions, so neither keys nor values are rotated; as many key heads as query heads."""

from __future__ import annotations

from typing import Any

from mlxkv.models import adapters, kv_slots, model_type
from mlxkv.spec import CacheSpec


@adapters.register("gpt2")
def spec(model: Any) -> CacheSpec:
    """Describe the cache of a GPT-2 model.

    Parameters
    ----------
    model
        A loaded mlx-lm model.

    Returns
    -------
    CacheSpec
        Unrotated keys and values of every layer.
    """
    attention = [layer.attn for layer in model.layers]
    return CacheSpec(model_type(model), tuple(kv_slots(a.n_head, a.head_dim, None) for a in attention))

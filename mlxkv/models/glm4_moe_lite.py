"""GLM-4.7-Flash: multi-head latent attention (MLA, arXiv 2405.04434).

mlx-lm caches the normed latent where others cache keys and the rotated `k_pe` where others cache values. The
two are coded as one stream, latent | k_pe, and the values stream has width 0.
"""

from __future__ import annotations

from typing import Any

from mlxkv.models import adapters, model_type, read_rope
from mlxkv.spec import CacheSpec, Layer, Slot


@adapters.register("glm4_moe_lite")
def spec(model: Any) -> CacheSpec:
    """Describe the cache of a GLM-4.7-Flash model.

    Parameters
    ----------
    model
        A loaded mlx-lm model.

    Returns
    -------
    CacheSpec
        One stream of latent `1 x 512` and k_pe `1 x 64` for each of 47 layers, or whatever the model's configuration says.
    """
    layers = []
    for layer in model.layers:
        attention = layer.self_attn
        latent = Slot("latent", 1, attention.kv_lora_rank)
        k_pe = Slot("k_pe", 1, attention.qk_rope_head_dim, read_rope(attention.rope))
        layers.append(Layer(latent, k_pe, latent=True))
    return CacheSpec(model_type(model), tuple(layers))

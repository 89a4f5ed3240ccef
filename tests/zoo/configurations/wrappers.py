"""Models that hold another one: the language part of something that also sees or hears."""

from zoo.configurations.common import EXPERTS, FULL, HEADS, SLIDING, WINDOW
from zoo.configurations.hybrid import QWEN3_5

_TEXT = {"model_type": "llama", **HEADS}
_MODULES = ["model.embed_tokens", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.k_proj"]

CONFIGURATIONS = {
    "mistral3": {
        "text_config": {
            **HEADS,
            "model_type": "ministral3",
            "num_hidden_layers": 4,
            "layer_types": [SLIDING, FULL] * 2,
            "sliding_window": WINDOW,
            "rope_parameters": {
                "rope_theta": 10000.0,
                "rope_type": "default",
                "llama_4_scaling_beta": 0.1,
                "original_max_position_embeddings": 16,
            },
        }
    },
    "pixtral": {"text_config": _TEXT},
    "prism_hadamard_qwen35": {
        "schema_version": 1,
        "tensor_namespace": "mlx-lm-text",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {"path": path, "embedding": path.endswith("embed_tokens"), "dtype": "float16", "block": 0}
            for path in _MODULES
        ],
        "text_config": {**QWEN3_5, "hidden_size": 128, "intermediate_size": 128},
    },
    "qwen2_vl": {"text_config": {**HEADS, "model_type": "qwen2"}},
    "qwen3_vl": {"text_config": {**HEADS, "model_type": "qwen3"}},
    "qwen3_vl_moe": {
        "text_config": {**HEADS, **EXPERTS, "model_type": "qwen3_moe", "decoder_sparse_step": 1, "mlp_only_layers": []}
    },
}

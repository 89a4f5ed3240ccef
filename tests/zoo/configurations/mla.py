"""Models that cache latents (MLA), and models whose indexer chooses the tokens that attention sees."""

from zoo.configurations.common import BASE, HEADS, LATENT, ROUTED, WINDOW

_DEEP = {**LATENT, **ROUTED, "num_hidden_layers": 3, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
_INDEXED = {**_DEEP, "index_head_dim": 16, "index_n_heads": 4, "index_topk": 8, "moe_layer_freq": 1}
_YARN = {
    "type": "yarn",
    "factor": 2.0,
    "original_max_position_embeddings": 512,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
_LONGCAT = {
    **LATENT,
    "attention_method": "MLA",
    "zero_expert_type": "identity",
    "ffn_hidden_size": 96,
    "moe_topk": 2,
    "expert_ffn_hidden_size": 32,
    "n_routed_experts": 4,
    "zero_expert_num": 2,
    "num_layers": 2,
    "routed_scaling_factor": 1.0,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
}

CONFIGURATIONS = {
    "deepseek_v2": {**_DEEP, "topk_method": "greedy", "rope_scaling": _YARN},
    "deepseek_v3": _DEEP,
    "deepseek_v32": _INDEXED,
    "deepseek_v41": {
        **BASE,
        **ROUTED,
        "num_hidden_layers": 4,
        "head_dim": 32,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "o_groups": 2,
        "o_lora_rank": 16,
        "sliding_window": WINDOW,
        "compress_ratios": [0, 4, 4, 1],
        "kv_source_layer_ids": [1, 3],
        "index_source_layer_ids": [1, 3],
        "index_n_heads": 2,
        "index_head_dim": 32,
        "index_topk": 4,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 4,
        "rms_norm_eps": 1e-6,
    },
    "glm4_moe_lite": _DEEP,
    "glm_moe_dsa": {**_INDEXED, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
    "kimi_k25": {"text_config": _DEEP},
    "kimi_vl": {"text_config": _DEEP},
    "longcat_flash": _LONGCAT,
    "longcat_flash_ngram": {**_LONGCAT, "ngram_vocab_size_ratio": 2, "emb_neighbor_num": 3, "emb_split_num": 2},
    "minicpm3": {
        **LATENT,
        "dim_model_base": 64,
        "scale_depth": 1.4,
        "scale_emb": 2.0,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 512,
        },
    },
    "minimax_m3_vl": {
        "text_config": {
            **HEADS,
            "num_hidden_layers": 3,
            "dense_intermediate_size": 96,
            "intermediate_size": 32,
            "shared_intermediate_size": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "moe_layer_freq": [0, 1, 1],
            "sparse_attention_freq": [0, 1, 1],
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_block_size": 4,
            "index_topk_blocks": 3,
        }
    },
    "mistral4": {
        **_DEEP,
        "rope_parameters": {
            "rope_theta": 10000.0,
            "rope_type": "default",
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 16,
        },
    },
    "youtu_llm": LATENT,
}

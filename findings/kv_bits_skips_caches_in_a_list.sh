#!/usr/bin/env bash
# Whoever sets kv_bits expects a quantized cache, or to be told that there is none: with a RotatingKVCache mlx-lm does raise
# NotImplementedError. But models with two caches a layer (Falcon-H1, LongCat-Flash, DeepSeek-V3.2) keep them in a CacheList.
# That has no to_quantized and is passed over, even where all in it are ordinary KVCaches. Memory and logits are those of a
# run without kv_bits, and nothing says so. So whoever compares something with kv_bits has to look at the cache first.
set -euo pipefail

temp=$(mktemp -d)
trap 'rm -rf "$temp"' EXIT
cd "$temp"

mlx="mlx==0.32.4"
if [ "$(uname)" = Linux ]; then
  mlx="mlx[cpu]==0.32.4"
fi
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check "$mlx" mlx-lm==0.32.2 transformers==5.24.0

TRANSFORMERS_VERBOSITY=error venv/bin/python -I - <<'PYTHON'
import sys
import warnings
from importlib import import_module
from importlib.metadata import version

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

PROMPT, COUNT = 100, 8
BASE = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 96,
        "num_key_value_heads": 1, "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 256}
MAMBA = {"mamba_chunk_size": 16, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 16, "mamba_n_heads": 4,
         "mamba_rms_norm": True, "embedding_multiplier": 1.0, "lm_head_multiplier": 1.0, "key_multiplier": 1.0}
LATENT = {"attention_method": "MLA", "zero_expert_type": "identity", "ffn_hidden_size": 96, "moe_topk": 2,
          "expert_ffn_hidden_size": 32, "n_routed_experts": 4, "zero_expert_num": 1, "num_layers": 2, "kv_lora_rank": 64,
          "q_lora_rank": 32, "qk_rope_head_dim": 64, "qk_nope_head_dim": 16, "v_head_dim": 16, "routed_scaling_factor": 1.0,
          "mla_scale_q_lora": True, "mla_scale_kv_lora": True, "attention_bias": False}


def random_model(kind, more):
    module = import_module(f"mlx_lm.models.{kind}")
    model = module.Model(module.ModelArgs.from_dict({"model_type": kind, **BASE, **more}))
    mx.random.seed(0)
    model.update(tree_map(lambda w: w.shape[-1] ** -0.5 * mx.random.normal(w.shape) if w.ndim > 1 else w, model.parameters()))
    return model


def run(model, bits, cache=None):
    """Cache, logits and number of warnings of some tokens generated from a random prompt."""
    cache = cache or make_prompt_cache(model)
    prompt = mx.random.randint(0, 97, (PROMPT,), key=mx.random.key(1))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        steps = generate_step(prompt, model, prompt_cache=cache, max_tokens=COUNT, kv_bits=bits, quantized_kv_start=0)
        logits = mx.stack([logits for _, logits in steps])
    return cache, logits, len(told)


def parts(cache):
    """Names of the caches of the first layer, inside of lists too."""
    return ", ".join(type(c).__name__ for c in getattr(cache[0], "caches", cache[:1]))


print(f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}")
print("kv_bits does nothing, and says nothing, for models that keep their caches in lists.\n")
seen = {}
for kind, more in (("llama", {}), ("falcon_h1", MAMBA), ("longcat_flash", LATENT)):
    model = random_model(kind, more)
    (plain, first, _), (asked, second, told) = run(model, None), run(model, 8)
    sizes = [sum(entry.nbytes for entry in cache) for cache in (plain, asked)]
    seen[kind] = sizes[0] == sizes[1], mx.array_equal(first, second).item(), told
    print(f"{kind}: {type(plain[0]).__name__} a layer")
    print(f"  caches without kv_bits: {parts(plain)}; with 8 bits: {parts(asked)}")
    print(f"  bytes {sizes[0]:,} and {sizes[1]:,}; same logits: {seen[kind][1]}; warnings: {told}\n")
try:
    run(random_model("llama", {}), 8, [RotatingKVCache(max_size=64, keep=4) for _ in range(2)])
    refused = ""
except NotImplementedError as error:
    refused = str(error)
print(f"llama, RotatingKVCache a layer\n  refused: {refused or 'no'}\n")
expected = {"llama": (False, False, 0), "falcon_h1": (True, True, 0), "longcat_flash": (True, True, 0)}
if seen != expected or not refused:
    sys.exit(f"The behaviour has changed: expected same bytes and logits for lists alone ({expected}), seen {seen}")
print("As described.")
PYTHON

#!/usr/bin/env bash
# DeepSeek-V3.2 and GLM-5 choose the tokens that they attend to with an indexer, which caches keys and needs no values. In
# mlx-lm its cache is an ordinary KVCache that is given the keys twice and then zeros for values: half of an indexer's cache
# is zeros, counted in nbytes, saved to files, and made anew for every token. A codec or a store has to know that these
# values are nothing, or it carries as many bytes of zeros as of keys.
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
from importlib.metadata import version

import mlx.core as mx
from mlx_lm.models import deepseek_v32
from mlx_lm.models.cache import make_prompt_cache

CONFIG = {
    "model_type": "deepseek_v32", "vocab_size": 97, "hidden_size": 64, "index_head_dim": 32, "index_n_heads": 2,
    "index_topk": 8, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "n_shared_experts": 1, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "kv_lora_rank": 24, "q_lora_rank": 32, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 16, "n_group": 1, "topk_group": 1, "max_position_embeddings": 256,
    "rope_theta": 10000.0,
}
model = deepseek_v32.Model(deepseek_v32.ModelArgs.from_dict(CONFIG))
cache = make_prompt_cache(model)
mx.eval(model(mx.arange(20)[None], cache=cache), [entry.state for entry in cache])
mx.eval(model(mx.array([[3]]), cache=cache), [entry.state for entry in cache])
latents, indexer = cache[0].caches
print(f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}")
print("Half of an indexer's cache is zeros.\n")
for name, part in (("latents", latents), ("indexer", indexer)):
    zeros = [not mx.any(x).item() for x in (part.keys, part.values)]
    sizes = part.keys.nbytes, part.values.nbytes
    print(f"{name}: keys {sizes[0]:,} bytes, values {sizes[1]:,} bytes; all zeros: keys {zeros[0]}, values {zeros[1]}")
print()
half = indexer.keys.nbytes == indexer.values.nbytes == indexer.nbytes // 2
if not half or mx.any(indexer.values).item() or not mx.any(indexer.keys).item() or not mx.any(latents.values).item():
    sys.exit("The behaviour has changed: expected as many bytes of zeros as of keys in the indexer's cache alone")
print("As described.")
PYTHON

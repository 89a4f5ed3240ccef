#!/usr/bin/env bash
# Three of four layers of Llama 4 attend within chunks of 8192 tokens, and their ChunkedKVCache drops the oldest rows once a
# text is longer. Files that mlx-lm 0.31.3 saves of such a cache hold the rows and how many were dropped before them, but not
# how many tokens were seen. On loading it takes the rows for that number: the next token gets another position than it
# had, and is written over rows in use. Nothing is raised; the model goes on with other logits. 0.32 saves the number, but
# files of 0.31 exist, and whoever reads one of Llama 4 has to get the number elsewhere, or refuse.
set -euo pipefail

temp=$(mktemp -d)
trap 'rm -rf "$temp"' EXIT
cd "$temp"

mlx="mlx==0.32.4"
if [ "$(uname)" = Linux ]; then
  mlx="mlx[cpu]==0.32.4"
fi
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check "$mlx" mlx-lm==0.31.3 transformers==5.24.0

TRANSFORMERS_VERBOSITY=error venv/bin/python -I - <<'PYTHON'
import sys
from importlib.metadata import version

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models import llama4
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache

CHUNK, STEP, COUNT = 1024, 512, 6  # Llama 4 has chunks of 8192; mlx-lm reads prompts in steps of 2048
CONFIG = {
    "model_type": "llama4_text", "hidden_size": 32, "intermediate_size": 48, "intermediate_size_mlp": 48, "vocab_size": 97,
    "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "rope_scaling": None, "max_position_embeddings": 65536, "attention_bias": False,
    "attention_chunk_size": CHUNK, "use_qk_norm": True, "attn_temperature_tuning": 4, "floor_scale": 8192,
    "attn_scale": 0.1, "num_local_experts": 2, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2,
}
model = llama4.Model(llama4.ModelArgs.from_dict({"model_type": "llama4", "text_config": CONFIG}))
mx.random.seed(0)
model.update(tree_map(lambda w: 1.5 * w.shape[-1] ** -0.5 * mx.random.normal(w.shape) if w.ndim > 1 else w,
                      model.parameters()))


def follow(cache):
    """Logits after one more token, and the likeliest tokens that follow it."""
    logits = [model(mx.array([[5]]), cache=cache)[0, -1]]
    while len(logits) < COUNT:
        logits.append(model(mx.argmax(logits[-1]).reshape(1, 1), cache=cache)[0, -1])
    return np.array(logits[0]), [mx.argmax(x).item() for x in logits]


def observe(tokens):
    """Offsets of a chunked and of a full layer, before and after a file; how far logits then are, and both texts."""
    text = mx.random.randint(0, 97, (1, tokens), key=mx.random.key(1))
    cache = make_prompt_cache(model)
    for part in [*mx.split(text[:, :-1], range(STEP, tokens - 1, STEP), axis=1), text[:, -1:]]:  # as generate_step does
        mx.eval(model(part, cache=cache), [entry.state for entry in cache])
    save_prompt_cache("cache.safetensors", cache)
    loaded = load_prompt_cache("cache.safetensors")
    offsets = [(type(a).__name__, a.offset, b.offset) for a, b in zip(cache[2:], loaded[2:])]
    (first, unsaved), (second, saved) = follow(cache), follow(loaded)
    return offsets, float(np.abs(first - second).max()), unsaved, saved


print(f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}")
print("A ChunkedKVCache that has dropped rows has another offset in its file, and the model goes on otherwise.\n")
seen = {}
for tokens in (CHUNK, 1500):
    offsets, distance, unsaved, saved = observe(tokens)
    seen[tokens] = [after for _, _, after in offsets], distance > 0.1
    print(f"{tokens} tokens")
    for name, before, after in offsets:
        print(f"  {name}: offset {before}, of the file {after}")
    print(f"  next logits differ by up to {distance:.3f}")
    print(f"  likeliest tokens, unsaved: {unsaved}\n  of the file:               {saved}\n")
if seen != {CHUNK: ([CHUNK, CHUNK], False), 1500: ([1024, 1500], True)}:
    sys.exit(f"The behaviour has changed: expected the offset and the text to stay for {CHUNK} tokens only, seen {seen}")
print("As described.")
PYTHON

#!/usr/bin/env bash
# mlx-lm's BatchGenerator reads prompts of unequal length together, the short ones padded on the right. Attention and most
# recurrent layers leave the padding out by a mask. Some models do not: in a batch with a longer prompt, a short prompt's
# next token has other probabilities than alone (mamba, jamba; llama and lfm2 as controls). Nothing is raised, and
# mlx_lm.server batches these models as any other. So whoever batches has to try a model before trusting its padding.
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
import importlib
import sys
from importlib.metadata import version

import mlx.core as mx
from mlx_lm.generate import BatchGenerator

BASE = {
    "hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5, "vocab_size": 97, "rope_theta": 10000.0, "max_position_embeddings": 1024,
}  # fmt: skip
MODELS = {
    "llama": BASE,
    "lfm2": {
        **BASE, "layer_types": ["conv", "full_attention"] * 2, "conv_L_cache": 3, "norm_eps": 1e-5, "conv_bias": False,
        "block_dim": 64, "block_multiple_of": 32, "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False,
    },
    "mamba": {
        "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "state_size": 8, "conv_kernel": 4,
        "use_bias": False, "use_conv_bias": True, "time_step_rank": 8, "vocab_size": 97, "tie_word_embeddings": True,
    },
    "jamba": {
        **BASE, "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2,
        "mamba_d_conv": 4, "mamba_d_state": 8, "mamba_expand": 2, "num_experts": 4, "num_experts_per_tok": 2,
    },
}  # fmt: skip
SHORT, LONG = [3, 5, 7], [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
SAME, OTHER = 1e-3, 0.05  # nats that a probability's logarithm moves by at most, or at least


def build(kind):
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict({"model_type": kind, **MODELS[kind]}))
    mx.eval(model.parameters())
    return model


def next_token(model, prompts):
    """Return the logarithms of the probabilities that follow each prompt."""
    generator = BatchGenerator(model, max_tokens=1, prefill_batch_size=2, completion_batch_size=2)
    uids, found = generator.insert(prompts), {}
    while len(found) < len(prompts):
        for response in generator.next()[1]:
            found.setdefault(response.uid, response.logprobs)
    return [found[uid] for uid in uids]


print(f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}")
print("Largest change of a log probability after the short prompt, when a longer one is read in the same batch.\n")
seen = {}
for kind in MODELS:
    model = build(kind)
    alone, together = next_token(model, [SHORT])[0], next_token(model, [SHORT, LONG])[0]
    moved = mx.abs(alone - together).max().item()
    seen[kind] = "same" if moved < SAME else "other" if moved > OTHER else "between"
    print(f"  {kind:6} {moved:.6f}")
if seen != {"llama": "same", "lfm2": "same", "mamba": "other", "jamba": "other"}:
    sys.exit(f"The behaviour has changed: {seen}")
print("\nAs described.")
PYTHON

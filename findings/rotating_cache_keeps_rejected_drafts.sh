#!/usr/bin/env bash
# Speculative decoding must give the text that the model gives without drafts. mlx-lm asks once, before the first token,
# whether the prompt cache can be trimmed. A RotatingKVCache says yes while it is not full and no afterwards, and
# trim_prompt_cache then returns 0, which nobody reads: rejected drafts stay in the cache, and the text changes. Nothing
# is raised and nothing is printed. Whoever makes a cache that gives tokens up has to say from the start that it cannot be
# trimmed.
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
from mlx.utils import tree_map
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models import llama
from mlx_lm.models.cache import KVCache, RotatingKVCache

PROMPT, COUNT, WINDOW, LAYERS = 8, 20, 16, 2


def random_model(seed):
    """A tiny llama with random weights, wide enough that every token depends on those before it."""
    config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": LAYERS, "intermediate_size": 96,
              "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5,
              "vocab_size": 97, "rope_theta": 10000.0, "tie_word_embeddings": False}
    model = llama.Model(llama.ModelArgs.from_dict(config))
    mx.random.seed(seed)
    model.update(tree_map(lambda w: 1.5 * w.shape[-1] ** -0.5 * mx.random.normal(w.shape) if w.ndim > 1 else w,
                          model.parameters()))
    return model


def new_cache(rotating):
    return [RotatingKVCache(max_size=WINDOW, keep=4) if rotating else KVCache() for _ in range(LAYERS)]


def observe(rotating):
    """Text without drafts, text with drafts of another model, and the tokens that the cache then counts."""
    model, draft = random_model(0), random_model(5)
    prompt = mx.random.randint(0, 97, (PROMPT,), key=mx.random.key(1))
    plain = [token for token, _ in generate_step(prompt, model, prompt_cache=new_cache(rotating), max_tokens=COUNT)]
    caches = new_cache(rotating) + [KVCache() for _ in range(LAYERS)]
    steps = speculative_generate_step(prompt, model, draft, prompt_cache=caches, max_tokens=COUNT, num_draft_tokens=2)
    return plain, [token for token, _, _ in steps], caches[0].offset


print(f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}")
print("Speculative decoding changes the text once a RotatingKVCache is full: rejected drafts stay in it.\n")
seen = {}
for rotating in (False, True):
    plain, drafted, offset = observe(rotating)
    same = next((i for i, pair in enumerate(zip(plain, drafted)) if pair[0] != pair[1]), COUNT)
    seen[rotating] = same, offset
    print(f"{'RotatingKVCache, %d tokens' % WINDOW if rotating else 'KVCache'}")
    print(f"  without drafts: {plain}\n  with drafts:    {drafted}")
    print(f"  equal tokens: {same} of {COUNT}; the cache counts {offset} tokens for {PROMPT + COUNT}\n")
exact = seen[False][0] == COUNT and seen[False][1] <= PROMPT + COUNT
if not exact or seen[True][0] == COUNT or seen[True][1] <= PROMPT + COUNT:
    sys.exit("The behaviour has changed: expected equal text with KVCache, and other text with RotatingKVCache")
print("As described.")
PYTHON

#!/usr/bin/env bash
# A model needs at least one token to predict the next one from. LRUPromptCache, asked for a text that it holds to the last
# token, returns a cache of all of it and no token left to compute, although it could take the last one back: that it does
# where a longer text is cached. None of mlx-lm's generators take an empty rest: they raise. One prompt, two answers: with a
# longer text in the cache there is something to go on with, with exactly this text there is not. So whoever asks a prompt
# cache has to leave a token out, and cut the cache by one, or go on from a shorter text where a cache cannot be cut.
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
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models import llama
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache

SIZES = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 96,
         "num_key_value_heads": 1, "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
mx.random.seed(0)
model = llama.Model(llama.ModelArgs.from_dict({"model_type": "llama", **SIZES}))
model.update(tree_map(lambda w: w.shape[-1] ** -0.5 * mx.random.normal(w.shape) if w.ndim > 1 else w, model.parameters()))


def holding(tokens):
    """A prompt cache store with one text."""
    cache, prompts = make_prompt_cache(model), LRUPromptCache()
    mx.eval(model(mx.array([tokens]), cache=cache))
    prompts.insert_cache("model", tokens, cache)
    return prompts


def outcome(run):
    """What came of it: the next token, or the error."""
    try:
        return f"token {run()}"
    except ValueError as error:
        return f"ValueError: {error}"


def batched(rest, cache, tokens):
    """The next token by BatchGenerator."""
    generator = BatchGenerator(model)
    generator.insert_segments([[rest] if rest else []], max_tokens=[1], caches=[cache], all_tokens=[tokens[: len(tokens) - len(rest)]])
    found = []
    while not found:
        found = generator.next()[1]
    return found[0].token


print(f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}")
print("A prompt that is cached to its last token leaves nothing to generate from; one within a longer text does.\n")
prompt, seen = [int(t) for t in mx.random.randint(0, 97, (20,), key=mx.random.key(1))], {}
for name, cached in (("a longer text", [*prompt, 5, 6]), ("exactly the prompt", prompt)):
    prompts = holding(cached)
    left = len(prompts.fetch_nearest_cache("model", prompt)[1])
    cache, rest = prompts.fetch_nearest_cache("model", prompt)
    alone = outcome(lambda: next(generate_step(mx.array(rest, mx.int32), model, prompt_cache=cache, max_tokens=1))[0])
    cache, rest = prompts.fetch_nearest_cache("model", prompt)
    together = outcome(lambda: batched(rest, cache, prompt))
    seen[name] = left, alone.split(":")[0], together.split(":")[0]
    print(f"cached is {name}: {left} of {len(prompt)} tokens left to compute")
    print(f"  generate_step: {alone}")
    print(f"  BatchGenerator: {together}\n")
(left, *tokens), exact = seen.values()
if left != 1 or len(set(tokens)) != 1 or not tokens[0].startswith("token") or exact != (0, "ValueError", "ValueError"):
    sys.exit(f"The behaviour has changed: expected a token where a longer text is cached, an error otherwise; seen {seen}")
print("As described.")
PYTHON

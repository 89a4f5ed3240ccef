#!/usr/bin/env bash
# LRUPromptCache keeps prompts for mlx_lm.server, and its name says that the least recently used goes first. But a fetch
# refreshes nothing: of one kind (system, user, assistant) the oldest insertion goes, however often it was just used. A prompt
# that every request begins with is lost to as many one-time prompts as the cache has places. And inserting a text removes
# the entries of all its beginnings, where a cache can be cut: once a conversation has gone on from a system prompt, that
# prompt has no entry of its own, and it goes with the conversation. So whoever wants the order of use has to keep it.
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
from mlx_lm.models.cache import KVCache, LRUPromptCache

PLACES = 3


def cache_of(tokens):
    """A prompt cache of one layer that holds so many tokens."""
    cache = KVCache()
    rows = mx.zeros((1, 1, len(tokens), 8))
    cache.update_and_fetch(rows, rows)
    return [cache]


def reused(prompts, tokens):
    """How many of the tokens need not be computed."""
    return len(tokens) - len(prompts.fetch_nearest_cache("model", tokens)[1])


print(f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}")
print("LRUPromptCache gives up what was used last, and the beginning that a longer text shares with others.\n")

prompts, often = LRUPromptCache(max_size=PLACES), list(range(100))
prompts.insert_cache("model", often, cache_of(often))
seen = []
for number in range(1, PLACES + 1):
    seen.append(reused(prompts, [*often, 7]))
    once = [1000 * number + i for i in range(100)]
    prompts.insert_cache("model", once, cache_of(once))
seen.append(reused(prompts, [*often, 7]))
print(f"a prompt of {len(often)} tokens, fetched before each of {PLACES} others came, in a cache of {PLACES} places")
print(f"  tokens reused at each fetch: {seen}\n")

prompts, system = LRUPromptCache(max_size=PLACES), list(range(100))
prompts.insert_cache("model", system, cache_of(system), cache_type="system")
before = prompts.stats_by_type()["system"]["n_sequences"]
talk = [*system, *range(200, 250)]
prompts.insert_cache("model", talk, cache_of(talk), cache_type="assistant")
after = prompts.stats_by_type()["system"]["n_sequences"]
shared = reused(prompts, [*system, 7])
prompts.trim_to(n_sequences=0)
prompts.insert_cache("model", system, cache_of(system), cache_type="system")
other = [5000 + i for i in range(100)]
prompts.insert_cache("model", talk, cache_of(talk), cache_type="assistant")
prompts.insert_cache("model", other, cache_of(other), cache_type="assistant")
prompts.trim_to(n_sequences=1)
left = reused(prompts, [*system, 7])
print(f"a system prompt of {len(system)} tokens, and a conversation that goes on from it")
print(f"  entries of the system prompt: {before} before the conversation, {after} after it (reused through it: {shared})")
print(f"  tokens of the system prompt reused when the conversation has gone: {left}")
if (seen, before, after, shared, left) != ([100, 100, 100, 0], 1, 0, 100, 0):
    sys.exit("The behaviour has changed: expected the prompt that was always used to be gone, and the beginning with it")
print("As described.")
PYTHON

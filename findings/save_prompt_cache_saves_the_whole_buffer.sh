#!/usr/bin/env bash
# mlx-lm's KVCache allocates rows in steps of 256, and its `state` is the whole buffer, not the `offset` rows that are in
# use. save_prompt_cache writes `state`, so the file of a one-token prompt holds 256 rows of keys and of values. Nothing
# is lost: `offset` is saved too. But such a file says little about the size of a cache, and whoever reads `state` or the
# file has to cut it at `offset`.
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
import os
import sys
from importlib.metadata import version

import mlx.core as mx
from mlx_lm.models.cache import KVCache, load_prompt_cache, save_prompt_cache

HEADS, DIM = 2, 4
EXPECTED = [(1, 256, 256, 1), (256, 256, 256, 256), (257, 512, 512, 257)]


def observe(tokens):
    """Tokens put in, rows in `state`, rows in the file, tokens after loading it; and the file's bytes."""
    cache = KVCache()
    ones = mx.ones((1, HEADS, tokens, DIM))
    cache.update_and_fetch(ones, ones)
    save_prompt_cache("cache.safetensors", [cache])
    state = {x.shape[2] for x in cache.state[:2]}
    stored = {x.shape[2] for x in mx.load("cache.safetensors").values() if x.ndim == 4}
    (loaded,) = load_prompt_cache("cache.safetensors")
    assert len(state) == len(stored) == 1, f"keys and values differ: {state} in state, {stored} in the file"
    return (tokens, *state, *stored, loaded.offset), os.path.getsize("cache.safetensors")


print(f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}")
print("KVCache.state, and what save_prompt_cache writes, is the whole buffer of 256-row steps, not `offset` rows.\n")
print("tokens  rows in state  rows in file  offset loaded  bytes of file  bytes of these tokens")
seen = []
for tokens, *_ in EXPECTED:
    row, size = observe(tokens)
    seen.append(row)
    needed = 2 * tokens * HEADS * DIM * mx.float32.size
    print("{:6}  {:13}  {:12}  {:13}  {:13}  {:21}".format(*row, size, needed))
if seen != EXPECTED:
    sys.exit(f"\nThe behaviour has changed: expected {EXPECTED}, seen {seen}")
print("\nAs described.")
PYTHON

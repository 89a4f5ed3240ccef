#!/usr/bin/env bash
# mlx-lm's attention function leaves its arguments as they are with an ordinary cache. With a QuantizedKVCache it multiplies
# the queries by the scale in place, so that the caller's array has changed afterwards: the same call once more, on the same
# objects, gives another result. Nothing is raised. So whoever asks again (to compare caches, to record what a model asks,
# to share queries between layers) has to pass a copy.
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
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, QuantizedKVCache

HEADS, TOKENS, DIM, SCALE = 2, 8, 64, 0.125
mx.random.seed(0)
keys, values, token = (mx.random.normal((1, HEADS, n, DIM)) for n in (TOKENS, TOKENS, 1))


def ask_twice(cache):
    """Return by what the queries were multiplied, and how far the second answer is from the first."""
    held = cache.update_and_fetch(keys, values)
    queries = token * 1
    first, second = (scaled_dot_product_attention(queries, *held, cache=cache, scale=SCALE, mask=None) for _ in range(2))
    factor = (queries / token).reshape(-1)[0].item()
    return factor, mx.abs(first - second).max().item()


print(f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}")
print("What the queries were multiplied by after two calls, and how far the second answer is from the first.\n")
seen = {}
for cache in (KVCache(), QuantizedKVCache(group_size=64, bits=8)):
    factor, moved = ask_twice(cache)
    seen[type(cache).__name__] = factor, moved > 1e-3
    print(f"  {type(cache).__name__:16} {factor:<9g} {moved:.4f}")
if seen != {"KVCache": (1.0, False), "QuantizedKVCache": (SCALE**2, True)}:
    sys.exit(f"The behaviour has changed: {seen}")
print("\nAs described.")
PYTHON

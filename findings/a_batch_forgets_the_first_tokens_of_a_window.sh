#!/usr/bin/env bash
# mlx-lm's RotatingKVCache can keep the first tokens of a text for good (keep=4 is what --max-kv-size gives): models put much
# attention on them, and text falls apart without. A batch of such caches forgets this. Caches that were merged and taken
# out of the batch again have keep=0, and the next tokens overwrite the first ones. Nothing is raised. So a window that goes
# through a batch has to carry the number of its first tokens itself.
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
import copy
import sys
from importlib.metadata import version

import mlx.core as mx
from mlx_lm.models.cache import BatchRotatingKVCache, RotatingKVCache

WINDOW, KEEP, SEEN, MORE = 8, 4, 12, 3


def feed(cache, first, count):
    """Give a cache tokens whose keys and values are their own positions."""
    for position in range(first, first + count):
        token = mx.full((1, 1, 1, 1), float(position))
        cache.update_and_fetch(token, token)
    return sorted(int(x) for x in cache.keys.reshape(-1).tolist())


def held(through_a_batch):
    cache = RotatingKVCache(max_size=WINDOW, keep=KEEP)
    before = feed(cache, 0, SEEN)
    if through_a_batch:
        cache = BatchRotatingKVCache.merge([cache, copy.deepcopy(cache)]).extract(0)
    return before, cache.keep, feed(cache, SEEN, MORE)


print(f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}")
print("A rotating cache that went through a batch no longer keeps the first tokens.\n")
seen = {}
for through_a_batch in (False, True):
    before, keep, after = held(through_a_batch)
    seen[through_a_batch] = keep, after
    print("merged into a batch and extracted" if through_a_batch else "left alone")
    print(f"  tokens held after {SEEN}: {before}; keep is then {keep}\n  after {MORE} more:         {after}\n")
first = list(range(KEEP))
kept = {name: (keep, after[: len(first)] == first) for name, (keep, after) in seen.items()}
if kept != {False: (KEEP, True), True: (0, False)}:
    sys.exit("The behaviour has changed: expected the first tokens to stay alone, and to be gone after a batch")
print("As described.")
PYTHON

#!/usr/bin/env bash
# vllm-mlx keeps prompts that leave its memory on disk, up to --ssd-cache-max-gb. The keys and values of most models are
# bfloat16, and there it writes them as float32: a file has twice the bytes of the cache. What it counts against the limit
# are the bytes of the cache in memory, so that a folder that should hold so many gigabytes comes to hold twice as many.
# Values are not changed by it, and float16 caches are written as they are. So whoever bounds a folder has to count files,
# and whoever compares sizes on disk has to say of which type a cache was.
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
venv/bin/python -m pip install -q --disable-pip-version-check --no-deps vllm-mlx==0.6.0

TRANSFORMERS_VERBOSITY=error venv/bin/python -I - <<'PYTHON'
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.cache import KVCache
from vllm_mlx.ssd_cache import SSDCacheConfig, SSDCacheTier

PROMPTS, TOKENS = 8, 512
LIMIT_GB = 0.002


def spilled(dtype):
    """Bytes of a cache, of the limit, counted and on disk after some prompts, and whether the last came back unchanged."""
    with tempfile.TemporaryDirectory() as folder:
        tier = SSDCacheTier(SSDCacheConfig(cache_dir=folder, max_size_gb=LIMIT_GB))
        tier.start_writer()
        for number in range(PROMPTS):
            cache, tokens = KVCache(), tuple(range(1000 * number, 1000 * number + TOKENS))
            rows = mx.random.normal((1, 4, TOKENS, 64), key=mx.random.key(number)).astype(dtype)
            cache.update_and_fetch(rows, rows)
            mx.eval(cache.keys, cache.values)
            size = cache.nbytes
            tier.enqueue_spill(tokens, [cache], size)
            deadline = time.monotonic() + 30
            while tier.lookup_ssd(tokens) is None and time.monotonic() < deadline:
                time.sleep(0.05)
        time.sleep(0.5)
        files = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
        counted, limit = tier._index.get_total_bytes(), tier._config.max_size_bytes
        tier.close()
    return size, limit, counted, files


print(f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}, vllm-mlx {version('vllm-mlx')}")
print("A folder of cached prompts takes twice its limit where caches are bfloat16.\n")
shares = {}
for dtype in (mx.float16, mx.bfloat16):
    size, limit, counted, files = spilled(dtype)
    name = str(dtype).removeprefix("mlx.core.")
    shares[name] = round(files / counted, 1), counted <= limit, files > 1.2 * limit
    print(f"{name}: {PROMPTS} caches of {size:,} bytes, limit {limit:,}")
    print(f"  counted {counted:,}, files on disk {files:,} ({files / counted:.2f} of what was counted)\n")
if shares != {"float16": (1.0, True, False), "bfloat16": (2.0, True, True)}:
    sys.exit(f"The behaviour has changed: expected files as large as counted, and twice as large, seen {shares}")
print("As described.")
PYTHON

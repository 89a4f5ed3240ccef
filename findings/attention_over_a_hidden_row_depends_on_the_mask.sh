#!/usr/bin/env bash
# A row of attention in which every token is hidden happens: padding, a window that has moved on, a mask made by hand. What
# mlx gives there depends on the type of the mask that says the same. Hidden by a mask of booleans, the row is the mean of
# all hidden values, as if nothing were hidden; hidden by adding -inf, it is NaN; with attention sinks it is 0. The first is
# silent and leaks exactly what was to be hidden. So whoever turns one kind of mask into another has to say what such rows are.
set -euo pipefail

temp=$(mktemp -d)
trap 'rm -rf "$temp"' EXIT
cd "$temp"

mlx="mlx==0.32.4"
if [ "$(uname)" = Linux ]; then
  mlx="mlx[cpu]==0.32.4"
fi
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install -q --disable-pip-version-check "$mlx" numpy==2.3.5

venv/bin/python -I - <<'PYTHON'
import sys
from importlib.metadata import version

import mlx.core as mx
import numpy as np

queries = mx.random.normal((1, 2, 2, 8), key=mx.random.key(0))
keys = mx.random.normal((1, 2, 3, 8), key=mx.random.key(1))
values = mx.random.normal((1, 2, 3, 8), key=mx.random.key(2))
seen = mx.array([[False, False, False], [True, True, False]])  # the first query sees nothing
masks = {
    "booleans": (seen, None),
    "adding -inf": (mx.where(seen, 0.0, -mx.inf), None),
    "booleans, with sinks": (seen, mx.zeros(2)),
}
print(f"mlx {version('mlx')}")
print("Attention of a query that sees no token depends on how the mask says so.\n")
found = {}
for name, (mask, sinks) in masks.items():
    output = np.array(mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.35, mask=mask, sinks=sinks))
    row, mean = output[0, :, 0], np.array(values)[0].mean(axis=1)
    found[name] = "NaN" if np.isnan(row).all() else "0" if not row.any() else "mean" if np.allclose(row, mean, atol=1e-5) else "else"
    print(f"hidden by {name + ':':22} {found[name]:5} {row[0, :4]}")
print()
if list(found.values()) != ["mean", "NaN", "0"]:
    sys.exit(f"The behaviour has changed: expected mean, NaN and 0, found {found}")
print("As described.")
PYTHON

"""Prompts that survive the process: caches of texts in compressed blocks on disk, found by the tokens that they begin with.

`store.py` and `prompts.py` are the interface. A prompt cache is held by `snapshot.py`, cut into blocks by `insertion.py` on the
thread of `writer.py`, and read back by `reading.py` into the arrays of `loading.py`. Which blocks there are is known by `index.py`
and the modules that it uses; none of those needs MLX.
"""

from __future__ import annotations

from mlxkv.store.prompts import Fetched as Fetched
from mlxkv.store.prompts import PromptStore as PromptStore
from mlxkv.store.store import Store as Store

"""Prompts that survive the process: caches of texts in compressed blocks on disk, found by the tokens that they begin with.

`store.py` and `prompts.py` are the interface. A prompt cache is held by `snapshot.py`, cut into blocks by `insertion.py` on the
thread of `writer.py`, and read back by `reading.py` into the arrays of `loading.py`. Which blocks there are is known by `index.py`
and the modules that it uses; those need no MLX, so the public names are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlxkv.store.prompts import Fetched as Fetched
    from mlxkv.store.prompts import PromptStore as PromptStore
    from mlxkv.store.store import Store as Store

_HOME = {"Fetched": "prompts", "PromptStore": "prompts", "Store": "store"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

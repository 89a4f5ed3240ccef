"""Interface to mlx-lm: load a model, run it, copy its cache out, restore a cache.

mlx-lm never exposes a model's cache, so every function here owns the `prompt_cache` list and passes it in.
"""

from __future__ import annotations

from mlxkv import _deprecated
from mlxkv.identity import fingerprint as fingerprint
from mlxkv.lm.extraction import dump as dump
from mlxkv.lm.extraction import extract_cache as extract_cache
from mlxkv.lm.loading import load as load
from mlxkv.lm.loading import name_for_mlx_lm as name_for_mlx_lm
from mlxkv.lm.loading import quantization as quantization
from mlxkv.lm.loading import text_start as text_start
from mlxkv.lm.restoration import CACHE_DTYPES as CACHE_DTYPES
from mlxkv.lm.restoration import restore as restore
from mlxkv.lm.running import PREFILL_CHUNK as PREFILL_CHUNK
from mlxkv.lm.running import continue_greedily as continue_greedily
from mlxkv.lm.running import prefill as prefill

__getattr__ = _deprecated.renamed(__name__, {"take": "extract_cache", "LIVE_TYPES": "CACHE_DTYPES"})

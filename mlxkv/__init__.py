"""mlxkv: the key/value caches of mlx-lm models, many times smaller, with proof that the model does not notice.

Public names are imported on first use, so `import mlxkv` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlxkv import blas

__version__ = "0.1.0"

_HOME = {
    "CacheSpec": "cache",
    "KVDump": "cache",
    "Rope": "cache",
    "Slot": "cache",
    "CalibrationArtifacts": "codec.artifacts",
    "KVTCCacheCodec": "codec.kvtc",
    "MlxkvError": "errors",
    "calibrate": "codec.calibrate",
    "model_preset": "presets",
    "method_preset": "presets",
    "read_dump": "files",
    "write_dump": "files",
}
__all__ = sorted([*_HOME, "__version__"])

if TYPE_CHECKING:
    from mlxkv.cache import CacheSpec, KVDump, Rope, Slot
    from mlxkv.codec.artifacts import CalibrationArtifacts
    from mlxkv.codec.calibrate import calibrate
    from mlxkv.codec.kvtc import KVTCCacheCodec
    from mlxkv.errors import MlxkvError
    from mlxkv.files import read_dump, write_dump
    from mlxkv.presets import method_preset, model_preset

blas.preload()  # has to happen before anything imports mlx.core


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mlxkv' has no attribute {name!r}")
    return getattr(import_module(f"mlxkv.{_HOME[name]}"), name)

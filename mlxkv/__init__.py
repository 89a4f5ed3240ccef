"""mlxkv: the key/value caches of mlx-lm models, many times smaller, with measurements of what the model notices.

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
    "Settings": "codec.kvtc",
    "Slot": "cache",
    "CalibrationArtifacts": "codec.artifacts",
    "KVTCCacheCodec": "codec.codec",
    "MlxkvError": "errors",
    "attach": "live",
    "calibrate": "codec.calibrate",
    "detach": "live",
    "load_cache": "live_files",
    "make_cache": "live",
    "model_preset": "presets",
    "method_preset": "presets",
    "read_dump": "files",
    "save_cache": "live_files",
    "write_dump": "files",
}
__all__ = sorted([*_HOME, "__version__"])

if TYPE_CHECKING:
    from mlxkv.cache import CacheSpec as CacheSpec
    from mlxkv.cache import KVDump as KVDump
    from mlxkv.cache import Rope as Rope
    from mlxkv.cache import Slot as Slot
    from mlxkv.codec.artifacts import CalibrationArtifacts as CalibrationArtifacts
    from mlxkv.codec.calibrate import calibrate as calibrate
    from mlxkv.codec.codec import KVTCCacheCodec as KVTCCacheCodec
    from mlxkv.codec.kvtc import Settings as Settings
    from mlxkv.errors import MlxkvError as MlxkvError
    from mlxkv.files import read_dump as read_dump
    from mlxkv.files import write_dump as write_dump
    from mlxkv.live import attach as attach
    from mlxkv.live import detach as detach
    from mlxkv.live import make_cache as make_cache
    from mlxkv.live_files import load_cache as load_cache
    from mlxkv.live_files import save_cache as save_cache
    from mlxkv.presets import method_preset as method_preset
    from mlxkv.presets import model_preset as model_preset

blas.preload()  # has to happen before anything imports mlx.core


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mlxkv' has no attribute {name!r}")
    return getattr(import_module(f"mlxkv.{_HOME[name]}"), name)

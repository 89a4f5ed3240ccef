"""mlxkv: the key/value caches of mlx-lm models, many times smaller, with measurements of what the model notices.

- Caches in memory while a model runs: `make_cache`, `save_cache` and `load_cache`.
- Caches as small files: `calibrate` once per model, then `CacheCodec` with its `CalibrationArtifacts`.
- Conversations that outlive the process: `Session`; a prompt cache as bytes: `compress` and `decompress`.
- Prompts that outlive the process, in compressed blocks on disk: `Store`.
- Uncompressed caches outside a model: `KVDump`, `read_dump` and `write_dump`; `mlxkv.lm` makes and restores them.

Other errors and settings are in `mlxkv.errors`, `mlxkv.codec.methods` and `mlxkv.live.methods`. Public names are imported on
first use, so `import mlxkv` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlxkv import _deprecated, blas
from mlxkv.version import __version__

if TYPE_CHECKING:
    from mlxkv.codec.artifacts import CalibrationArtifacts
    from mlxkv.codec.calibrate import calibrate
    from mlxkv.codec.methods.kvtc import KVTCConfig
    from mlxkv.codec.methods.kvtc_rd import KVTCRDConfig
    from mlxkv.codec.session import CacheCodec
    from mlxkv.dump import KVDump, read_dump, write_dump
    from mlxkv.errors import MlxkvError
    from mlxkv.live.seam import attach, detach, make_cache
    from mlxkv.live.serialization import load_cache, save_cache
    from mlxkv.presets import method_preset, model_preset
    from mlxkv.session import Session, compress, decompress
    from mlxkv.spec import CacheSpec, Rope, Slot
    from mlxkv.store import Store

__all__ = [
    "CacheCodec",
    "CacheSpec",
    "CalibrationArtifacts",
    "KVDump",
    "KVTCConfig",
    "KVTCRDConfig",
    "MlxkvError",
    "Rope",
    "Session",
    "Slot",
    "Store",
    "__version__",
    "attach",
    "calibrate",
    "compress",
    "decompress",
    "detach",
    "load_cache",
    "make_cache",
    "method_preset",
    "model_preset",
    "read_dump",
    "save_cache",
    "write_dump",
]
_HOME = {
    "CacheCodec": "codec.session",
    "CacheSpec": "spec",
    "CalibrationArtifacts": "codec.artifacts",
    "KVDump": "dump",
    "KVTCConfig": "codec.methods.kvtc",
    "KVTCRDConfig": "codec.methods.kvtc_rd",
    "MlxkvError": "errors",
    "Rope": "spec",
    "Session": "session",
    "Slot": "spec",
    "Store": "store",
    "attach": "live.seam",
    "calibrate": "codec.calibrate",
    "compress": "session",
    "decompress": "session",
    "detach": "live.seam",
    "load_cache": "live.serialization",
    "make_cache": "live.seam",
    "method_preset": "presets",
    "model_preset": "presets",
    "read_dump": "dump",
    "save_cache": "live.serialization",
    "write_dump": "dump",
}

blas.preload()  # has to happen before anything imports mlx.core
_deprecated.install()
_old_name = _deprecated.renamed(
    "mlxkv",
    {"KVTCCacheCodec": "codec.session:CacheCodec", "Settings": "codec.methods.kvtc:KVTCConfig"},
    stacklevel=4,  # from `__getattr__` below
)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        return _old_name(name)
    room, _, _ = _HOME[name].partition(".")
    import_module(f"mlxkv.{room}")  # first: two threads that begin at both ends would wait for each other
    return getattr(import_module(f"mlxkv.{_HOME[name]}"), name)

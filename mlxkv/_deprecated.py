"""Names of earlier versions: they still work, and each warns once.

Nothing here is imported by code that uses new names, but for the few lines that install it.

- A module that has only moved warns when it is imported under its old name.
- A module whose names have changed or gone to several modules warns for each name that is used.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any

# Modules of before the first release: where each, or most of it, is now.
MODULES = {
    "cache": "spec",
    "clustering": "live.clustering",
    "codec.basis": "codec.stages.basis",
    "codec.codec": "codec.session",
    "codec.entropy": "codec.stages.entropy",
    "codec.kvtc": "codec.methods.kvtc",
    "codec.kvtc_rd": "codec.methods.kvtc_rd",
    "codec.kvtc_weighted": "codec.methods.kvtc_weighted",
    "codec.payload": "codec.stages.payload",
    "codec.pca": "codec.stages.pca",
    "codec.plan": "codec.stages.plan",
    "codec.quantize": "codec.stages.quantize",
    "codec.raw": "codec.unquantized",
    "codec.rows": "codec.stages.rows",
    "codec.weighting": "codec.stages.weighting",
    "container": "io.container",
    "files": "dump",
    "live_files": "live.serialization",
    "lossless": "io.lossless",
    "methods": "live.methods",
    "metrics": "evaluate.metrics",
    "miniatures": "bundled.miniatures",
    "quant_fidelity": "integrations.quant_fidelity",
    "resources": "bundled.resources",
    "sketches": "live.sketches",
    "smollm2": "bundled.smollm2",
    "targets": "evaluate.targets",
}
# Where names of those modules are now that have changed or gone elsewhere: a name of the module, or "module:name".
NAMES: dict[str, dict[str, str]] = {
    "cache": {"KVDump": "dump:KVDump", "is_whole": "is_int"},
    "clustering": {
        "Rules": "ClusteringConfig",
        "energy_loss": "live.clustering_error:misplaced_attention",
        "inserted": "insert",
        "pooled": "merge_by_owner",
        "shown": "visible_counts",
    },
    "codec.basis": {"learn": "learn_basis"},
    "codec.codec": {"KVTCCacheCodec": "CacheCodec"},
    "codec.kvtc": {
        "Coder": "KVTCCoder",
        "Settings": "KVTCConfig",
        "StreamArtifacts": "KVTCStream",
    },
    "codec.kvtc_rd": {
        "Coder": "KVTCRDCoder",
        "Settings": "KVTCRDConfig",
        "StreamArtifacts": "KVTCRDStream",
        "step_of": "step_size",
    },
    "codec.kvtc_weighted": {
        "Coder": "KVTCWeightedCoder",
        "Settings": "KVTCWeightedConfig",
        "StreamArtifacts": "KVTCWeightedStream",
    },
    "codec.plan": {"allocate": "allocate_bits", "CODED": "CODED_TYPES", "SIZES": "GROUP_SIZES"},
    "codec.quantize": {"coded": "quantization_round_trip"},
    "codec.raw": {
        "ENDS": "CACHE_SECTIONS",
        "SINKS": "SINK_SECTIONS",
        "described": "read_description",
        "encode": "encode_array",
        "read": "read_array",
        "read_extra": "read_plain_array",
        "widened": "to_numpy",
    },
    "codec.weighting": {
        "gains": "attention_gains",
        "inverse": "invert_weights",
        "learn": "learn_weights",
        "learn_attention": "learn_attention_predictor",
        "weighted": "apply_weights",
    },
    "container": {"END": "END_MAGIC", "rest_of": "encode_tail"},
    "files": {
        "atomic_write": "io.atomic:atomic_write",
        "finish_replacing": "io.growing:finish_interrupted_append",
        "open_input": "io.inputs:open_input",
        "parse_json": "io.inputs:parse_json",
        "read_npy": "io.npz:read_npy",
        "read_npz": "io.npz:read_npz",
        "replace_rest": "io.growing:replace_tail",
    },
    "methods": {},
}
# Every live method and every evaluation had classes of the same names.
for _file, _method in {
    "full": "Full",
    "h2o": "H2O",
    "int4": "Int4",
    "int8": "Int8",
    "kivi": "KIVI",
    "mp_kvm": "MPKVM",
    "random": "Random",
    "sketch_aggregate": "SketchAggregate",
    "sketch_topk": "SketchTopK",
    "sliding_window": "SlidingWindow",
    "smartkv": "SmartKV",
    "streaming_llm": "StreamingLLM",
}.items():
    MODULES[f"methods.{_file}"] = f"live.methods.{_file}"
    NAMES[f"methods.{_file}"] = {"Cache": f"{_method}Cache", "Settings": f"{_method}Config"}
for _file, _evaluation in {
    "attention": "Attention",
    "fidelity": "Fidelity",
    "latency": "Latency",
    "longbench": "LongBench",
    "memory": "Memory",
    "needle": "Needle",
    "perplexity": "Perplexity",
    "ruler": "Ruler",
    "text": "Text",
}.items():
    MODULES[f"evaluate.{_file}"] = f"evaluate.tasks.{_file}"
    NAMES[f"evaluate.{_file}"] = {"Options": f"{_evaluation}Options"}
_CODEC_ARGUMENTS = {"w": "recent", "s": "sinks"}
# Keys of settings in the order that they had as positional arguments, where it is not today's order of fields.
_SETTINGS_ORDER = {
    "KVTCConfig": ["compression_ratio", "rank", "max_bit_budget", "samples_per_file", "s", "seed"],
    "KVTCRDConfig": ["basis_bytes", "samples_per_file", "s", "seed"],
    "KVTCWeightedConfig": ["compression_ratio", "rank", "max_bit_budget", "samples_per_file", "s", "seed"],
}
_warned: set[str] = set()


def warn(old: str, new: str, stacklevel: int = 3) -> None:
    """Say once that a name has changed; `stacklevel` counts from this function to the code that used the name."""
    if old not in _warned:
        _warned.add(old)
        warnings.warn(f"{old} is called {new} now", DeprecationWarning, stacklevel=stacklevel)


def renamed(module: str, names: Mapping[str, str], stacklevel: int = 3) -> Callable[[str], Any]:
    """Return a `__getattr__` for a module that knows these names by their old ones.

    A new name is of the same module, or "module:name" with a module below mlxkv.
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, new = names[name].rpartition(":")
        return _find(module, name, f"mlxkv.{home}" if home else module, new, stacklevel + 1)

    return find


def _find(old_module: str, old: str, module: str, new: str, stacklevel: int) -> Any:
    """Return the object that an old name stands for, with its old arguments where those have changed as well."""
    found = getattr(import_module(module), new)
    public = getattr(sys.modules["mlxkv"], "_HOME", {}).get(new)
    warn(f"{old_module}.{old}", f"mlxkv.{new}" if module == f"mlxkv.{public}" else f"{module}.{new}", stacklevel)
    if old == "KVTCCacheCodec":
        return _old_codec(found)
    return _old_settings(found) if old == "Settings" else found


@cache
def _old_codec(codec: Any) -> Any:
    """Return `CacheCodec` as it was: with `w` and `s` for `recent` and `sinks`, and `at` for `with_quality`."""

    class KVTCCacheCodec(codec):  # type: ignore[misc]
        """Old name of `CacheCodec`."""

        def __init__(self, artifacts: Any, *arguments: Any, **options: Any) -> None:
            super().__init__(artifacts, *arguments, **_new_options("KVTCCacheCodec", options, _CODEC_ARGUMENTS))

        @property
        def w(self) -> int:
            warn("KVTCCacheCodec.w", "CacheCodec.recent")
            return self.recent

        @property
        def s(self) -> int:
            warn("KVTCCacheCodec.s", "CacheCodec.sinks")
            return self.sinks

        def at(self, quality: float) -> Any:
            warn("KVTCCacheCodec.at", "CacheCodec.with_quality")
            return self.with_quality(quality)

    return KVTCCacheCodec


@cache
def _old_settings(config: Any) -> Any:
    """Return a class whose call makes an object of a settings class from the arguments that it had as `Settings`."""
    keys = {key: name for name, key in config.stored_keys().items()}
    order = _SETTINGS_ORDER.get(config.__name__, list(keys))

    class Settings(config):  # type: ignore[misc]
        """Old name of a method's settings; its objects are of the new class, so that every method knows them."""

        def __new__(cls, *arguments: Any, **options: Any) -> Any:
            given = {**dict(zip((keys[key] for key in order), arguments)), **_new_options("Settings", options, keys)}
            return config(**given)

    return Settings


def _new_options(owner: str, options: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return keyword arguments by their new names."""
    for old in options:
        if (new := names.get(old, old)) != old:
            warn(f"the argument {old} of {owner}", new, stacklevel=4)
    return {names.get(old, old): value for old, value in options.items()}


class _OldModule(ModuleType):
    """A module under its old name, which takes every name from where it is now."""

    def __init__(self, old: str) -> None:
        super().__init__(f"mlxkv.{old}", f"Old name of mlxkv.{MODULES[old]}.")
        self._old, self._changed = old, NAMES.get(old)

    def __getattr__(self, name: str) -> Any:
        home = f"mlxkv.{MODULES[self._old]}"
        if name == "__all__":
            own = [key for key, value in vars(import_module(home)).items() if getattr(value, "__module__", "") == home]
            return [key for key in (*own, *(self._changed or ())) if not key.startswith("_")]
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if self._changed is None:
            return getattr(import_module(home), name)
        module, _, new = self._changed.get(name, name).rpartition(":")
        return _find(self.__name__, name, f"mlxkv.{module}" if module else home, new, stacklevel=4)


class _OldModules(MetaPathFinder, Loader):
    """Finds modules under their old names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, old = fullname.partition(".")
        if package != "mlxkv" or old not in MODULES:
            return None
        return spec_from_loader(fullname, self, is_package=any(name.startswith(f"{old}.") for name in MODULES))

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _OldModule(spec.name.partition(".")[2])

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__.partition(".")[2]
        import_module(f"mlxkv.{MODULES[old]}")
        if old not in NAMES:
            warn(module.__name__, f"mlxkv.{MODULES[old]}")


def install() -> None:
    """Let old module names be imported."""
    sys.meta_path.insert(0, _OldModules())  # first: the folder of a package would give its files a second life


def config_class_of(method: str) -> Any:
    """Return the class of a method's settings, for `MethodPreset.settings`, whichever kind of method it is."""
    warn("MethodPreset.settings", "MethodPreset.config(method's config class)", stacklevel=4)
    live = import_module("mlxkv.live.base").live_methods.find(method)
    return (live or import_module("mlxkv.codec.methods").codec_methods.get(method)).config_class

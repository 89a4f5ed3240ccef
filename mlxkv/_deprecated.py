"""Names of earlier versions: they still work, and each warns once.

Nothing here is imported by code that uses new names.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any

# Modules of before the first release: where each is now.
MODULES = {
    "cache": "spec",
    "clustering": "live.clustering",
    "codec.codec": "codec.session",
    "codec.kvtc": "codec.methods.kvtc",
    "codec.kvtc_rd": "codec.methods.kvtc_rd",
    "codec.kvtc_weighted": "codec.methods.kvtc_weighted",
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
_told: set[str] = set()


def warn(old: str, new: str) -> None:
    """Say once that a name has changed."""
    if old not in _told:
        _told.add(old)
        warnings.warn(f"{old} is called {new} now", DeprecationWarning, stacklevel=4)


def renamed(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a `__getattr__` for a module that knows these names by their old ones.

    A new name is of the same module, or a path below mlxkv with the module before a colon.
    """

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, new = names[name].rpartition(":")
        warn(f"{module}.{name}", f"mlxkv.{home}.{new}" if home else f"{module}.{new}")
        return getattr(importlib.import_module(f"mlxkv.{home}" if home else module), new)

    return __getattr__


class _MovedModules(MetaPathFinder, Loader):
    """Finds modules at their old places: the module itself, at its new one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        old = fullname.removeprefix("mlxkv.")
        return spec_from_loader(fullname, self) if old in MODULES and fullname != old else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = MODULES[spec.name.removeprefix("mlxkv.")]
        warn(spec.name, f"mlxkv.{new}")
        return importlib.import_module(f"mlxkv.{new}")

    def exec_module(self, module: ModuleType) -> None:
        """The module has run already."""


def install() -> None:
    """Let old module names be imported."""
    sys.meta_path.append(_MovedModules())


def config_class_of(method: str) -> Any:
    """Return the class of a method's settings, for `MethodPreset.settings`, whichever kind of method it is."""
    warn("MethodPreset.settings", "MethodPreset.config(method's config class)")
    live = importlib.import_module("mlxkv.live.base").live_methods.find(method)
    return (live or importlib.import_module("mlxkv.codec.methods").codec_methods.get(method)).config_class

"""Methods by name: each is one file of mlxkv/codec/ or mlxkv/methods/ that calls itself so in METHOD."""

from __future__ import annotations

import re
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

PACKAGES = ("mlxkv.codec", "mlxkv.methods")


def method_module(name: object, packages: tuple[str, ...] = PACKAGES) -> ModuleType | None:
    """The file whose METHOD is `name` and that defines its own Settings; None when there is none, whatever `name` is."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        return None
    for package in packages:
        path = f"{package}.{name.replace('-', '_')}"
        module = import_module(path) if find_spec(path) else None
        if (
            getattr(module, "METHOD", None) == name
            and getattr(getattr(module, "Settings", None), "__module__", None) == path
        ):
            return module
    return None

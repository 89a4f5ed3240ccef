"""Presets: what is known of a model family, and named settings of a method. One TOML file each; the file name is the name.

    presets/models/qwen3.toml     description, example, model_types, mode, [rope]
    presets/methods/kvtc-16.toml  description, method, [settings]

An unknown key is an error. Model presets never configure anything: a model's geometry is read from the live model,
and a preset only checks it.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from mlxkv.cache import MODES, CacheSpec, Rope
from mlxkv.codec.artifacts import check_rope
from mlxkv.errors import MismatchError, MlxkvError, PresetError
from mlxkv.resources import resource_dir


@dataclass(frozen=True)
class ModelPreset:
    """Facts about a model family. rope: those of `Rope`'s fields that hold for every model of the family."""

    name: str
    description: str
    example: str
    model_types: tuple[str, ...]
    mode: str
    rope: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "model_types", tuple(self.model_types))
        if self.mode not in MODES:
            raise PresetError(f"model preset {self.name!r}: mode must be one of {', '.join(MODES)}, not {self.mode!r}")
        unknown = set(self.rope) - {f.name for f in dataclasses.fields(Rope)}
        if unknown:
            raise PresetError(f"model preset {self.name!r}: unknown rope keys {', '.join(sorted(unknown))}")

    def check(self, spec: CacheSpec) -> None:
        """Raises MismatchError when a live model is not of this family."""
        if spec.model_type not in self.model_types:
            raise MismatchError(
                f"preset {self.name!r} is for {', '.join(self.model_types)}; the model is {spec.model_type}"
            )
        if spec.mode != self.mode:
            raise MismatchError(f"preset {self.name!r} expects {self.mode}; the model's cache is {spec.mode}")
        check_rope(spec, self.rope)


@dataclass(frozen=True)
class MethodPreset:
    """Named settings of a method; `settings` is the method's own validated dataclass."""

    name: str
    description: str
    method: str
    settings: Any


def model_preset(name: str) -> ModelPreset:
    """One model preset. Raises PresetError listing the known names."""
    return _build(ModelPreset, name, _read("models", name))


def method_preset(name: str) -> MethodPreset:
    """One method preset, its settings checked by the method. Raises PresetError listing the known names."""
    data = _read("methods", name)
    method = str(data.get("method"))
    found = find_spec(f"mlxkv.codec.{method}") is not None
    settings = getattr(import_module(f"mlxkv.codec.{method}"), "Settings", None) if found else None
    if settings is None:
        raise PresetError(f"method preset {name!r}: there is no method {method!r}")
    data["settings"] = _build(settings, f"{name}.settings", data.get("settings", {}), named=False)
    return _build(MethodPreset, name, data)


def names(kind: str) -> list[str]:
    """Names of all presets of a kind: "models" or "methods"."""
    return sorted(path.stem for path in (resource_dir("presets") / kind).glob("*.toml"))


def _read(kind: str, name: str) -> dict[str, Any]:
    if name not in names(kind):
        raise PresetError(f"no preset {name!r} in presets/{kind}; there are {', '.join(names(kind))}")
    try:
        return tomllib.loads((resource_dir("presets") / kind / f"{name}.toml").read_text())
    except tomllib.TOMLDecodeError as error:
        raise PresetError(f"preset {name!r} is not valid TOML: {error}") from None


def _build(kind: type[Any], name: str, data: Mapping[str, Any], named: bool = True) -> Any:
    try:
        return kind(**data, **({"name": name} if named else {}))
    except TypeError as error:
        known = ", ".join(f.name for f in dataclasses.fields(kind) if f.name != "name")
        raise PresetError(f"preset {name!r} has unknown or missing keys ({error}); the keys are {known}") from None
    except MlxkvError as error:
        raise PresetError(f"preset {name!r}: {error}") from None

"""Presets: what is known of a model family, and named settings of a method. One TOML file each; the file name is the name.

    presets/models/qwen3.toml     description, example, model_types, mode, [rope]
    presets/methods/kvtc-16.toml  description, method, [settings]; the method is a codec's or a live one

An unknown key is an error. Model presets never configure anything: a model's geometry is read from the live model,
and a preset only checks it.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mlxkv import _deprecated
from mlxkv.bundled.resources import resource_dir
from mlxkv.config import Config
from mlxkv.errors import InputError, MismatchError, MlxkvError, PresetError
from mlxkv.spec import MODES, CacheSpec, Rope, check_rope

C = TypeVar("C", bound=Config)


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
        _check_text(self, "description", "example")
        if not isinstance(self.model_types, list | tuple) or not all(isinstance(t, str) for t in self.model_types):
            raise PresetError("model_types must be a list of strings")
        object.__setattr__(self, "model_types", tuple(self.model_types))
        if self.mode not in MODES:
            raise PresetError(f"mode must be one of {', '.join(MODES)}, not {self.mode!r}")
        if not isinstance(self.rope, Mapping):
            raise PresetError(f"rope must be a table, not {self.rope!r}")
        unknown = set(self.rope) - {f.name for f in dataclasses.fields(Rope)}
        if unknown:
            raise PresetError(f"unknown rope keys {', '.join(sorted(unknown))}")

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
    """Named settings of a method; `values` are those that differ from its defaults, by the keys that TOML has."""

    name: str
    description: str
    method: str
    values: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_text(self, "description", "method")
        if not isinstance(self.values, Mapping):
            raise PresetError(f"preset {self.name!r}: settings must be a table, not {self.values!r}")

    def config(self, kind: type[C]) -> C:
        """The method's own settings, checked. Raises PresetError for a key or value that it has not."""
        try:
            return kind.from_dict(self.values)
        except InputError as error:
            raise PresetError(f"preset {self.name!r}: {error}") from None

    @property
    def settings(self) -> Config:
        """Old name for `config` of the method's own class; warns."""
        return _deprecated.preset_settings(self)


def model_preset(name: str) -> ModelPreset:
    """One model preset. Raises PresetError listing the known names."""
    data = _read("models", name)
    try:
        return ModelPreset(name=name, **data)
    except TypeError as error:
        known = ", ".join(f.name for f in dataclasses.fields(ModelPreset) if f.name != "name")
        raise PresetError(f"preset {name!r} has unknown or missing keys ({error}); the keys are {known}") from None
    except MlxkvError as error:
        raise PresetError(f"preset {name!r}: {error}") from None


def method_preset(name: str) -> MethodPreset:
    """One method preset, as its file has it. Raises PresetError listing the known names."""
    data = _read("methods", name)
    values = data.pop("settings", {})
    if set(data) != {"description", "method"}:
        found = ", ".join(sorted(data)) or "none"
        raise PresetError(
            f"preset {name!r} has unknown or missing keys ({found}); the keys are description, method, settings"
        )
    return MethodPreset(name, data["description"], data["method"], values)


def preset_names(kind: str) -> list[str]:
    """Names of all presets of a kind: "models" or "methods"."""
    return sorted(path.stem for path in (resource_dir("presets") / kind).glob("*.toml"))


def _read(kind: str, name: str) -> dict[str, Any]:
    if name not in preset_names(kind):
        raise PresetError(f"no preset {name!r} in presets/{kind}; there are {', '.join(preset_names(kind))}")
    try:
        return tomllib.loads((resource_dir("presets") / kind / f"{name}.toml").read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise PresetError(f"preset {name!r} is not UTF-8 text: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise PresetError(f"preset {name!r} is not valid TOML: {error}") from None


def _check_text(preset: ModelPreset | MethodPreset, *keys: str) -> None:
    for key in keys:
        if not isinstance(getattr(preset, key), str):
            raise PresetError(f"{key} must be text, not {getattr(preset, key)!r}")

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
from pathlib import Path
from typing import Any

from mlxkv.cache import MODES, CacheSpec, Rope
from mlxkv.codec.artifacts import check_rope
from mlxkv.errors import MismatchError, MlxkvError, PresetError
from mlxkv.registry import method_module
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
    """Named settings of a method; `settings` is the method's own validated dataclass."""

    name: str
    description: str
    method: str
    settings: Any

    def __post_init__(self) -> None:
        _check_text(self, "description")


def model_preset(name: str) -> ModelPreset:
    """One model preset. Raises PresetError listing the known names."""
    return _build(ModelPreset, name, _read("models", name))


def method_preset(name: str) -> MethodPreset:
    """One method preset, its settings checked by the method. Raises PresetError listing the known names."""
    data = _read("methods", name)
    data["settings"] = _build(
        _settings_of(name, data.get("method")), f"{name}.settings", data.get("settings", {}), named=False
    )
    return _build(MethodPreset, name, data)


def live_settings(name: str, **overrides: Any) -> Any:
    """Settings of the live method that a preset names, or else of the method of that name; overrides replace single ones.

    Raises PresetError listing presets and methods for another name, for a codec's preset and for unknown settings.
    """
    if name in names("methods"):
        settings = method_preset(name).settings
    elif name in live_methods():
        settings = _settings_of(name, name)()
    else:
        known = ", ".join(sorted({*names("methods"), *live_methods()}))
        raise PresetError(f"no preset or live method {name!r}; there are {known}")
    if not type(settings).__module__.startswith("mlxkv.methods."):
        raise PresetError(
            f"{name!r} compresses whole caches and is not a live method: those are {', '.join(live_methods())}"
        )
    return _build(type(settings), name, {**dataclasses.asdict(settings), **overrides}, named=False)


def _settings_of(name: str, method: Any) -> type[Any]:
    """The Settings of the method: of the file in mlxkv/codec/ or mlxkv/methods/ that calls itself by that name."""
    module = method_module(method)
    if module is None:
        raise PresetError(f"method preset {name!r}: there is no method {method!r}")
    return module.Settings  # type: ignore[no-any-return]


def live_methods() -> list[str]:
    """Names of all live methods: the files of mlxkv/methods/ but for those that start with an underscore."""
    files = (Path(__file__).parent / "methods").glob("[!_]*.py")
    return sorted(file.stem.replace("_", "-") for file in files)


def names(kind: str) -> list[str]:
    """Names of all presets of a kind: "models" or "methods"."""
    return sorted(path.stem for path in (resource_dir("presets") / kind).glob("*.toml"))


def _read(kind: str, name: str) -> dict[str, Any]:
    if name not in names(kind):
        raise PresetError(f"no preset {name!r} in presets/{kind}; there are {', '.join(names(kind))}")
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


def _build(kind: type[Any], name: str, data: Mapping[str, Any], named: bool = True) -> Any:
    try:
        return kind(**data, **({"name": name} if named else {}))
    except TypeError as error:
        known = ", ".join(f.name for f in dataclasses.fields(kind) if f.name != "name")
        raise PresetError(f"preset {name!r} has unknown or missing keys ({error}); the keys are {known}") from None
    except MlxkvError as error:
        raise PresetError(f"preset {name!r}: {error}") from None

"""Presets: facts about model families, and named settings of methods. One TOML file each; the file name is the name.

    presets/models/qwen3.toml     description, example, model_types, mode, [rope]
    presets/methods/kvtc-16.toml  description, method, [settings]; the method is a codec method or a live method

An unknown key is an error. Model presets never configure anything: a model's geometry is read from the loaded model,
and a preset only checks it.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mlxkv import _deprecated
from mlxkv.bundled.resources import resource_dir
from mlxkv.config import Config
from mlxkv.errors import InputError, MismatchError, MlxkvError, PresetError, suggest
from mlxkv.spec import MODES, CacheSpec, Rope, check_rope

C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class ModelPreset:
    """Facts about a model family.

    Parameters
    ----------
    name
        The preset's name.
    description
        For people.
    example
        A model of the family, as `mlxkv.lm.load` takes it.
    model_types
        The `model_type` of mlx-lm's modules that implement the family.
    mode
        One of `spec.MODES`.
    rope
        Those of `Rope`'s fields that hold for every model of the family.

    Raises
    ------
    PresetError
        When a fact is of the wrong kind.
    """

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
        """Check that a loaded model belongs to the family.

        Parameters
        ----------
        spec
            Description of the model's cache.

        Raises
        ------
        MismatchError
            When the model is not of this family.
        """
        if spec.model_type not in self.model_types:
            raise MismatchError(
                f"preset {self.name!r} is for {', '.join(self.model_types)}; the model is {spec.model_type}"
            )
        if spec.mode != self.mode:
            raise MismatchError(f"preset {self.name!r} expects {self.mode}; the model's cache is {spec.mode}")
        check_rope(spec, self.rope)


@dataclass(frozen=True)
class MethodPreset:
    """Named settings of a method.

    Parameters
    ----------
    name
        The preset's name.
    description
        For people.
    method
        Name of a codec method or live method, not yet looked up.
    values
        Settings that differ from the method's defaults, by the keys that TOML files have.

    Raises
    ------
    PresetError
        When a part is of the wrong kind.
    """

    name: str
    description: str
    method: str
    values: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_text(self, "description", "method")
        if not isinstance(self.values, Mapping):
            raise PresetError(f"settings must be a table, not {self.values!r}")

    def config(self, kind: type[C]) -> C:
        """Return the settings, checked.

        Parameters
        ----------
        kind
            The method's `config_class`.

        Returns
        -------
        Config
            An object of that class.

        Raises
        ------
        PresetError
            For unknown keys, and for values that are not allowed.
        """
        try:
            return kind.from_dict(self.values)
        except InputError as error:
            raise PresetError(f"preset {self.name!r}: {error}") from None

    @property
    def settings(self) -> Config:
        """The settings as an object of the method's own class: an old name for `config`, which warns."""
        return self.config(_deprecated.config_class_of(self.method))


def model_preset(name: str) -> ModelPreset:
    """Read presets/models/<name>.toml.

    Parameters
    ----------
    name
        One of `preset_names("models")`.

    Returns
    -------
    ModelPreset
        Facts about the family, as in the file.

    Raises
    ------
    PresetError
        For an unknown name, and for a file with unknown keys or values of the wrong kind.

    Examples
    --------
    >>> model_preset("qwen3").model_types
    ('qwen3', 'qwen3_moe')
    """
    data = _read("models", name)
    try:
        return ModelPreset(name=name, **data)
    except TypeError as error:
        known = ", ".join(f.name for f in dataclasses.fields(ModelPreset) if f.name != "name")
        raise PresetError(f"preset {name!r} has unknown or missing keys ({error}); the keys are {known}") from None
    except MlxkvError as error:
        raise PresetError(f"preset {name!r}: {error}") from None


def method_preset(name: str) -> MethodPreset:
    """Read presets/methods/<name>.toml.

    Parameters
    ----------
    name
        One of `preset_names("methods")`.

    Returns
    -------
    MethodPreset
        Settings as in the file; `MethodPreset.config` checks them.

    Raises
    ------
    PresetError
        For an unknown name, and for a file with unknown keys or parts of the wrong kind.

    Examples
    --------
    >>> preset = method_preset("kivi-2")
    >>> preset.method, preset.values
    ('kivi', {'bits': 2})
    """
    data = _read("methods", name)
    values = data.pop("settings", {})
    if set(data) != {"description", "method"}:
        found = ", ".join(sorted(data)) or "none"
        raise PresetError(
            f"preset {name!r} has unknown or missing keys ({found}); the keys are description, method, settings"
        )
    try:
        return MethodPreset(name, data["description"], data["method"], values)
    except PresetError as error:
        raise PresetError(f"preset {name!r}: {error}") from None


def preset_names(kind: str) -> list[str]:
    """Return the names of all presets of a kind.

    Parameters
    ----------
    kind
        "models" or "methods".

    Returns
    -------
    list of str
        Names, sorted.
    """
    files = os.listdir(resource_dir("presets") / kind)  # a glob takes five times as long, and this is asked for often
    return sorted(name.removesuffix(".toml") for name in files if name.endswith(".toml"))


def presets_of(methods: Collection[str]) -> list[str]:
    """Return the method presets that are of certain methods.

    Parameters
    ----------
    methods
        Names of methods.

    Returns
    -------
    list of str
        Names of presets, sorted; those that cannot be read are left out.

    Examples
    --------
    >>> presets_of(["kivi"])
    ['kivi-2', 'kivi-4']
    """
    found = []
    for name in preset_names("methods"):
        with suppress(PresetError):
            found += [name] if method_preset(name).method in methods else []
    return found


def _read(kind: str, name: str) -> dict[str, Any]:
    """Read a preset's file."""
    if name not in preset_names(kind):
        hint = suggest(name, preset_names(kind), "mlxkv presets --all")
        raise PresetError(f"no preset {name[:80]!r} of {'a model family' if kind == 'models' else 'a method'}", hint)
    try:
        return tomllib.loads((resource_dir("presets") / kind / f"{name}.toml").read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise PresetError(f"preset {name!r} is not UTF-8 text: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise PresetError(f"preset {name!r} is not valid TOML: {error}") from None


def _check_text(preset: ModelPreset | MethodPreset, *keys: str) -> None:
    """Refuse a preset whose fields of these names are not text."""
    for key in keys:
        if not isinstance(getattr(preset, key), str):
            raise PresetError(f"{key} must be text, not {getattr(preset, key)!r}")


__getattr__ = _deprecated.renamed(__name__, {"live_settings": "live.seam:live_config", "names": "preset_names"})

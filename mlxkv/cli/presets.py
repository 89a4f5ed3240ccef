"""mlxkv presets: the names that --preset, --cache and --method take."""

from __future__ import annotations

from typing import Any

from mlxkv.cli._commands import commands
from mlxkv.cli._output import Json, print_table


@commands.register("presets")
def presets_command(json: Json = False) -> None:
    """List presets and live methods, and the option that each goes with.

    Example: mlxkv presets
    """
    rows = [*_model_rows(), *_method_rows()]
    if not json:
        for row in rows:
            del row["kind"]
            row["settings"] = ", ".join(f"{key} {value}" for key, value in row["settings"].items() if value is not None)
    print_table(rows, json)


def _model_rows() -> list[dict[str, Any]]:
    from mlxkv.presets import model_preset, preset_names

    rows = []
    for name in preset_names("models"):
        model = model_preset(name)
        use = {"kind": "model", "option": "--preset", "for": ", ".join(model.model_types), "settings": {}}
        rows.append({"preset": name, **use, "description": model.description})
    return rows


def _method_rows() -> list[dict[str, Any]]:
    """Return the presets, then the methods that have none and are taken by their own names."""
    from inspect import getdoc

    from mlxkv.codec.methods import codec_methods
    from mlxkv.live import live_methods
    from mlxkv.presets import method_preset, preset_names

    rows: list[dict[str, Any]] = []
    seen = set()
    for name in preset_names("methods"):
        preset = method_preset(name)
        live = live_methods.find(preset.method)
        config = preset.config((live or codec_methods.get(preset.method)).config_class)
        use: dict[str, Any] = {"kind": "method", "option": "--cache" if live else "--method", "for": preset.method}
        rows.append({"preset": name, **use, "settings": vars(config), "description": preset.description})
        seen.add(preset.method)
    for name, found in live_methods.items():
        if name not in seen:
            use = {"kind": "method", "option": "--cache", "for": name, "settings": vars(found.config_class())}
            rows.append({"preset": name, **use, "description": (getdoc(found) or "").split("\n")[0]})
    return rows

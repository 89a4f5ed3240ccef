from __future__ import annotations

from typing import Any

from mlxkv.cli._commands import commands
from mlxkv.cli._output import Json, print_table


@commands.register("presets")
def presets_command(json: Json = False) -> None:
    """List the model and method presets, with the option that takes them. --cache is for live methods.

    Example: mlxkv presets
    """
    from dataclasses import asdict

    from mlxkv.live import live_methods
    from mlxkv.presets import method_preset, model_preset, preset_names

    rows: list[dict[str, Any]] = []
    for name in preset_names("models"):
        model = model_preset(name)
        use = {"kind": "model", "option": "--preset", "for": ", ".join(model.model_types), "settings": {}}
        rows.append({"preset": name, **use, "description": model.description})
    for name in preset_names("methods"):
        method = method_preset(name)
        option = "--cache" if method.method in live_methods.names() else "--method"
        use = {"kind": "method", "option": option, "for": method.method, "settings": asdict(method.settings)}
        rows.append({"preset": name, **use, "description": method.description})
    if not json:
        for row in rows:
            del row["kind"]
            row["settings"] = ", ".join(f"{key} {value}" for key, value in row["settings"].items() if value is not None)
    print_table(rows, json)

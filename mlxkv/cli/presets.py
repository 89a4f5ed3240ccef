from __future__ import annotations

from mlxkv.cli._output import Json, show_rows


def command(json: Json = False) -> None:
    """List the model and method presets.

    Example: mlxkv presets
    """
    from mlxkv.presets import method_preset, model_preset, names

    rows = []
    for name in names("models"):
        model = model_preset(name)
        rows.append(
            {"preset": name, "kind": "model", "for": ", ".join(model.model_types), "description": model.description}
        )
    for name in names("methods"):
        method = method_preset(name)
        rows.append({"preset": name, "kind": "method", "for": method.method, "description": method.description})
    show_rows(rows, json)

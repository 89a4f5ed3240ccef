"""mlxkv presets: the names that --cache, --method and --preset take, and which to choose."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Annotated, Any

import typer

from mlxkv.cli._commands import commands
from mlxkv.cli._names import family_names, live_names, preset_and_method_names
from mlxkv.cli._output import Json, print_record, print_table
from mlxkv.errors import PresetError, suggest

_LISTING = "mlxkv presets --all"
# What is wanted, what gives it, its share of float16's bytes and its KL divergence: as README has them, on SmolLM2-135M.
LIVE_CHOICES = [
    ("half the memory, next to no difference", "int8", 0.53, 0.000021),
    ("a third, as a budget of bytes that holds", "smartkv-0.3", 0.29, 0.0033),
    ("less than a third, simple and fast", "int4", 0.28, 0.0037),
    ("a bound on memory, however long the text", "h2o-256", 0.25, 0.052),
]
FILE_CHOICES = [("the smallest files at equal quality", "kvtc-rd", 0.045, 0.0042)]


@commands.register("presets")
def presets_command(
    name: Annotated[
        str | None,
        typer.Argument(help="Explain this preset or method.", autocompletion=preset_and_method_names),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="List all names.")] = False,
    json: Json = False,
) -> None:
    """Say which preset to choose, explain one, or list all.

    Example: mlxkv presets

    Example: mlxkv presets int8
    """
    if name is not None:
        _explain(name, json)
    elif json:
        print_table([*_family_rows(), *_method_rows()], as_json=True)
    elif everything:
        rows = [*_method_rows(), *_family_rows()]
        print_table([{key: row[key] for key in ("preset", "option", "description")} for row in rows], as_json=False)
        print("mlxkv presets NAME shows the settings of one.")
    else:
        print(_choices())


def _choices() -> str:
    """Return a screen that says what to choose."""
    lines = [
        "bytes: share of what float16 takes. KL: how far the next token's distribution",
        "moves, in nats (0: not at all). Measured on SmolLM2-135M; measure your model",
        "with: mlxkv eval fidelity --model MODEL --cache NAME",
        "",
        _line("while the model runs", "--cache", "bytes", "KL"),
        *(_line(f"  {need}", name, f"{share:.2f}", _short(kl)) for need, name, share, kl in LIVE_CHOICES),
        "",
        _line("in files", "--method", "bytes", "KL"),
        *(_line(f"  {need}", name, f"{share:.3f}", _short(kl)) for need, name, share, kl in FILE_CHOICES),
        _line("  files as the KVTC paper makes them", "kvtc-16", "", ""),
        "",
        _line("to check that a model is of a family", "--preset", "", ""),
        f"  {', '.join(family_names())}",
        "",
        "mlxkv presets NAME explains one of them.",
        f"mlxkv presets --all lists all {len(preset_and_method_names())}.",
    ]
    return "\n".join(lines)


def _line(need: str, name: str, share: str, kl: str) -> str:
    return f"{need:<46}{name:<14}{share:>7}{kl:>10}".rstrip()


def _short(kl: float) -> str:
    return f"{kl:.6f}" if kl < 0.0001 else f"{kl:g}"


def _explain(name: str, json: bool) -> None:
    """Print one preset or method; for people, the settings that differ from the method's own apart from the rest."""
    found = [row for row in (*_method_rows(), *_family_rows()) if row["preset"] == name]
    if not found:
        raise PresetError(f"no preset or method {name[:80]!r}", suggest(name, preset_and_method_names(), _LISTING))
    for row in found:  # a family and a method could have one name
        if json:
            print_record(row, as_json=True)
            continue
        shown = {
            key: value for key, value in row.items() if value is not None and key not in ("kind", "settings", "changed")
        }
        if row["settings"] is not None:
            rest = {key: value for key, value in row["settings"].items() if key not in row["changed"]}
            parts = {"changed": row["changed"], "as the method has them": rest}
            shown |= {key: part for key, part in parts.items() if part}
        print_record(shown, as_json=False)


def _family_rows() -> list[dict[str, Any]]:
    from mlxkv.presets import model_preset

    rows = []
    for name in family_names():
        family = model_preset(name)
        rows.append(_row(name, "model", "--preset", family.description, model_types=list(family.model_types)))
    return rows


def _method_rows() -> list[dict[str, Any]]:
    """Return the presets, then the methods that have none and are taken by their own names."""
    from inspect import getdoc

    from mlxkv.codec.methods import codec_methods
    from mlxkv.live import live_methods
    from mlxkv.presets import method_preset, preset_names

    rows: list[dict[str, Any]] = []
    live, presets = live_names(), preset_names("methods")
    for name in (*live, *sorted({*presets} - {*live})):
        option = "--cache" if name in live else "--method"
        if name in presets:
            preset = method_preset(name)
            kind = (live_methods.find(preset.method) or codec_methods.get(preset.method)).config_class
            config, method, description = preset.config(kind), preset.method, preset.description
        else:
            found = live_methods.get(name)
            config, method, description = found.config_class(), name, (getdoc(found) or "").split("\n")[0]
        rows.append(_row(name, "method", option, description, method=method, settings=_settings(config)))
        rows[-1]["changed"] = _changed(config)
    return rows


def _row(name: str, kind: str, option: str, description: str, **more: Any) -> dict[str, Any]:
    empty = dict.fromkeys(("method", "model_types", "settings", "changed"))
    return {"preset": name, "kind": kind, "option": option, "description": description, **empty, **more}


def _settings(config: Any) -> dict[str, Any]:
    return {key: value for key, value in vars(config).items() if value is not None}


def _changed(config: Any) -> dict[str, Any]:
    """Return the settings that are not the method's own, those included for which it has none."""
    own = {field.name: None if field.default is MISSING else field.default for field in fields(config)}
    return {key: value for key, value in _settings(config).items() if value != own[key]}

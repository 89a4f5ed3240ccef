from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mlxkv.cli._checks import check_out_folder
from mlxkv.cli._output import Json, show, steps


def command(
    out: Annotated[Path, typer.Option(help="Folder for the artifacts.", show_default=False)],
    npz: Annotated[list[Path] | None, typer.Option(help="Dumps to calibrate on: one flag with several files.")] = None,
    more: Annotated[list[Path] | None, typer.Argument(help="Further dumps.", metavar="[NPZ]...")] = None,
    compression_ratio: Annotated[float | None, typer.Option(help="Sets the bits: 16 / ratio an element.")] = None,
    method: Annotated[
        str | None, typer.Option(help="A method preset, such as kvtc-16 or kvtc-rd, in place of a ratio.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Check the dumps against this model preset.")] = None,
    rank: Annotated[int | None, typer.Option(help="Components to consider; follows from the ratio by default.")] = None,
    max_bit_budget: Annotated[int | None, typer.Option(help="Bits a token and stream, at most.")] = None,
    samples_per_file: Annotated[int | None, typer.Option(help="Tokens to use of each dump, at most.")] = None,
    basis_bytes: Annotated[
        int | None,
        typer.Option(help="Size of the artifacts, at most (kvtc-rd)."),
    ] = None,
    json: Json = False,
) -> None:
    """Learn a basis, and what a method needs with it, from dumps of one model.

    Example: mlxkv calibrate --npz a.npz b.npz --compression-ratio 16 --out artifacts
    """
    from mlxkv.codec.calibrate import calibrate
    from mlxkv.codec.kvtc import Settings
    from mlxkv.errors import InputError
    from mlxkv.files import read_dump
    from mlxkv.presets import method_preset, model_preset

    files = [*(npz or []), *(more or [])]
    if (compression_ratio is None) == (method is None):
        raise InputError("give either --compression-ratio or --method")
    base = method_preset(method).settings if method else Settings(compression_ratio or 0)
    given = {"rank": rank, "max_bit_budget": max_bit_budget, "samples_per_file": samples_per_file}
    settings = _replaced(base, {**given, "basis_bytes": basis_bytes})
    checked = model_preset(preset) if preset else None
    check_out_folder(out)
    if checked and files:
        checked.check(read_dump(files[0]).spec)  # calibrate() holds the other files against the first
    with steps(3 * len(files) + 5) as start:
        artifacts = calibrate(files, settings, start)
    artifacts.save(out)
    facts = {
        "folder": str(out),
        "method": artifacts.method.METHOD,
        "artifact_bytes": artifacts.nbytes,
        "calibration_tokens": artifacts.meta["calibration_tokens"],
        **artifacts.method.explain(artifacts),
        "fingerprint": artifacts.fingerprint,
    }
    show(facts, json)


def _replaced(settings: Any, given: dict[str, Any]) -> Any:
    """The preset's settings with those that were given in their place."""
    from dataclasses import fields, replace

    from mlxkv.errors import InputError

    changes = {name: value for name, value in given.items() if value is not None}
    if unknown := changes.keys() - {field.name for field in fields(settings)}:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(unknown))
        raise InputError(f"this method has no {options}")
    return replace(settings, **changes)

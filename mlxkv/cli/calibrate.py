from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlxkv.cli._output import Json, show, steps


def command(
    out: Annotated[Path, typer.Option(help="Folder for the artifacts.", show_default=False)],
    npz: Annotated[list[Path] | None, typer.Option(help="Dumps to calibrate on: one flag with several files.")] = None,
    more: Annotated[list[Path] | None, typer.Argument(help="Further dumps.", metavar="[NPZ]...")] = None,
    compression_ratio: Annotated[float | None, typer.Option(help="Sets the bits: 16 / ratio an element.")] = None,
    method: Annotated[str | None, typer.Option(help="A method preset, such as kvtc-16, in place of a ratio.")] = None,
    preset: Annotated[str | None, typer.Option(help="Check the dumps against this model preset.")] = None,
    rank: Annotated[int | None, typer.Option(help="Components to consider; follows from the ratio by default.")] = None,
    max_bit_budget: Annotated[int | None, typer.Option(help="Bits a token and stream, at most.")] = None,
    samples_per_file: Annotated[int | None, typer.Option(help="Tokens to use of each dump, at most.")] = None,
    json: Json = False,
) -> None:
    """Learn a basis and a bit plan from dumps of one model.

    Example: mlxkv calibrate --npz a.npz b.npz --compression-ratio 16 --out artifacts
    """
    import dataclasses

    from mlxkv.codec.calibrate import calibrate
    from mlxkv.codec.kvtc import Settings
    from mlxkv.errors import InputError
    from mlxkv.presets import method_preset, model_preset

    files = [*(npz or []), *(more or [])]
    if (compression_ratio is None) == (method is None):
        raise InputError("give either --compression-ratio or --method")
    base = method_preset(method).settings if method else Settings(compression_ratio or 0)
    given = {"rank": rank, "max_bit_budget": max_bit_budget, "samples_per_file": samples_per_file}
    settings = dataclasses.replace(base, **{key: value for key, value in given.items() if value is not None})
    checked = model_preset(preset) if preset else None
    with steps(len(files) + 4) as start:
        artifacts = calibrate(files, settings, start)
    if checked:
        checked.check(artifacts.spec)
    artifacts.save(out)
    facts = {
        "folder": str(out),
        "artifact_bytes": artifacts.nbytes,
        "calibration_tokens": artifacts.meta["calibration_tokens"],
        "k_bits_per_token": artifacts.k.plan.bits,
        "k_components": artifacts.k.plan.rank,
        "v_bits_per_token": artifacts.v.plan.bits,
        "v_components": artifacts.v.plan.rank,
        "fingerprint": artifacts.fingerprint,
    }
    show(facts, json)

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxkv.cli._checks import check_out_folder
from mlxkv.cli._output import Json, show, steps

if TYPE_CHECKING:
    from mlxkv.codec.artifacts import CalibrationArtifacts
    from mlxkv.codec.kvtc import Settings


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
    from mlxkv.files import read_dump
    from mlxkv.presets import method_preset, model_preset

    files = [*(npz or []), *(more or [])]
    if (compression_ratio is None) == (method is None):
        raise InputError("give either --compression-ratio or --method")
    base = method_preset(method).settings if method else Settings(compression_ratio or 0)
    given = {"rank": rank, "max_bit_budget": max_bit_budget, "samples_per_file": samples_per_file}
    settings = dataclasses.replace(base, **{key: value for key, value in given.items() if value is not None})
    checked = model_preset(preset) if preset else None
    check_out_folder(out)
    if checked and files:
        checked.check(read_dump(files[0]).spec)  # calibrate() holds the other files against the first
    with steps(2 * len(files) + 4) as start:
        artifacts = calibrate(files, settings, start)
    artifacts.save(out)
    facts = {
        "folder": str(out),
        "artifact_bytes": artifacts.nbytes,
        "calibration_tokens": artifacts.meta["calibration_tokens"],
        **_bits(artifacts, settings),
        "fingerprint": artifacts.fingerprint,
    }
    show(facts, json)


def _bits(artifacts: CalibrationArtifacts, settings: Settings) -> dict[str, Any]:
    """What each stream spends of its budget, and advice when the rank, not the bits, was the limit."""
    facts: dict[str, Any] = {}
    capped = []
    for name in ("k", "v"):
        part = artifacts.stream(name)
        budget = settings.budget(part.mu.size)
        unspent = budget - part.plan.bits
        facts[f"{name}_bits_per_token"] = part.plan.bits
        facts[f"{name}_bit_budget"] = budget
        facts[f"{name}_unspent_bits"] = unspent
        facts[f"{name}_components"] = part.plan.rank
        # More components than that do not exist, whatever the rank.
        directions = min(part.mu.size, artifacts.meta["calibration_tokens"] - 1)
        if unspent > budget / 10 and part.plan.rank == settings.components(part.mu.size) < directions:
            capped.append(name)
    if capped:
        facts["advice"] = f"raise --rank: it, not the bit budget, limits {' and '.join(capped)}"
    return facts

"""mlxkv calibrate: dumps to artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxkv.cli._checks import check_out_folder
from mlxkv.cli._commands import commands
from mlxkv.cli._files import DUMP, check_kind
from mlxkv.cli._names import Method, Preset
from mlxkv.cli._output import Json, print_record, steps
from mlxkv.cli._work import promise

if TYPE_CHECKING:
    from mlxkv.codec.methods.base import CodecConfig


_COUNTS = (
    "calibration_tokens", "calibration_tokens_needed", "attention_tokens", "attention_tokens_needed", "predicted_heads",
    "saturated_gains",
)  # fmt: skip


@commands.register("calibrate")
def calibrate_command(
    out: Annotated[Path, typer.Option(help="Folder for the artifacts.", show_default=False)],
    npz: Annotated[list[Path] | None, typer.Option(help="Dumps to calibrate on: one flag with several files.")] = None,
    more: Annotated[list[Path] | None, typer.Argument(help="Further dumps.", metavar="[NPZ]...")] = None,
    compression_ratio: Annotated[float | None, typer.Option(help="Sets the bits: 16 / ratio per element.")] = None,
    method: Method = None,
    preset: Preset = None,
    rank: Annotated[int | None, typer.Option(help="Components to consider; follows from the ratio by default.")] = None,
    max_bit_budget: Annotated[
        int | None, typer.Option(help="Bits per token, for keys and for values each, at most.")
    ] = None,
    samples_per_file: Annotated[int | None, typer.Option(help="Tokens to use of each dump, at most.")] = None,
    basis_bytes: Annotated[
        int | None,
        typer.Option(help="Size of the artifacts, at most (kvtc-rd)."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace artifacts in --out; files made with those need them.")
    ] = False,
    json: Json = False,
) -> None:
    """Learn a codec's artifacts (basis, bit plan or tables) from dumps of one model.

    Example: mlxkv calibrate --npz a.npz b.npz --compression-ratio 16 --out artifacts
    """
    from mlxkv.codec.artifacts import check_artifacts_folder
    from mlxkv.codec.calibrate import calibrate, calibration_warning, codec_config
    from mlxkv.codec.methods.kvtc import KVTCConfig
    from mlxkv.dump import read_dump
    from mlxkv.errors import InputError
    from mlxkv.presets import model_preset

    files = [*(npz or []), *(more or [])]
    for file in files:
        check_kind(file, DUMP)
    if (compression_ratio is None) == (method is None):
        raise InputError("give either --compression-ratio or --method")
    base: CodecConfig = codec_config(method) if method else KVTCConfig(compression_ratio or 0)
    given = {"rank": rank, "max_bit_budget": max_bit_budget, "samples_per_file": samples_per_file}
    config = _with_given(base, {**given, "basis_bytes": basis_bytes})
    checked = model_preset(preset) if preset else None
    check_out_folder(out)
    check_artifacts_folder(out, overwrite)
    spec = read_dump(files[0]).spec if files else None  # calibrate() holds the other files against the first
    if checked and spec:
        checked.check(spec)
    kept = (out / "meta.json").exists()
    promise(f"the artifacts in {out} are as they were" if kept else f"no artifacts were written to {out}")
    with steps("calibrating", (3 * len(files) + 5) * len(spec.groups if spec else ())) as start:
        artifacts = calibrate(files, config, start)
    artifacts.save(out, overwrite)
    meta = artifacts.meta
    facts: dict[str, Any] = {"folder": str(out), "method": artifacts.method_name, "artifact_bytes": artifacts.nbytes}
    facts |= _measured(meta)
    for group, found in enumerate(meta.get("groups", []), start=1):
        facts |= {f"{group}.{key}": value for key, value in _measured(found).items()}
    facts |= {**artifacts.explain(), "fingerprint": artifacts.fingerprint}
    warning = calibration_warning(meta)
    print_record(facts | ({"warning": warning} if warning else {}), json)


def _measured(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return what calibration counted and measured of a group of layers, for printing."""
    errors = {
        f"{name}_{kind}": error
        for kind in ("held_out_error", "trained_error")
        for name, error in meta.get(kind, {}).items()
    }
    return {key: meta[key] for key in _COUNTS if key in meta} | errors


def _with_given(config: CodecConfig, given: dict[str, Any]) -> CodecConfig:
    """Return the preset's settings with those that were given in their place."""
    from mlxkv.errors import InputError

    changes = {name: value for name, value in given.items() if value is not None}
    if unknown := changes.keys() - config.stored_keys().keys():
        options = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(unknown))
        raise InputError(f"this method has no {options}")
    return config.replace(**changes)

"""mlxkv calibrate: a model and texts, or dumps, to artifacts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxkv.cli._checks import check_out_folder
from mlxkv.cli._commands import commands
from mlxkv.cli._files import DUMP, check_kind
from mlxkv.cli._names import Method, Preset, model_names
from mlxkv.cli._output import Json, note, print_record, print_table, shares, steps
from mlxkv.cli._work import load_model, promise, working

if TYPE_CHECKING:
    from mlxkv.calibration import Plan
    from mlxkv.codec.artifacts import CalibrationArtifacts
    from mlxkv.codec.methods.base import CodecConfig
    from mlxkv.presets import ModelPreset


_COUNTS = (
    "calibration_tokens", "calibration_tokens_needed", "attention_tokens", "attention_tokens_needed", "predicted_heads",
    "saturated_gains",
)  # fmt: skip


@commands.register("calibrate")
def calibrate_command(
    model: Annotated[
        str | None, typer.Option(help="Calibrate this model, as for dump.", autocompletion=model_names)
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Files or folders of text; if not given, texts that ship along.")
    ] = None,
    budget_minutes: Annotated[
        float | None, typer.Option(help="Time for everything; more makes better files.", show_default="3")
    ] = None,
    npz: Annotated[list[Path] | None, typer.Option(help="Or dumps to calibrate on: one flag, several files.")] = None,
    more: Annotated[list[Path] | None, typer.Argument(help="Further texts or dumps.", metavar="[FILE]...")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the artifacts, in place of mlxkv's own.", show_default=False)
    ] = None,
    method: Method = None,
    compression_ratio: Annotated[float | None, typer.Option(help="kvtc at this ratio: 16 / ratio bits.")] = None,
    preset: Preset = None,
    rank: Annotated[int | None, typer.Option(help="Components to consider (kvtc).")] = None,
    max_bit_budget: Annotated[int | None, typer.Option(help="Most bits per token and stream (kvtc).")] = None,
    samples_per_file: Annotated[int | None, typer.Option(help="Tokens to use of each dump, at most.")] = None,
    basis_bytes: Annotated[int | None, typer.Option(help="Most bytes of the artifacts (kvtc-rd).")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace artifacts in --out; files made with those need them.")
    ] = False,
    json: Json = False,
) -> None:
    """Learn for a model how its caches are coded in few bytes, once; the other commands find it by themselves.

    Example: mlxkv calibrate --model smollm2-135m
    """
    from mlxkv.codec.artifacts import check_artifacts_folder
    from mlxkv.codec.calibrate import codec_config, method_to_calibrate
    from mlxkv.codec.methods.kvtc import KVTCConfig
    from mlxkv.errors import InputError
    from mlxkv.presets import model_preset

    started = time.monotonic()
    if (model is None) == (npz is None) and not (model is None and more):  # dumps alone, without --npz, as ever
        raise InputError("give either --model or --npz")
    if model is None and (text or budget_minutes is not None):
        raise InputError("--text and --budget-minutes go with --model")
    if budget_minutes is not None and not 0 < budget_minutes < float("inf"):
        raise InputError(f"a budget is a number of minutes above 0, not {budget_minutes}")
    if model is not None and method is None and compression_ratio is None:
        method = "kvtc-rd"
    if (compression_ratio is None) == (method is None):
        raise InputError("give either --compression-ratio or --method")
    base: CodecConfig = codec_config(method) if method else KVTCConfig(compression_ratio or 0)
    given = {"rank": rank, "max_bit_budget": max_bit_budget, "samples_per_file": samples_per_file}
    config = _with_given(base, {**given, "basis_bytes": basis_bytes})
    method_to_calibrate(config)
    checked = model_preset(preset) if preset else None
    if out is not None:
        check_out_folder(out)
        check_artifacts_folder(out, overwrite)
    if model is None:
        _from_dumps([*(npz or []), *(more or [])], config, checked, out, overwrite, json)
    else:
        seconds = None if budget_minutes is None else 60 * budget_minutes
        artifacts, folder = _from_model(
            model, [*(text or []), *(more or [])], config, checked, seconds, started, out, overwrite
        )
        _show_model(artifacts, folder, model, json)


def _from_dumps(
    files: list[Path], config: CodecConfig, checked: ModelPreset | None, out: Path | None, overwrite: bool, json: bool
) -> None:
    """Calibrate on dumps, and print what was learnt."""
    from mlxkv.codec.calibrate import calibrate, calibration_warning
    from mlxkv.dump import read_dump

    for file in files:
        check_kind(file, DUMP)
    spec = read_dump(files[0]).spec if files else None  # calibrate() holds the other files against the first
    if checked and spec:
        checked.check(spec)
    kept = out is not None and (out / "meta.json").exists()
    promise(
        f"the artifacts in {out} are as they were" if kept else f"no artifacts were written to {out or 'the library'}"
    )
    with steps("calibrating", (3 * len(files) + 5) * len(spec.groups if spec else ())) as start:
        artifacts = calibrate(files, config, start)
    warning = calibration_warning(artifacts.meta)
    facts = _learnt(artifacts, _saved(artifacts, out, overwrite))
    print_record(facts | ({"warning": warning} if warning else {}), json)


def _from_model(
    model: str, paths: Sequence[Path], config: CodecConfig, checked: ModelPreset | None, seconds: float | None,
    started: float, out: Path | None, overwrite: bool,
) -> tuple[CalibrationArtifacts, Path]:  # fmt: skip
    """Calibrate a model on texts; return its artifacts and the folder that they are in."""
    from mlxkv import calibration
    from mlxkv.models import cache_spec

    texts = calibration.read_texts(paths) if paths else calibration.default_texts()
    promise("nothing was calibrated")
    loaded, tokenizer = load_model(model)
    if checked:
        checked.check(cache_spec(loaded))
    with shares("calibrating") as (progress, say):
        run = calibration.Calibration(
            loaded, model, calibration.cut(tokenizer, texts), config, started=started,
            seconds=calibration.DEFAULT_SECONDS if seconds is None else seconds,
            reports=calibration.Reports(progress, lambda plan: say(_announced(plan, seconds or calibration.DEFAULT_SECONDS))),
        )  # fmt: skip
        promise("the same command goes on from here")
        artifacts = run.run()
    folder = _saved(artifacts, out, overwrite)
    run.finish()
    return artifacts, folder


def _saved(artifacts: CalibrationArtifacts, out: Path | None, overwrite: bool) -> Path:
    """Save artifacts to a folder, or to where all commands find them; return where they are."""
    from mlxkv.codec import library

    with working("saving"):
        if out is None:
            return library.add(artifacts)
        artifacts.save(out, overwrite)
        return out


def _announced(plan: Plan, budget: float) -> str:
    """Say what a calibration takes."""
    time_needed = f"about {plan.seconds / 60:.1f} minutes in all, " if plan.seconds else ""
    first = "" if plan.seconds else "at most "
    return (
        f"note: {first}{plan.tokens:,} tokens, {time_needed}{plan.memory_bytes / 1e9:.1f} GB of memory beside the model's,"
        f" {plan.disk_bytes / 1e9:.1f} GB of disk while it lasts"
        + (
            f"; {budget / 60:g} minutes are too few: fewer tokens would be of little use"
            if plan.seconds > 1.2 * budget
            else ""
        )
    )


def _show_model(artifacts: CalibrationArtifacts, folder: Path, model: str, json: bool) -> None:
    """Print what the artifacts of a model are worth."""
    meta = artifacts.meta
    if json:
        kept = ("measured", "measured_texts", "calibration_kinds", "calibration_seconds", "warning")
        print_record({"model": model, **_learnt(artifacts, folder), **{k: meta[k] for k in kept if k in meta}}, True)
        return
    facts = {
        "model": model,
        "method": artifacts.method_name,
        "learnt_from": f"{meta['calibration_tokens']:,} tokens of {', '.join(meta['calibration_kinds'])}"[:200],
        "took": f"{meta['calibration_seconds'] / 60:.1f} minutes",
        "artifact_bytes": artifacts.nbytes,
        "folder": str(folder),
    }
    print_record(facts, False)
    if meta["measured"]:
        print_table(meta["measured"], False, f"Held out: {meta['measured_texts']} texts, files of 2,048 tokens")
    if "warning" in meta:
        note(meta["warning"])
    if artifacts.method_name == "kvtc-rd":
        note(f"next: mlxkv compress --model {model} --prompt-file notes.txt --out notes.mlxkv")


def _learnt(artifacts: CalibrationArtifacts, folder: Path) -> dict[str, Any]:
    """Return what is in artifacts and what calibration counted, for printing."""
    meta = artifacts.meta
    facts: dict[str, Any] = {"folder": str(folder), "method": artifacts.method_name, "artifact_bytes": artifacts.nbytes}
    facts |= _measured(meta)
    for group, found in enumerate(meta.get("groups", []), start=1):
        facts |= {f"{group}.{key}": value for key, value in _measured(found).items()}
    return facts | {**artifacts.explain(), "fingerprint": artifacts.fingerprint}


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

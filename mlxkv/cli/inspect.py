"""mlxkv inspect: a file or folder of mlxkv, explained and verified."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxkv.cli._commands import commands
from mlxkv.cli._files import COMPRESSED, DUMP, LIVE, PROMPT, kind_of
from mlxkv.cli._output import Json, print_record
from mlxkv.cli._work import working

if TYPE_CHECKING:
    from mlxkv.dump import KVDump
    from mlxkv.io.container import Reader


@commands.register("inspect")
def inspect_command(
    file: Annotated[
        Path,
        typer.Argument(
            help="A dump, a folder of artifacts, a compressed file, a saved live cache or mlx-lm's own file.",
            show_default=False,
        ),
    ],
    json: Json = False,
) -> None:
    """Explain a file or folder that mlxkv wrote, and verify its checksums; mlx-lm's prompt caches, which have none, too.

    Example: mlxkv inspect notes.mlxkv
    """
    describe = {DUMP: _dump, COMPRESSED: _container, LIVE: _container, PROMPT: _prompt_cache}
    kind = "artifacts" if file.is_dir() else kind_of(file)
    with working(f"reading {file}"):
        facts = _artifacts(file) if file.is_dir() else describe[kind](file)
    print_record(facts, json, str(file))


def _dump(file: Path) -> dict[str, Any]:
    from mlxkv.dump import read_dump

    dump = read_dump(file)
    return {
        "kind": "dump",
        "model": dump.model,
        "model_fingerprint": dump.fingerprint,
        "model_type": dump.spec.model_type,
        "mode": dump.spec.mode,
        "layers": list(dump.spec.groups[0].indices),
        "of_layers": len(dump.spec.layers),
        "k_shape": dump.k.shape,
        "v_shape": dump.v.shape,
        **({"groups": _groups(dump)} if len(dump.spec.groups) > 1 or dump.spec.window_layers else {}),
        "dtype": str(dump.k.dtype),
        "live_dtype": dump.dtype,
        "tokens": dump.length,
        "start": dump.start,
        "other_states": len(dump.states),
        "sensitivity": "measured" if dump.sensitivity else None,
        "fp16_bytes": dump.fp16_bytes,
        "file_bytes": file.stat().st_size,
    }


def _groups(dump: KVDump) -> list[dict[str, Any]]:
    """Return what each group of layers of one shape holds, the main one first."""
    return [
        {
            "layers": list(dump.spec.groups[index].indices),
            "window": dump.spec.groups[index].window,
            "k_shape": dump.stream("k", index).shape,
            "v_shape": dump.stream("v", index).shape,
        }
        for index in dump.held_groups
    ]


def _artifacts(folder: Path) -> dict[str, Any]:
    from mlxkv.codec.artifacts import CalibrationArtifacts

    artifacts = CalibrationArtifacts.from_dir(folder)
    keys = ("method", "mlxkv", "model", "model_fingerprint", "mode", "calibration_tokens")
    measured = {key: artifacts.meta[key] for key in ("learnt_from", "measured", "warning") if key in artifacts.meta}
    facts = {key: artifacts.meta.get(key) for key in keys} | measured | artifacts.explain()
    return {"kind": "artifacts", **facts, "artifact_bytes": artifacts.nbytes, "fingerprint": artifacts.fingerprint}


def _live_cache(reader: Reader) -> dict[str, Any]:
    from mlxkv.errors import FormatError
    from mlxkv.spec import is_int

    layers, spec = reader.header.get("layers"), reader.header.get("spec")
    if not isinstance(layers, list) or not all(isinstance(row, list) and len(row) in (2, 3) for row in layers):
        raise FormatError(f"{reader.name} does not say what its layers hold")
    offsets = [row[-2] for row in layers if row[-2] is not None]
    if not all(map(is_int, offsets)):
        raise FormatError(f"{reader.name} has layers that do not say how many tokens they have seen")
    several = reader.header.get("methods")
    one = {key: reader.header.get(key) for key in ("method", "settings")}
    methods = one if several is None else {"methods": several}
    if isinstance(several, list) and len(several) == 1 and isinstance(several[0], list) and len(several[0]) == 2:
        methods = dict(zip(one, several[0]))
    return {
        "kind": "live cache",
        **methods,
        "writer": reader.header.get("writer"),
        "model_fingerprint": reader.header.get("fingerprint"),
        "model_type": spec.get("model_type") if isinstance(spec, dict) else None,
        "live_layers": len(offsets),
        "tokens": max(offsets, default=0),
        "file_bytes": reader.size,
        "checksums": "all match",
    }


def _prompt_cache(file: Path) -> dict[str, Any]:
    from mlxkv.live.prompt_files import describe_prompt_cache

    facts = describe_prompt_cache(file)
    facts["metadata"] = {key: text[:80] for key, text in facts["metadata"].items()}
    return {**facts, "token_ids": facts["token_ids"] is not None, "checksums": None}


def _container(file: Path) -> dict[str, Any]:
    from mlxkv.codec.summary import summary
    from mlxkv.io.container import Reader

    with Reader(file) as reader:
        reader.verify()
        header = reader.header
        if header.get("kind") == "live cache":
            return _live_cache(reader)
        facts = {key: header.get(key) for key in ("method", "quality", "window_quality", "mlxkv", "dtype", "artifacts")}
        origin = header.get("meta")
        return {
            "kind": "compressed cache",
            **facts,
            "artifacts_in": _where(header),
            "model": origin.get("model") if isinstance(origin, dict) else None,
            **summary(reader),
            "sections": len(reader.sections),
            "codings": sorted({section.coding for section in reader.sections.values()}),
            "checksums": "all match",
        }


def _where(header: Mapping[str, Any]) -> str | None:
    """Return where the artifacts of a compressed cache are; None where they are not among those that mlxkv finds."""
    from mlxkv.io.entries import folder_for

    if "uncalibrated" in header:
        return "the file itself"
    folder = folder_for(header)
    return None if folder is None else str(folder)

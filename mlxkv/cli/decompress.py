"""mlxkv decompress: a file back to a dump."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated

import typer

from mlxkv.cli._checks import Limit, check_out_file, read_size
from mlxkv.cli._commands import commands
from mlxkv.cli._files import COMPRESSED, check_kind
from mlxkv.cli._output import Artifacts, Json, print_record, progress_bar
from mlxkv.cli._work import promise, working


@commands.register("decompress")
def decompress_command(
    file: Annotated[Path, typer.Argument(help="A file written by mlxkv compress.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The .npz to write.", show_default=False)],
    artifacts: Artifacts = None,
    tokens: Annotated[
        str | None,
        typer.Option(metavar="A:B", help="Only tokens A to B - 1, counted from 0; only their blocks are read."),
    ] = None,
    limit: Limit = None,
    json: Json = False,
) -> None:
    """Turn a compressed file back into a dump, or a part of it.

    Example: mlxkv decompress notes.mlxkv --out restored.npz
    """
    from mlxkv.codec import library
    from mlxkv.codec.artifacts import CalibrationArtifacts
    from mlxkv.codec.session import CacheCodec
    from mlxkv.codec.summary import summary
    from mlxkv.dump import write_dump
    from mlxkv.io.container import Reader

    check_out_file(out, source=file)
    check_kind(file, COMPRESSED)
    allowed = read_size(limit)
    promise(f"{out} was not written")
    codec = CacheCodec(CalibrationArtifacts.from_dir(artifacts) if artifacts else library.for_file(file))
    with Reader(file) as reader:
        length = summary(reader)["tokens"]
    part = _part(tokens, length) if tokens is not None else None
    start = time.perf_counter()
    with progress_bar("decompressing", part[1] - part[0] if part else length) as advance:
        dump = codec.decompress_dump(file, advance, tokens=part, limit=allowed)
    seconds = time.perf_counter() - start
    with working(f"writing {out}"):
        write_dump(out, dump)
    facts = {"file": str(out), "file_bytes": out.stat().st_size}
    facts |= {"k_shape": dump.k.shape, "v_shape": dump.v.shape}
    facts |= {f"{key}_shape": array.shape for key, array in dump.others.items()}
    print_record({**facts, "tokens": dump.length, "decompress_seconds": seconds}, json)


def _part(text: str, length: int) -> tuple[int, int]:
    """Return "a:b" as two numbers; one that is left out is the file's own end."""
    from mlxkv.errors import InputError

    match = re.fullmatch(r"(\d*):(\d*)", text, re.ASCII)
    if not match:
        raise InputError(f"--tokens is two numbers, such as 0:1000, not {text!r}")
    first, last = match.groups()
    return int(first or 0), int(last or length)

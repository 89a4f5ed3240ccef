from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from mlxkv.cli._checks import check_out_file
from mlxkv.cli._output import Artifacts, Json, bar, show


def command(
    file: Annotated[Path, typer.Argument(help="A container written by mlxkv compress.", show_default=False)],
    artifacts: Artifacts,
    out: Annotated[Path, typer.Option(help="The .npz to write.", show_default=False)],
    json: Json = False,
) -> None:
    """Turn a compressed file back into a dump.

    Example: mlxkv decompress notes.mlxkv --artifacts artifacts --out restored.npz
    """
    from mlxkv.codec.artifacts import CalibrationArtifacts
    from mlxkv.codec.codec import KVTCCacheCodec
    from mlxkv.codec.summary import summary
    from mlxkv.container import Reader
    from mlxkv.files import write_dump

    check_out_file(out, source=file)
    codec = KVTCCacheCodec(CalibrationArtifacts.from_dir(artifacts))
    with Reader(file) as reader:
        tokens = summary(reader)["tokens"]
    start = time.perf_counter()
    with bar("decompressing", tokens) as advance:
        dump = codec.decompress_dump(file, advance)
    seconds = time.perf_counter() - start
    write_dump(out, dump)
    facts = {"file": str(out), "file_bytes": out.stat().st_size, "k": str(dump.k.shape), "v": str(dump.v.shape)}
    show({**facts, "tokens": dump.length, "decompress_seconds": seconds}, json)

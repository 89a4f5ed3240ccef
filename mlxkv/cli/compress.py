from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from mlxkv.cli._checks import check_out_file
from mlxkv.cli._output import Artifacts, Json, bar, show


def command(
    npz: Annotated[Path, typer.Option(help="The dump to compress.", show_default=False)],
    artifacts: Artifacts,
    out: Annotated[Path, typer.Option(help="The container to write.", show_default=False)],
    w: Annotated[int, typer.Option(min=0, help="Newest tokens to keep exactly.")] = 128,
    s: Annotated[int, typer.Option(min=0, help="First tokens (sinks) to keep exactly.")] = 4,
    lossless: Annotated[
        str, typer.Option(help="Last stage: deflate, rans (smaller, slower on a CPU) or raw.")
    ] = "deflate",
    json: Json = False,
) -> None:
    """Compress a dump into one file.

    Example: mlxkv compress --npz notes.npz --artifacts artifacts --out notes.mlxkv
    """
    from mlxkv.codec.artifacts import CalibrationArtifacts
    from mlxkv.codec.codec import KVTCCacheCodec
    from mlxkv.codec.summary import summary
    from mlxkv.container import Reader
    from mlxkv.files import atomic_write, read_dump

    check_out_file(out, source=npz)
    codec = KVTCCacheCodec(CalibrationArtifacts.from_dir(artifacts), w=w, s=s, lossless=lossless)
    dump = read_dump(npz)
    start = time.perf_counter()
    with bar("compressing", dump.length) as advance:
        blob = codec.compress_dump(dump, advance)
    seconds = time.perf_counter() - start
    with atomic_write(out) as file:
        file.write(blob)
    with Reader(blob) as reader:
        facts = summary(reader)
    show({"file": str(out), **facts, "artifact_bytes": codec.artifacts.nbytes, "compress_seconds": seconds}, json)

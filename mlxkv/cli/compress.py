"""mlxkv compress: a dump to one file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxkv.cli._checks import check_out_file
from mlxkv.cli._commands import commands
from mlxkv.cli._files import DUMP, check_kind
from mlxkv.cli._output import Artifacts, Json, print_record, progress_bar
from mlxkv.cli._work import load_model, promise, working

if TYPE_CHECKING:
    from mlxkv.codec.session import CacheCodec
    from mlxkv.dump import KVDump


@commands.register("compress")
def compress_command(
    npz: Annotated[Path, typer.Option(help="The dump to compress.", show_default=False)],
    artifacts: Artifacts,
    out: Annotated[Path, typer.Option(help="The compressed file (.mlxkv) to write.", show_default=False)],
    recent: Annotated[
        int, typer.Option(min=0, help="Newest tokens kept unquantized; kvtc-rd codes them at a higher quality instead.")
    ] = 128,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens kept unquantized.")] = 4,
    raw_window: Annotated[
        bool, typer.Option("--raw-window", help="Keep the newest tokens unquantized with kvtc-rd too.")
    ] = False,
    lossless: Annotated[
        str, typer.Option(help="Lossless stage of kvtc: deflate, rans (smaller, slower on a CPU) or raw (none).")
    ] = "deflate",
    quality: Annotated[
        float | None, typer.Option(help="0 to 100 for kvtc-rd (35): 10 points more halve the quantization step.")
    ] = None,
    target_ratio: Annotated[
        float | None, typer.Option(help="Compression ratio of the whole file against fp16, within 2 %.")
    ] = None,
    target_bytes: Annotated[int | None, typer.Option(help="Bytes of the whole file, within 2 %.")] = None,
    target_kl: Annotated[
        float | None, typer.Option(help="Largest mean KL divergence in nats per token; needs --model.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model of the dump, for --target-kl.")] = None,
    append: Annotated[
        bool,
        typer.Option("--append", help="Extend --out, an earlier file of this conversation, by the dump's new tokens."),
    ] = False,
    json: Json = False,
) -> None:
    """Compress a dump into one file.

    Example: mlxkv compress --npz notes.npz --artifacts artifacts --out notes.mlxkv
    """
    from mlxkv.codec.artifacts import CalibrationArtifacts
    from mlxkv.codec.session import CacheCodec
    from mlxkv.codec.summary import summary
    from mlxkv.dump import read_dump
    from mlxkv.errors import InputError
    from mlxkv.evaluate.targets import check_target
    from mlxkv.io.atomic import atomic_write
    from mlxkv.io.container import Reader

    targets = {"quality": quality, "ratio": target_ratio, "bytes": target_bytes, "kl": target_kl}
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) > 1:
        raise InputError("give one of --quality, --target-ratio, --target-bytes and --target-kl")
    if append and given.keys() - {"quality"}:
        raise InputError("--append takes no target, but the file's own --quality")
    if append and not out.exists():
        raise InputError(f"there is no {out} to append to", "Leave out --append for the first part of a conversation.")
    if (model is None) == ("kl" in given):
        raise InputError(
            "--target-kl needs --model, the model of the dump" if model is None else "--model is for --target-kl"
        )
    check_out_file(out, source=npz)
    found = CalibrationArtifacts.from_dir(artifacts)
    codec = CacheCodec(found, recent=recent, sinks=sinks, lossless=lossless, quality=quality, raw_window=raw_window)
    if given.keys() - {"quality"}:
        check_target(codec, *given.values())
    check_kind(npz, DUMP)
    promise(f"{out} is as it was before" if append else f"{out} was not written")
    with working(f"reading {npz}"):
        dump = read_dump(npz)
    start = time.perf_counter()
    if append:
        left = f"{out} is as it was, or the next command that opens it completes it"
        with working("appending", left, spin=False), progress_bar("appending", dump.length) as advance:
            codec.append_dump(out, dump, advance)
    else:
        codec, blob = _compressed(codec, dump, given, model)
        with atomic_write(out) as file:
            file.write(blob)
    seconds = time.perf_counter() - start
    with Reader(out) as reader:
        facts = {"file": str(out), "quality": codec.quality, **summary(reader)}
    facts |= {"artifact_bytes": codec.artifacts.nbytes, "compress_seconds": seconds}
    note = None if append else _note(given, codec.quality)
    print_record(facts | ({"note": note} if note else {}), json)


def _note(given: dict[str, Any], quality: float | None) -> str | None:
    """Return what to say of a file that is better than asked, or None."""
    from mlxkv.evaluate.targets import BEST_QUALITY, QUALITY_LADDER

    if given.keys() & {"ratio", "bytes"} and quality == BEST_QUALITY:
        return f"even the best quality, {quality:g}, makes a smaller file than asked"
    if "kl" in given and quality == QUALITY_LADDER[0]:
        return f"even quality {quality:g} diverges less than asked; a lower --quality makes a smaller file"
    return None


def _compressed(codec: CacheCodec, dump: KVDump, given: dict[str, Any], model: str | None) -> tuple[CacheCodec, bytes]:
    """Return the codec that meets the request, and the container that it made."""
    from mlxkv import lm
    from mlxkv.errors import InputError
    from mlxkv.evaluate.targets import compress_to_bytes, quality_for_kl
    from mlxkv.identity import same_model

    if model is not None:
        batch = dump.tokens.shape[0]
        if batch != 1:
            raise InputError(f"--target-kl needs a dump of one text, not a batch of {batch}")
        loaded, _ = load_model(model)
        if not same_model(lm.fingerprint(loaded), dump.fingerprint):
            raise InputError(f"--target-kl needs the model that made the dump, {dump.model}")
        with progress_bar("measuring divergence", 1):
            codec = codec.with_quality(quality_for_kl(codec, loaded, dump.tokens[0].tolist(), given["kl"]))
    goal = given.get("bytes", dump.fp16_bytes / given["ratio"] if "ratio" in given else None)
    with progress_bar("compressing", dump.length) as advance:
        if goal is not None:
            return compress_to_bytes(codec, dump, goal, advance)
        return codec, codec.compress_dump(dump, advance)

"""mlxkv compress: a text or a dump to one file."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxkv.cli._checks import check_out_file
from mlxkv.cli._commands import commands
from mlxkv.cli._files import DUMP, check_kind, read_prompt
from mlxkv.cli._names import codec_method_names, model_names
from mlxkv.cli._output import Artifacts, Json, note, print_record, progress_bar
from mlxkv.cli._work import load_model, promise, working

if TYPE_CHECKING:
    from mlxkv.codec.artifacts import CalibrationArtifacts
    from mlxkv.codec.session import CacheCodec
    from mlxkv.dump import KVDump
    from mlxkv.spec import CacheSpec

_JOINED = 8  # tokens at the end of a text that may become others when it goes on


@commands.register("compress")
def compress_command(
    out: Annotated[Path, typer.Option(help="The compressed file (.mlxkv) to write.", show_default=False)],
    model: Annotated[
        str | None, typer.Option(help="Model to run, as dump takes it.", autocompletion=model_names)
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to run and keep.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A text file instead; - is the standard input.")] = None,
    npz: Annotated[Path | None, typer.Option(help="A dump instead.")] = None,
    artifacts: Artifacts = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="exact, direct, or a calibrated one; by default the newest calibration, else direct.",
            autocompletion=codec_method_names,
        ),
    ] = None,
    quality: Annotated[
        float | None, typer.Option(metavar="Q", help="0 to 100 (direct 45, kvtc-rd 35): 10 points more halve the step.")
    ] = None,
    target_ratio: Annotated[
        float | None, typer.Option(metavar="X", help="Times smaller than fp16, the whole file, within 2 %.")
    ] = None,
    target_bytes: Annotated[int | None, typer.Option(metavar="N", help="Bytes of the whole file, within 2 %.")] = None,
    target_kl: Annotated[
        float | None,
        typer.Option(metavar="X", help="Largest mean KL divergence, nats per token; needs --model."),
    ] = None,
    append: Annotated[
        bool, typer.Option("--append", help="Extend --out, a file of the beginning of this text.")
    ] = False,
    recent: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="Newest tokens kept unquantized, or with a quality coded at a higher one."
        ),
    ] = 128,
    sinks: Annotated[int, typer.Option(min=0, metavar="N", help="First tokens kept unquantized.")] = 4,
    raw_window: Annotated[
        bool, typer.Option("--raw-window", help="Keep the newest tokens unquantized in any case.")
    ] = False,
    lossless: Annotated[
        str, typer.Option(metavar="NAME", help="Last stage of kvtc: deflate, rans (smaller, slower) or raw.")
    ] = "deflate",
    json: Json = False,
) -> None:
    """Run a text through a model and compress its cache into one file, or compress a dump.

    Example: mlxkv compress --model smollm2-135m --prompt-file notes.txt --out notes.mlxkv
    """
    from mlxkv.codec.session import CacheCodec
    from mlxkv.codec.summary import summary
    from mlxkv.evaluate.targets import check_target
    from mlxkv.io.atomic import atomic_write
    from mlxkv.io.container import Reader

    targets = {"quality": quality, "ratio": target_ratio, "bytes": target_bytes, "kl": target_kl}
    given = {name: value for name, value in targets.items() if value is not None}
    _check(given, out, model, npz, prompt is not None or prompt_file is not None, append)
    check_out_file(out, source=npz or prompt_file)
    promise(f"{out} is as it was before" if append else f"{out} was not written")
    chosen = _chosen(artifacts, method, out if append else None)
    source = _of_text(str(model), read_prompt(prompt, prompt_file)) if npz is None else _of_dump(npz, model)
    chosen = chosen or _found(source, method)
    chosen.check_model(source.spec, source.fingerprint, source.name)
    codec = CacheCodec(chosen, recent=recent, sinks=sinks, lossless=lossless, quality=quality, raw_window=raw_window)
    if given.keys() - {"quality"}:
        check_target(codec, *given.values())
    rewind = append and npz is None and _rewinds(out, source.tokens)
    dump = source.take()
    start = time.perf_counter()
    if append:
        left = f"{out} is as it was, or the next command that opens it completes it"
        with working("appending", left, spin=False), progress_bar("appending", dump.length) as advance:
            codec.append_dump(out, dump, advance, rewind=rewind)
    else:
        codec, blob = _compressed(codec, dump, given, source.model)
        with atomic_write(out) as file:
            file.write(blob)
    seconds = time.perf_counter() - start
    with Reader(out) as reader:
        facts = {"file": str(out), "method": chosen.method_name, "quality": codec.quality, **summary(reader)}
    facts |= {"artifact_bytes": codec.artifacts.nbytes, "compress_seconds": seconds}
    better = None if append else _note(given, codec.quality)
    print_record(facts | ({"note": better} if better else {}), json)


@dataclass(frozen=True)
class _Source:
    """A cache to compress: what is known of it before the model has run, and how it is made."""

    spec: CacheSpec
    fingerprint: str
    name: str
    tokens: list[int]  # of a dump none: it is there
    take: Callable[[], KVDump]
    model: Any = None  # where it is loaded


def _check(given: dict[str, Any], out: Path, model: str | None, npz: Path | None, has_text: bool, append: bool) -> None:
    """Raise InputError for options that do not go together."""
    from mlxkv.errors import InputError

    if (npz is None) != has_text:
        raise InputError("give one of --prompt, --prompt-file and --npz")
    if len(given) > 1:
        raise InputError("give one of --quality, --target-ratio, --target-bytes and --target-kl")
    if append and given.keys() - {"quality"}:
        raise InputError("--append takes no target, but the file's own --quality")
    if append and not out.exists():
        raise InputError(f"there is no {out} to append to", "Leave out --append for the first part of a conversation.")
    if npz is None and model is None:
        raise InputError("a text needs --model, the model to run it with")
    if npz is not None and (model is None) == ("kl" in given):
        raise InputError(
            "--target-kl needs --model, the model of the dump"
            if model is None
            else "with --npz, --model is for --target-kl"
        )


def _chosen(folder: Path | None, method: str | None, appended: Path | None) -> CalibrationArtifacts | None:
    """Return the artifacts that options or the file to append to name; None where the model decides."""
    from mlxkv.codec import library
    from mlxkv.codec.artifacts import CalibrationArtifacts
    from mlxkv.errors import InputError

    if folder is not None:
        found = CalibrationArtifacts.from_dir(folder)
    elif appended is not None:
        found = library.for_file(appended)
    else:
        return None
    if method not in (None, found.method_name):
        what = f"--artifacts {folder}" if folder else str(appended)
        raise InputError(f"{what} is of method {found.method_name}, not {method}", "leave out --method")
    return found


def _found(source: _Source, method: str | None) -> CalibrationArtifacts:
    """Return the artifacts for a model; where nothing was calibrated, say what that would give."""
    from mlxkv.codec import library

    found = library.for_model(source.spec, source.fingerprint, source.name, method)
    if method is None and not found.method.needs_calibration:
        note(
            f"nothing was calibrated for {source.name or 'this model'} yet, so the file is coded without;"
            f" a calibration makes smaller ones at the same loss: {library.calibrate_command(source.name)}"
        )
    return found


def _of_dump(npz: Path, model: str | None) -> _Source:
    from mlxkv import lm
    from mlxkv.dump import read_dump
    from mlxkv.errors import InputError
    from mlxkv.identity import same_model

    check_kind(npz, DUMP)
    with working(f"reading {npz}"):
        dump = read_dump(npz)
    if model is None:
        return _Source(dump.spec, dump.fingerprint, dump.model, [], lambda: dump)
    batch = dump.tokens.shape[0]
    if batch != 1:
        raise InputError(f"--target-kl needs a dump of one text, not a batch of {batch}")
    loaded, _ = load_model(model)
    if not same_model(lm.fingerprint(loaded), dump.fingerprint):
        raise InputError(f"--target-kl needs the model that made the dump, {dump.model}")
    return _Source(dump.spec, dump.fingerprint, dump.model, [], lambda: dump, loaded)


def _of_text(name: str, text: str) -> _Source:
    from mlxkv import lm
    from mlxkv.errors import InputError
    from mlxkv.models import cache_spec

    loaded, tokenizer = load_model(name)
    tokens = tokenizer.encode(text)
    if not tokens:
        raise InputError("the prompt has no tokens")
    with working(f"reading the weights of {name}"):
        spec, fingerprint = cache_spec(loaded), lm.fingerprint(loaded)

    def take() -> KVDump:
        with progress_bar("running the prompt", len(tokens)) as advance:
            return lm.dump(loaded, tokens, name=name, fingerprint=fingerprint, progress=advance)

    return _Source(spec, fingerprint, name, tokens, take, loaded)


def _rewinds(path: Path, tokens: list[int]) -> bool:
    """Return whether a text that goes on with a file has other tokens where the file ends: words may join there.

    Raises MismatchError for another text, before the model runs.
    """
    import numpy as np

    from mlxkv.codec.continuing import common_prefix
    from mlxkv.codec.unquantized import read_plain_array
    from mlxkv.errors import MismatchError
    from mlxkv.io.container import Reader

    with Reader(path) as reader:
        stored = read_plain_array(reader, "tokens")
    given = np.array([tokens], np.int32)
    both = min(stored.shape[-1], given.shape[1])
    common = common_prefix(stored[:1, :both], given[:, :both])
    if len(stored) != 1 or common < stored.shape[1] - _JOINED:
        raise MismatchError(
            f"{path} has {stored.shape[1]} tokens, of which this text begins with {common}: it is of another text",
            "--append takes all of the longer text; without it the file is written anew",
        )
    return common < stored.shape[1]


def _note(given: dict[str, Any], quality: float | None) -> str | None:
    """Return what to say of a file that is better than asked, or None."""
    from mlxkv.evaluate.targets import BEST_QUALITY, QUALITY_LADDER

    if given.keys() & {"ratio", "bytes"} and quality == BEST_QUALITY:
        return f"even the best quality, {quality:g}, makes a smaller file than asked"
    if "kl" in given and quality == QUALITY_LADDER[0]:
        return f"even quality {quality:g} diverges less than asked; a lower --quality makes a smaller file"
    return None


def _compressed(codec: CacheCodec, dump: KVDump, given: dict[str, Any], model: Any) -> tuple[CacheCodec, bytes]:
    """Return the codec that meets the request, and the container that it made."""
    from mlxkv.evaluate.targets import compress_to_bytes, quality_for_kl

    if "kl" in given:
        with progress_bar("measuring divergence", 1):
            codec = codec.with_quality(quality_for_kl(codec, model, dump.tokens[0].tolist(), given["kl"]))
    goal = given.get("bytes", dump.fp16_bytes / given["ratio"] if "ratio" in given else None)
    with progress_bar("compressing", dump.length) as advance:
        if goal is not None:
            return compress_to_bytes(codec, dump, goal, advance)
        return codec, codec.compress_dump(dump, advance)

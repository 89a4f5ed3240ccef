"""mlxkv convert: a cache in one kind of file made into another kind."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mlxkv.cli._checks import Limit, check_out_file, read_size
from mlxkv.cli._commands import commands
from mlxkv.cli._files import COMPRESSED, DUMP, LIVE, PROMPT, kind_by_ending, kind_of, read_prompt
from mlxkv.cli._names import codec_method_names, live_names, model_names
from mlxkv.cli._output import Artifacts, Json, note, print_record, progress_bar
from mlxkv.cli._work import load_model, promise, working

if TYPE_CHECKING:
    from mlxkv.conversion import Content

_KINDS = {DUMP: "npz", COMPRESSED: "mlxkv", LIVE: "live", PROMPT: "prompt"}
_NAMES = {
    "npz": "dump",
    "mlxkv": "compressed cache",
    "live": "live cache",
    "prompt": "prompt cache of mlx-lm",  # of the newest layout
    "prompt-0.31": "prompt cache of mlx-lm 0.31",
}


@commands.register("convert")
def convert_command(
    a: Annotated[Path, typer.Argument(metavar="A", help="The file to convert.", show_default=False)],
    b: Annotated[
        Path,
        typer.Argument(
            metavar="B", help="The file to write: .npz, .mlxkv, .cache or .safetensors.", show_default=False
        ),
    ],
    model: Annotated[
        str | None, typer.Option(help="Its model: .cache and .safetensors need it.", autocompletion=model_names)
    ] = None,
    to: Annotated[
        Literal["npz", "mlxkv", "live", "prompt", "prompt-0.31"] | None,
        typer.Option(metavar="KIND", help="npz, mlxkv, live, prompt or, for mlx-lm 0.31, prompt-0.31."),
    ] = None,
    cache: Annotated[
        str | None, typer.Option(help="Live preset or method of a .cache (full).", autocompletion=live_names)
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Of a .mlxkv: exact, direct, or a calibrated one (the newest, else direct).",
            autocompletion=codec_method_names,
        ),
    ] = None,
    artifacts: Artifacts = None,
    prompt: Annotated[str | None, typer.Option(help="The text in A, where A lacks its tokens.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file with the text; - is the standard input.")] = None,
    tokens: Annotated[Path | None, typer.Option(help="A JSON list of token ids instead.")] = None,
    limit: Limit = None,
    json: Json = False,
) -> None:
    """Make a dump, a compressed cache, a live cache or a prompt cache of mlx-lm (0.31 or 0.32) of any of them.

    Example: mlxkv convert chat.safetensors chat.mlxkv --model smollm2-135m --prompt-file chat.txt
    """
    source, target = _KINDS[kind_of(a)], to or kind_by_ending(b, "say it with --to")
    _check(a, b, source, target, {"--model": model, "--cache": cache, "--method": method, "--artifacts": artifacts})
    facts = _describe(a, source)
    text = _text(a, facts, source, target, prompt, prompt_file, tokens)
    check_out_file(b, source=a)
    allowed = read_size(limit)
    promise(f"{b} was not written")
    loaded, tokenizer = load_model(model) if model is not None else (None, None)
    started = time.perf_counter()
    content = _read(a, source, loaded, artifacts, allowed, facts)
    length = content.length
    if text is not None:
        content.tokens = _tokens(content, loaded, tokenizer, text, tokens)
    for change in _changes(content, loaded, target):
        note(change)
    folder = None if source == "mlxkv" else artifacts
    values = _write(b, target, content, {"model": loaded, "name": model or ""}, cache or "full", method, folder)
    before, after = a.stat().st_size, b.stat().st_size
    done = {
        "from": f"{_NAMES[source]} {facts.get('layout', '')}".strip(),
        "from_bytes": before,
        "to": _NAMES[target],
        "to_bytes": after,
        "file": str(b),
        "tokens": length,
        "values": values,
        "ratio": before / after,
        "seconds": time.perf_counter() - started,
    }
    print_record(done, json)


def _check(a: Path, b: Path, source: str, target: str, given: dict[str, Any]) -> None:
    """Raise InputError for options that are missing or have no place, PresetError for an unknown live cache."""
    from mlxkv.conversion import WITHOUT_MODEL
    from mlxkv.errors import InputError
    from mlxkv.live import live_config

    if source == target == "npz":
        raise InputError(f"{a} is a dump already", "copy it")
    if given["--model"] is None and not {source, target} <= {*WITHOUT_MODEL}:
        of = a if source not in WITHOUT_MODEL else b
        raise InputError(f"{of} is a {_NAMES[source if of is a else target]}: give its model with --model")
    places = {
        "--cache": ("live", target == "live"),
        "--method": ("mlxkv", target == "mlxkv"),
        "--artifacts": ("mlxkv", "mlxkv" in (source, target)),
    }
    for option, (kind, fits) in places.items():
        if given[option] is not None and not fits:
            raise InputError(f"{option} is for a {_NAMES[kind]}, and {b} becomes a {_NAMES[target]}")
    if given["--cache"] is not None:
        live_config(given["--cache"])
    if given["--method"] is not None and given["--artifacts"] is not None and source != "mlxkv":
        raise InputError("--artifacts are of one method: leave --method out")


def _describe(a: Path, source: str) -> dict[str, Any]:
    """Return what a live cache or a prompt cache tells without its model."""
    if source == "live":
        from mlxkv.conversion import noted_tokens

        return {} if (tokens := noted_tokens(a)) is None else {"token_ids": tokens}
    if source != "prompt":
        return {}
    from mlxkv.live.prompt_files import describe_prompt_cache

    return describe_prompt_cache(a)


def _text(
    a: Path, facts: dict[str, Any], source: str, target: str, prompt: str | None, file: Path | None, ids: Path | None
) -> str | None:
    """Return the text in the cache, or of the file of its token ids; None where there is no need of it."""
    from mlxkv.errors import InputError
    from mlxkv.io.inputs import read_text

    given = [each for each in (prompt, file, ids) if each is not None]
    if len(given) > 1:
        raise InputError("give one of --prompt, --prompt-file and --tokens")
    known = source in ("npz", "mlxkv") or facts.get("token_ids") is not None
    if given and known:
        raise InputError(f"{a} names its tokens: leave --prompt, --prompt-file and --tokens out")
    if not given and not known and target in ("npz", "mlxkv"):
        many = f"its {facts['tokens']} tokens are" if facts else "its tokens are"
        raise InputError(
            f"{a} does not say which {many}, and a {_NAMES[target]} names them",
            "give the text with --prompt-file, or the token ids with --tokens",
        )
    if not given:
        return None
    return read_text(ids) if ids is not None else read_prompt(prompt, file)


def _read(
    a: Path, source: str, model: Any, artifacts: Path | None, limit: int | None, facts: dict[str, Any]
) -> Content:
    from mlxkv.codec.summary import summary
    from mlxkv.conversion import read_content
    from mlxkv.io.container import Reader

    if source != "mlxkv":
        if source == "prompt" and facts["model_fingerprint"] is None:
            note(f"{a} does not say which weights made it; its layers and shapes are compared with the model's")
        with working(f"reading {a}"):
            return read_content(a, source, model)
    with Reader(a) as reader:
        length = summary(reader)["tokens"]
    with progress_bar("decompressing", length) as advance:
        return read_content(a, source, artifacts=artifacts, limit=limit, progress=advance)


def _tokens(content: Content, model: Any, tokenizer: Any, text: str, ids: Path | None) -> list[int]:
    """Return the tokens of the cache, held against it."""
    from json import loads

    from mlxkv.conversion import begins_with, check_ids, find_tokens
    from mlxkv.errors import MismatchError

    with working("comparing the text with the cache"):
        if ids is None:
            found, way = find_tokens(content, model, tokenizer, text)
            if way != "as it is":
                note(f"the text is in the cache {way}")
            return found
        try:
            parsed = loads(text)
        except (ValueError, RecursionError):
            parsed = None
        found = check_ids(parsed, tokenizer, content.length, str(ids))
        if not begins_with(content, model, found):
            raise MismatchError(f"the cache was made of other tokens than {ids} has, or by another model")
        return found


def _write(
    b: Path, target: str, content: Content, of: dict[str, Any], cache: str, method: str | None, artifacts: Path | None
) -> str:
    """Write the file, and return what became of the values."""
    from mlxkv.conversion import codec_for, write_content

    if target != "mlxkv":
        with working(f"writing {b}"):
            write_content(b, target, content, method=cache, **of)
        return "unchanged" if target != "live" or cache == "full" else f"packed by {cache}"
    codec = codec_for(content, method, artifacts=artifacts, **of)
    with progress_bar("compressing", content.length) as advance:
        write_content(b, target, content, codec=codec, progress=advance, **of)
    name = codec.artifacts.method_name
    quality = "" if codec.quality is None else f" at quality {codec.quality:g}"
    return "unchanged" if name == "exact" else f"coded by {name}{quality}"


def _changes(content: Content, model: Any, target: str) -> list[str]:
    """Return what a prompt cache of mlx-lm does with tokens to come that other files do not."""
    from mlxkv import stock
    from mlxkv.models import cache_spec

    if content.cache is None or target.startswith("prompt"):
        return []
    layers = zip(stock.entries(content.cache), cache_spec(model).layers)
    kinds = {type(entry).__name__ for entry, layer in layers if layer is not None and layer.window is None}
    changes = {
        "QuantizedKVCache": "the quantized tokens come along as they are, and those to come are not quantized",
        "RotatingKVCache": "no token was given up so far, and there is no --max-kv-size for those to come",
    }
    return [change for kind, change in changes.items() if kind in kinds]

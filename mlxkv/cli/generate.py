"""mlxkv generate: text from a cache in a file, or in a live cache."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mlxkv.cli._checks import Limit, read_size
from mlxkv.cli._commands import commands
from mlxkv.cli._names import Cache, Model
from mlxkv.cli._output import Json, format_value, note, print_record
from mlxkv.cli._work import load_model, working

Reading = Callable[[Any], list[Any]]  # from a model to its prompt cache


@commands.register("generate")
def generate_command(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to go on from, after what a FILE has read.", show_default=False)],
    file: Annotated[
        Path | None,
        typer.Argument(help="A cache to go on from: compressed, a dump, a saved live cache, or mlx-lm's own file."),
    ] = None,
    artifacts: Annotated[Path | None, typer.Option(help="Artifacts of a compressed FILE.")] = None,
    cache: Cache = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate, at most.")] = 128,
    limit: Limit = None,
    json: Json = False,
) -> None:
    """Generate text from a cache in a file, or in a live cache that stays small.

    Example: mlxkv generate notes.mlxkv --artifacts artifacts --model smollm2-135m --prompt "In short:"

    Example: mlxkv generate --model smollm2-135m --cache int8 --prompt "Once upon a time"
    """
    from mlxkv.errors import InputError
    from mlxkv.stock import entries

    _check(file, artifacts, cache)
    reading = None if file is None else _read(file, artifacts, read_size(limit), model)
    loaded, tokenizer = load_model(model)
    # A restored cache already holds the start of the text, so no start token then.
    tokens = tokenizer.encode(prompt, add_special_tokens=reading is None)
    if not tokens:
        raise InputError("the prompt has no tokens")
    with working("making the cache"):
        caches = _live(loaded, str(cache)) if reading is None else reading(loaded)
    cached = max(getattr(entry, "offset", 0) for entry in entries(caches))
    written, last = _generate(loaded, tokenizer, tokens, max_tokens, caches, show=not json)
    facts = {
        "prompt_tokens": last.prompt_tokens,
        "prompt_tokens_per_second": last.prompt_tps,
        "generated_tokens": last.generation_tokens,
        "tokens_per_second": last.generation_tps,
        **(_held(loaded, caches) if reading is None else {"cached_tokens": cached}),
    }
    if json:
        print_record({"text": written, **facts}, as_json=True)
    else:
        line = ", ".join(f"{key.replace('_', ' ')} {format_value(key, value)}" for key, value in facts.items())
        console = Console(highlight=False, markup=False)
        print("\n")
        console.print(line, soft_wrap=not console.is_terminal)


def _generate(model: Any, tokenizer: Any, tokens: list[int], most: int, caches: list[Any], show: bool) -> Any:
    """Generate, and print the text as it comes; return it, and mlx-lm's last response."""
    from mlx_lm import stream_generate

    responses = stream_generate(model, tokenizer, tokens, most, prompt_cache=caches)
    with working("reading the prompt"):
        first = next(responses)
    written = ""
    with working("generating", spin=False):
        for last in chain([first], responses):
            written += last.text
            if show:
                print(last.text, end="", flush=True)
    return written, last


def _live(model: Any, method: str) -> list[Any]:
    from mlxkv.live.seam import make_cache

    return list(make_cache(model, method))


def _held(model: Any, caches: list[Any]) -> dict[str, Any]:
    from mlxkv.evaluate.variants import cache_sizes

    held = cache_sizes(model, caches)
    return {key: held[key] for key in ("cache_bytes", "fp16_bytes", "ratio")}


def _check(file: Path | None, artifacts: Path | None, cache: str | None) -> None:
    """Raise InputError for options that do not go together, PresetError for a cache that is not there."""
    from mlxkv.errors import InputError
    from mlxkv.live import live_config

    if (file is None) == (cache is None):
        raise InputError("give either the FILE of a cache to go on from, or --cache with a live preset to start in")
    if cache is not None:
        if artifacts is not None:
            raise InputError("--artifacts belongs to a compressed FILE: a live --cache takes none")
        live_config(cache)


def _read(file: Path, artifacts: Path | None, limit: int | None, model: str) -> Reading:
    """Return how a file becomes a prompt cache; what can be wrong without the model is found now."""
    from mlxkv.cli._files import COMPRESSED, DUMP, LIVE, kind_of
    from mlxkv.errors import InputError

    kind = kind_of(file)
    if kind == COMPRESSED:
        if artifacts is None:
            raise InputError(f"{file} is compressed: name its artifacts folder with --artifacts")
        return _read_compressed(file, artifacts, limit)
    if kind == DUMP:
        return _read_dump(file, artifacts)
    if artifacts is not None:
        raise InputError(f"{file} is {kind}, which takes no --artifacts", "leave them out")
    return _read_live(file) if kind == LIVE else _read_prompt(file, model)


def _read_compressed(file: Path, artifacts: Path, limit: int | None) -> Reading:
    from mlxkv import lm
    from mlxkv.codec.artifacts import CalibrationArtifacts
    from mlxkv.codec.session import CacheCodec

    codec = CacheCodec(CalibrationArtifacts.from_dir(artifacts))
    with working(f"decompressing {file}"):
        dump = codec.decompress_dump(file, limit=limit)
    return lambda model: lm.restore(model, dump)


def _read_dump(file: Path, artifacts: Path | None) -> Reading:
    """Return a dump's; artifacts are of no use to it, and those of another model are a mistake."""
    from mlxkv import lm
    from mlxkv.codec.artifacts import CalibrationArtifacts
    from mlxkv.dump import read_dump
    from mlxkv.errors import MismatchError
    from mlxkv.identity import same_model

    with working(f"reading {file}"):
        dump = read_dump(file)
    if artifacts is not None:
        of = CalibrationArtifacts.from_dir(artifacts).meta.get("model_fingerprint", "")
        if not same_model(str(of), dump.fingerprint):
            raise MismatchError(
                f"{artifacts} are artifacts of another model than {file} is from",
                "a dump is not compressed and needs none: leave --artifacts out",
            )
        note(f"{file} is a dump, not compressed: --artifacts is not needed")
    return lambda model: lm.restore(model, dump)


def _read_live(file: Path) -> Reading:
    from mlxkv.live.serialization import load_cache

    return lambda model: list(load_cache(file, model))


def _read_prompt(file: Path, model: str) -> Reading:
    from mlxkv.live.prompt_files import describe_prompt_cache, read_prompt_cache

    facts = describe_prompt_cache(file)
    maker = facts["metadata"].get("model")
    says = f"says it is of {maker!r}" if maker and maker != model else "does not say of which weights it is"
    note(f"{file}, a prompt cache of mlx-lm, {says}; only its layers and shapes are compared with {model}")
    return lambda loaded: read_prompt_cache(file, loaded)

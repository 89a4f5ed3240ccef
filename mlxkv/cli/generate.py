"""mlxkv generate: text from a cache in a file, or in a live cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlxkv.cli._checks import Limit, read_size
from mlxkv.cli._commands import commands
from mlxkv.cli._output import Json, Model, format_value, print_record

if TYPE_CHECKING:
    from mlxkv.dump import KVDump


@commands.register("generate")
def generate_command(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to go on from, after what a FILE has read.", show_default=False)],
    file: Annotated[Path | None, typer.Argument(help="A cache to go on from: compressed, or a dump.")] = None,
    artifacts: Annotated[Path | None, typer.Option(help="Artifacts of a compressed FILE.")] = None,
    cache: Annotated[str | None, typer.Option(help="Or start in this live cache: a preset or method.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate, at most.")] = 128,
    limit: Limit = None,
    json: Json = False,
) -> None:
    """Generate text from a compressed file or a dump, or in a live cache that stays small.

    Example: mlxkv generate notes.mlxkv --artifacts artifacts --model smollm2-135m --prompt "In short:"

    Example: mlxkv generate --model smollm2-135m --cache int8 --prompt "Once upon a time"
    """
    from mlx_lm import stream_generate

    from mlxkv import lm
    from mlxkv.errors import InputError
    from mlxkv.evaluate.variants import cache_sizes
    from mlxkv.live.seam import make_cache

    _check(file, artifacts, cache)
    dump = None if file is None else _read(file, artifacts, read_size(limit))
    loaded, tokenizer = lm.load(model)
    # A restored cache already holds the start of the text, so no start token then.
    tokens = tokenizer.encode(prompt, add_special_tokens=dump is None)
    if not tokens:
        raise InputError("the prompt has no tokens")
    caches = make_cache(loaded, str(cache)) if dump is None else lm.restore(loaded, dump)
    written = ""
    for response in stream_generate(loaded, tokenizer, tokens, max_tokens, prompt_cache=caches):
        written += response.text
        if not json:
            print(response.text, end="", flush=True)
    facts = {
        "prompt_tokens": response.prompt_tokens,
        "prompt_tokens_per_second": response.prompt_tps,
        "generated_tokens": response.generation_tokens,
        "tokens_per_second": response.generation_tps,
    }
    if dump is not None:
        facts["cached_tokens"] = dump.length
    else:
        held = cache_sizes(loaded, caches)
        facts |= {key: held[key] for key in ("cache_bytes", "fp16_bytes", "ratio")}
    if json:
        print_record({"text": written, **facts}, as_json=True)
    else:
        print("\n\n" + ", ".join(f"{key.replace('_', ' ')} {format_value(key, value)}" for key, value in facts.items()))


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


def _read(file: Path, artifacts: Path | None, limit: int | None) -> KVDump:
    from mlxkv.codec.artifacts import CalibrationArtifacts
    from mlxkv.codec.session import CacheCodec
    from mlxkv.dump import read_dump
    from mlxkv.errors import InputError
    from mlxkv.io.container import MAGIC
    from mlxkv.io.inputs import open_input

    with open_input(file) as opened:
        compressed = opened.read(len(MAGIC)) == MAGIC
    if not compressed:
        return read_dump(file)
    if artifacts is None:
        raise InputError(f"{file} is compressed: name its artifacts folder with --artifacts")
    return CacheCodec(CalibrationArtifacts.from_dir(artifacts)).decompress_dump(file, limit=limit)

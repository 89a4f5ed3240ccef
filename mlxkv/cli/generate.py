from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlxkv.cli._output import Json, Model, show

if TYPE_CHECKING:
    from mlxkv.cache import KVDump


def command(
    file: Annotated[Path, typer.Argument(help="The cache to go on from: compressed, or a dump.", show_default=False)],
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text that follows what the cache has read.", show_default=False)],
    artifacts: Annotated[Path | None, typer.Option(help="Artifacts of a compressed cache.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate, at most.")] = 128,
    json: Json = False,
) -> None:
    """Restore a cache into mlx-lm and go on generating from it.

    Example: mlxkv generate notes.mlxkv --artifacts artifacts --model smollm2-135m --prompt "In short:"
    """
    from mlx_lm import stream_generate

    from mlxkv import lm
    from mlxkv.errors import InputError

    dump = _read(file, artifacts)
    loaded, tokenizer = lm.load(model)
    # The cache already holds the start of the text, so no start token here.
    tokens = tokenizer.encode(prompt, add_special_tokens=False)
    if not tokens:
        raise InputError("the prompt has no tokens")
    text = ""
    for response in stream_generate(loaded, tokenizer, tokens, max_tokens, prompt_cache=lm.restore(loaded, dump)):
        text += response.text
        if not json:
            print(response.text, end="", flush=True)
    if not json:
        print("\n")
    facts = {
        "cached_tokens": dump.length,
        "prompt_tokens": response.prompt_tokens,
        "generated_tokens": response.generation_tokens,
        "tokens_per_second": response.generation_tps,
    }
    show({"text": text, **facts} if json else facts, json)


def _read(file: Path, artifacts: Path | None) -> KVDump:
    from mlxkv.codec.artifacts import CalibrationArtifacts
    from mlxkv.codec.kvtc import KVTCCacheCodec
    from mlxkv.container import MAGIC
    from mlxkv.errors import InputError
    from mlxkv.files import open_input, read_dump

    with open_input(file) as opened:
        compressed = opened.read(len(MAGIC)) == MAGIC
    if not compressed:
        return read_dump(file)
    if artifacts is None:
        raise InputError(f"{file} is compressed: name its artifacts folder with --artifacts")
    return KVTCCacheCodec(CalibrationArtifacts.from_dir(artifacts)).decompress_dump(file)

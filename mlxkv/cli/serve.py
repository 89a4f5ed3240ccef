"""mlxkv serve: mlx-lm's server, with prompts that survive a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlxkv.cli._checks import read_size
from mlxkv.cli._commands import commands, passes_flags_on
from mlxkv.cli._names import live_names, model_names
from mlxkv.cli._work import promise


@commands.register("serve")
@passes_flags_on
def serve_command(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Local mlx-lm directory, hub id, smollm2-135m or gemma3-270m; without it each request names one.",
            autocompletion=model_names,
        ),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(metavar="PRESET", help="Run in live caches.", autocompletion=live_names),
    ] = None,
    store: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of stored prompts.")] = None,
    no_store: Annotated[bool, typer.Option("--no-store", help="Keep prompts in memory alone.")] = False,
    store_max: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Most bytes on disk, such as 50GB (20GB).")
    ] = None,
    quality: Annotated[
        float | None, typer.Option(metavar="Q", help="Quality of stored prompts, 0 to 100 (39.5).")
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Store prompts bit for bit.")] = False,
    no_calibrate: Annotated[
        bool, typer.Option("--no-calibrate", help="Learn nothing from prompts when nobody asks.")
    ] = False,
) -> None:
    """Serve a model over OpenAI's protocol: mlx-lm's server, whose prompts survive a restart.

    All flags of mlx_lm.server work, such as --host, --port 8080, --adapter-path, --draft-model, --temp, --max-tokens,
    --chat-template-args, --prompt-cache-bytes 8GB and --log-level; mlx_lm.server --help explains them.

    Prompts that begin like an earlier one are not computed again. The latest are in memory, all of them on disk, compressed.
    Ctrl-C stores what is waiting and ends.

    Example: mlxkv serve --model smollm2-135m

    Example: mlxkv serve --model mlx-community/Qwen3-4B-4bit --port 8081 --store-max 50GB
    """
    from mlxkv.errors import InputError

    if no_store and (store, store_max, quality, exact) != (None, None, None, False):
        raise InputError("--no-store goes with none of --store, --store-max, --quality and --exact")
    if exact and quality is not None:
        raise InputError("give either --quality or --exact")
    if quality is not None and not 0 <= quality <= 100:
        raise InputError(f"--quality is a number from 0 to 100, not {quality:g}")
    limit = read_size(store_max, "--store-max")
    from mlxkv.serving.server import Options, Serving

    promise("what was stored stays stored")
    options = Options(cache, not no_store, store, limit, quality, exact, not no_calibrate)
    Serving([*(["--model", model] if model is not None else []), *context.args], options).run()

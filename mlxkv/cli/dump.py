"""mlxkv dump: a prompt to the cache that it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlxkv.cli._checks import Dtype, check_out_file
from mlxkv.cli._commands import commands
from mlxkv.cli._files import read_prompt
from mlxkv.cli._names import Model, Preset
from mlxkv.cli._output import Json, print_record, progress_bar
from mlxkv.cli._work import load_model, promise, working


@commands.register("dump")
def dump_command(
    model: Model,
    out: Annotated[Path, typer.Option(help="The .npz to write.", show_default=False)],
    prompt: Annotated[str | None, typer.Option(help="Text to run.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="A text file to run instead; - is the standard input.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens to generate after the prompt, at most; 0 is prefill only.")
    ] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first so many tokens of the prompt.")] = None,
    preset: Preset = None,
    dtype: Dtype = "auto",
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Also measure what each direction of the cache matters to the model.")
    ] = False,
    json: Json = False,
) -> None:
    """Run a prompt and write the model's cache, a dump, to an .npz file.

    Example: mlxkv dump --model smollm2-135m --prompt-file notes.txt --out notes.npz
    """
    from dataclasses import replace

    from mlxkv import lm
    from mlxkv.dump import write_dump
    from mlxkv.errors import InputError
    from mlxkv.models import cache_spec
    from mlxkv.presets import model_preset
    from mlxkv.sensitivity import sensitivity as measure

    text = read_prompt(prompt, prompt_file)
    checked = model_preset(preset) if preset else None
    check_out_file(out)
    promise(f"{out} was not written")
    loaded, tokenizer = load_model(model)
    if checked:
        checked.check(cache_spec(loaded))
    tokens = tokenizer.encode(text)[:limit]
    if not tokens:
        raise InputError("the prompt has no tokens")
    stop = sorted(tokenizer.eos_token_ids)
    with progress_bar("running the prompt", len(tokens) + max_tokens) as advance:
        taken = lm.dump(loaded, tokens, max_tokens=max_tokens, stop=stop, name=model, dtype=dtype, progress=advance)
    if sensitivity:
        with progress_bar("measuring sensitivity", len(tokens)) as advance:
            start = lm.text_start(tokenizer)
            taken = replace(taken, sensitivity=measure(loaded, tokens, start=start, progress=advance))
    with working(f"writing {out}"):
        write_dump(out, taken)
    facts = {
        "file": str(out),
        "file_bytes": out.stat().st_size,
        "k_shape": taken.k.shape,
        "v_shape": taken.v.shape,
        "layers": list(taken.spec.attention_layers),
        "window_layers": list(taken.spec.window_layers) or None,
        "tokens": taken.length,
        "dtype": str(taken.k.dtype),
        "dtype_note": _why(str(taken.k.dtype), taken.dtype, dtype),
        "other_states": len(taken.states),
        "sensitivity": "measured" if taken.sensitivity else None,
        "model_fingerprint": taken.fingerprint,
    }
    print_record(facts, json)


def _why(stored: str, live: str, asked: str) -> str:
    if stored == live:
        return "exactly as in the model"
    if stored == "float32":
        return f"because float16 cannot hold every {live} value" if asked == "auto" else f"widened from {live}"
    return f"exact for every {live} value here" if asked == "auto" else f"rounded from {live}"

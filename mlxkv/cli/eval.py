from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxkv.cli._checks import Dtype, check_out_file
from mlxkv.cli._output import Json, Model, show

if TYPE_CHECKING:
    from mlxkv.evaluate.fidelity import Prefix


def command(
    model: Model,
    text_file: Annotated[Path, typer.Option(help="UTF-8 text that calibration has not seen.", show_default=False)],
    artifacts: Annotated[Path | None, typer.Option(help="Compress with this folder of mlxkv calibrate.")] = None,
    cache: Annotated[str | None, typer.Option(help="Or run in this live cache: a preset or method.")] = None,
    at: Annotated[int, typer.Option(min=1, help="Tokens in the cache before any is predicted.")] = 512,
    predict: Annotated[int, typer.Option(min=1, help="Tokens to predict after that.")] = 200,
    w: Annotated[
        int | None, typer.Option(min=0, help="Newest tokens to keep exactly, 128 if not given: with --artifacts.")
    ] = None,
    s: Annotated[int | None, typer.Option(min=0, help="First tokens (sinks) likewise, 4 if not given.")] = None,
    dtype: Dtype = "auto",
    out: Annotated[Path | None, typer.Option(help="Write the JSON record here too.")] = None,
    json: Json = False,
) -> None:
    """Does the model notice? Compress a cache in the middle of a text, or use a live one, and compare what follows.

    Example: mlxkv eval --model smollm2-135m --text-file notes.txt --artifacts artifacts --out record.json

    Example: mlxkv eval --model smollm2-135m --text-file notes.txt --cache int8
    """
    from json import dumps

    from mlxkv import lm
    from mlxkv.evaluate import fidelity
    from mlxkv.evaluate.machine import describe
    from mlxkv.files import atomic_write, open_input

    if out:
        check_out_file(out)
    given = {name: value for name, value in (("w", w), ("s", s)) if value is not None}
    measure = _measure(artifacts, cache, given, dtype)
    with open_input(text_file) as file:
        text = file.read().decode("utf-8", errors="replace")
    loaded, tokenizer = lm.load(model)
    start = fidelity.prefix(loaded, tokenizer.encode(text), at, predict=predict, name=model, dtype=dtype)
    record = {
        "model": model,
        "quantization": lm.quantization(loaded),
        "text": text_file.name,
        **measure(loaded, start),
        "machine": describe(),
    }
    if out:
        with atomic_write(out) as target:
            target.write(dumps(record, indent=1).encode())
    table = {key: value for key, value in record.items() if not key.endswith("layer_mse") and key != "machine"}
    show(record if json else table, json)


def _measure(
    artifacts: Path | None, cache: str | None, codec_options: dict[str, Any], dtype: str
) -> Callable[[Any, Prefix], dict[str, Any]]:
    """What to do with the model and the prefix. Raises InputError for options that do not go together."""
    from mlxkv.codec.artifacts import CalibrationArtifacts
    from mlxkv.codec.kvtc import KVTCCacheCodec
    from mlxkv.errors import InputError
    from mlxkv.evaluate import fidelity, live
    from mlxkv.presets import live_settings

    if (artifacts is None) == (cache is None):
        raise InputError("give either --artifacts, to compress a cache, or --cache, to run in a live one")
    if artifacts is not None:
        codec = KVTCCacheCodec(CalibrationArtifacts.from_dir(artifacts), **codec_options)
        return lambda model, start: fidelity.evaluate(model, codec, start)
    if codec_options or dtype != "auto":
        raise InputError("--w, --s and --dtype say how to compress, with --artifacts; --cache takes none of them")
    name = str(cache)
    live_settings(name)  # an unknown name is found before the model is loaded
    return lambda model, start: live.evaluate(model, name, start)

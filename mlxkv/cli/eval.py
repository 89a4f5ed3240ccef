from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlxkv.cli._checks import Dtype, check_out_file
from mlxkv.cli._output import Artifacts, Json, Model, show


def command(
    model: Model,
    text_file: Annotated[Path, typer.Option(help="UTF-8 text that calibration has not seen.", show_default=False)],
    artifacts: Artifacts,
    at: Annotated[int, typer.Option(min=1, help="Tokens in the cache when it is compressed.")] = 512,
    predict: Annotated[int, typer.Option(min=1, help="Tokens to predict after that.")] = 200,
    w: Annotated[int, typer.Option(min=0, help="Newest tokens to keep exactly.")] = 128,
    s: Annotated[int, typer.Option(min=0, help="First tokens (sinks) to keep exactly.")] = 4,
    dtype: Dtype = "auto",
    out: Annotated[Path | None, typer.Option(help="Write the JSON record here too.")] = None,
    json: Json = False,
) -> None:
    """Does the model notice? Compress a cache in the middle of a text and compare what follows.

    Example: mlxkv eval --model smollm2-135m --text-file notes.txt --artifacts artifacts --out record.json
    """
    from json import dumps

    from mlxkv import lm
    from mlxkv.codec.artifacts import CalibrationArtifacts
    from mlxkv.codec.kvtc import KVTCCacheCodec
    from mlxkv.evaluate import fidelity
    from mlxkv.evaluate.machine import describe
    from mlxkv.files import atomic_write, open_input

    if out:
        check_out_file(out)
    codec = KVTCCacheCodec(CalibrationArtifacts.from_dir(artifacts), w=w, s=s)
    with open_input(text_file) as file:
        text = file.read().decode("utf-8", errors="replace")
    loaded, tokenizer = lm.load(model)
    start = fidelity.prefix(loaded, tokenizer.encode(text), at, predict=predict, name=model, dtype=dtype)
    record = {
        "model": model,
        "quantization": lm.quantization(loaded),
        "text": text_file.name,
        **fidelity.evaluate(loaded, codec, start),
        "machine": describe(),
    }
    if out:
        with atomic_write(out) as target:
            target.write(dumps(record, indent=1).encode())
    table = {key: value for key, value in record.items() if not key.endswith("layer_mse") and key != "machine"}
    show(record if json else table, json)

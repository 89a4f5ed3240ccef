"""How long does naming a model take? Hashing every value of its weights.

Each model is named several times over; its fastest is the result, as other work on the machine only adds. The language
model is quantized as mlx-lm does it; the made-up one has random weights of the geometry of Llama 3 8B's layers. Seconds for
8 GB are extrapolated from that. Quick: one layer, two rounds.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any, cast

import mlx.core as mx
from mlx.nn.layers.quantized import quantize
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs

from benchmarks.schema import MODEL, Outcome, Result
from benchmarks.tables import table
from mlxkv import lm
from mlxkv.identity import fingerprint

PHASE = 8
BITS, GROUP = 4, 64
LAYERS = 10
TARGET_BYTES = 8_000_000_000


def run(quick: bool) -> Outcome:
    layers, rounds = (1, 2) if quick else (LAYERS, 5)
    samples = []
    for name, model in (("SmolLM2-135M", language_model()), ("made up", made_up(layers))):
        for weights in ("bfloat16", f"{BITS}-bit"):
            if weights == "bfloat16":
                model.set_dtype(mx.bfloat16)
            else:
                quantize(model, group_size=GROUP, bits=BITS)
            mx.eval(model.parameters())
            parameters = cast(dict[str, mx.array], tree_flatten(model.parameters(), destination={}))
            size = sum(value.nbytes for value in parameters.values())
            for _ in range(rounds):
                start = perf_counter()
                fingerprint(model)
                seconds = perf_counter() - start
                samples.append({"model": name, "weights": weights, "bytes": size, "seconds": seconds})
    config = {"model": MODEL, "layers": layers, "bits": BITS, "group": GROUP, "rounds": rounds}
    return Outcome(config, samples, summarise(samples))


def language_model() -> Any:
    """Return the language model."""
    return lm.load(MODEL)[0]


def made_up(layers: int) -> Any:
    """Return a model of random weights in bfloat16."""
    model = Model(
        ModelArgs(
            model_type="llama",
            hidden_size=4096,
            num_hidden_layers=layers,
            intermediate_size=14336,
            num_attention_heads=32,
            num_key_value_heads=8,
            rms_norm_eps=1e-5,
            vocab_size=1024,
        )
    )
    model.set_dtype(mx.bfloat16)  # before anything is computed: in float32 it would not fit small machines
    return model


def summarise(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the fastest round of each model, and what its rate says about 8 GB."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for sample in samples:
        key = sample["model"], sample["weights"]
        if key not in found or sample["seconds"] < found[key]["seconds"]:
            found[key] = sample
    return [
        {
            **sample,
            "seconds": round(sample["seconds"], 4),
            "gb_per_second": round(sample["bytes"] / sample["seconds"] / 1e9, 2),
            "seconds_for_8_gb": round(sample["seconds"] * TARGET_BYTES / sample["bytes"], 2),
        }
        for sample in found.values()
    ]


def brief(result: Result) -> str:
    """Say what a README shows: the finding without its table."""
    return section(result).partition("\n")[0]


def section(result: Result) -> str:
    rows = {(row["model"], row["weights"]): row for row in result["summary"]}
    large, wide = rows["made up", f"{BITS}-bit"], rows["made up", "bfloat16"]
    found = (
        f"Naming 8 GB of {BITS}-bit weights takes {large['seconds_for_8_gb']:.1f} s, extrapolated from {large['bytes'] / 1e6:,.0f} MB; of"
        f" bfloat16, which is widened so that a model has one name in every type, {wide['seconds_for_8_gb']:.1f} s. A small model's time goes"
        " into the number of its arrays, not into their bytes."
    )
    cells = [
        [
            row["model"],
            row["weights"],
            f"{row['bytes'] / 1e6:,.0f}",
            f"{row['seconds']:.3f}",
            f"{row['gb_per_second']:.1f}",
        ]
        for row in rows.values()
    ]
    return f"{found}\n\n{table(('model', 'weights', 'MB', 'seconds', 'GB/s'), cells)}"

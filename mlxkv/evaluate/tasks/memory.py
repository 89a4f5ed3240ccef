"""Memory of a cache, and the peaks while it is built and used."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxkv.config import Config
from mlxkv.evaluate import texts
from mlxkv.evaluate.evaluation import EvalSample, Evaluation, evaluations, option
from mlxkv.evaluate.variants import Variant


@dataclass(frozen=True)
class MemoryOptions(Config):
    """Options of `mlxkv eval memory`."""

    text_file: Path | None = option(None, texts.TEXT_FILE)
    lengths: tuple[int, ...] = option((512, 1024), "tokens cached", least=1)


@evaluations.register("memory")
class Memory(Evaluation):
    """Measure the memory that a cache takes, and the peaks while its context is read and a token is decoded.

    - cache_bytes: the arrays that the cache keeps, with windows and states of layers that a method leaves to mlx-lm
    - resident_bytes: growth of MLX's allocations, which includes copies that a method keeps
    - prefill_peak_bytes: peak while the context is read, above the memory before
    - decode_peak_bytes: peak while one token is decoded, above the resident memory

    Peaks include the model's activations.

    Notes
    -----
    Bytes do not depend on what a text says, so a text that is too short for a
    length is repeated.
    """

    options_class = MemoryOptions
    scores = ("cache_bytes", "resident_bytes", "prefill_peak_bytes", "decode_peak_bytes")
    options: MemoryOptions

    def samples(self, tokenizer: Any, seed: int) -> list[EvalSample]:
        """Return one sample for each length, the same for every seed."""
        return [
            EvalSample(
                {"text": texts.text_name(self.options.text_file), "length": length},
                partial(_measure, texts.repeated_tokens(tokenizer, self.options.text_file, length + 1)),
            )
            for length in dict.fromkeys(self.options.lengths)
        ]


def _measure(tokens: Sequence[int], model: Any, tokenizer: Any, variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """Return a record for each variant; only one cache is in memory at a time."""
    records = []
    for variant in variants:
        before = _active()
        mx.reset_peak_memory()
        cached = variant.build(model, tokens[:-1])
        prefill_peak = mx.get_peak_memory() - before
        resident = _active() - before
        mx.reset_peak_memory()
        mx.eval(model(mx.array([[tokens[-1]]]), cache=cached.cache), [entry.state for entry in cached.cache])
        records.append(
            {
                "variant": variant.name,
                **cached.sizes,
                "resident_bytes": resident,
                "prefill_peak_bytes": prefill_peak,
                "decode_peak_bytes": mx.get_peak_memory() - before - resident,
            }
        )
        del cached
    return records


def _active() -> int:
    """Return the bytes of all live arrays."""
    mx.synchronize()  # what has been computed may still hold what it was computed from
    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory()

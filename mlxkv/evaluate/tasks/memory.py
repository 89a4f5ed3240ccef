"""How much memory? What a held context really takes, and what reading it and decoding a token take on top."""

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
    text_file: Path | None = option(None, "UTF-8 text to hold; if not given, an essay written for this project")
    lengths: tuple[int, ...] = option((512, 1024), "tokens of it that are held", least=1)


@evaluations.register("memory")
class Memory(Evaluation):
    """How much memory? What a held context really takes, and what reading it and decoding a token take on top.

    Bytes do not depend on what a text says, so a text that is too short for a length is begun again.
    """

    options_class = MemoryOptions
    scores = ("cache_bytes", "resident_bytes", "prefill_peak_bytes", "decode_peak_bytes")
    options: MemoryOptions

    def samples(self, tokenizer: Any, seed: int) -> list[EvalSample]:
        """One for each length, whatever the seed."""
        return [
            EvalSample(
                {"text": texts.text_name(self.options.text_file), "length": length},
                partial(_measure, texts.repeated_tokens(tokenizer, self.options.text_file, length + 1)),
            )
            for length in dict.fromkeys(self.options.lengths)
        ]


def _measure(tokens: Sequence[int], model: Any, tokenizer: Any, variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """One held at a time. resident_bytes: by how much MLX's allocator holds more than before, so copies that a method
    keeps show, and other layers' states. prefill_peak_bytes: the most while the context is read, above before.
    decode_peak_bytes: the most that one decoded token needs above what is held. Both have the model's activations."""
    records = []
    for variant in variants:
        before = _active()
        mx.reset_peak_memory()
        held = variant.build(model, tokens[:-1])
        prefill_peak = mx.get_peak_memory() - before
        resident = _active() - before
        mx.reset_peak_memory()
        mx.eval(model(mx.array([[tokens[-1]]]), cache=held.cache), [entry.state for entry in held.cache])
        records.append(
            {
                "variant": variant.name,
                **held.sizes,
                "resident_bytes": resident,
                "prefill_peak_bytes": prefill_peak,
                "decode_peak_bytes": mx.get_peak_memory() - before - resident,
            }
        )
        del held
    return records


def _active() -> int:
    mx.synchronize()  # what has been computed may still hold what it was computed from
    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory()

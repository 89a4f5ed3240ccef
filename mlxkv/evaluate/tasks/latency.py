"""How fast? Seconds of prefill and of every decoded token, all variants in turn on the same tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from mlxkv import lm
from mlxkv.config import Config
from mlxkv.evaluate import texts
from mlxkv.evaluate.evaluation import EvalSample, Evaluation, evaluations, option
from mlxkv.evaluate.variants import Variant

SLOWEST = 0.95  # the quantile that stands for tokens with extra work


@dataclass(frozen=True)
class LatencyOptions(Config):
    text_file: Path | None = option(None, "UTF-8 text to hold; if not given, an essay written for this project")
    context_tokens: int = option(512, "tokens that are held before any is decoded", least=1)
    tokens: int = option(32, "tokens that are decoded in each round", least=1)
    rounds: int = option(3, "rounds, in each of which every variant decodes the same tokens", least=1)


@evaluations.register("latency")
class Latency(Evaluation):
    """How fast? Seconds of prefill and of every decoded token, all variants in turn on the same tokens.

    Rounds alternate between variants, so a machine that slows down slows all of them: relative speeds are those within a
    round. Where a method works only now and then (packing a block, allocating anew), some tokens take longer than the median.
    """

    options_class = LatencyOptions
    scores = ("prefill_seconds", "token_seconds", "slowest_token_seconds", "prefill_relative", "decode_relative")
    options: LatencyOptions

    def samples(self, tokenizer: Any, seed: int) -> list[EvalSample]:
        """One; each seed has another part of the text."""
        tokens = texts.repeated_tokens(
            tokenizer,
            self.options.text_file,
            self.options.context_tokens + self.options.rounds * self.options.tokens,
            seed,
        )
        return [
            EvalSample(
                {"text": texts.text_name(self.options.text_file), "seed": seed}, partial(_measure, tokens, self.options)
            )
        ]


def _measure(
    tokens: Sequence[int], options: LatencyOptions, model: Any, tokenizer: Any, variants: Sequence[Variant]
) -> list[dict[str, Any]]:
    """prefill_seconds: to hold the context, once. seconds: of each round's tokens. decode_peak_bytes: the most that
    decoding needs above what all variants hold, of all rounds. The relative ones are speeds: 2 is twice as fast as the first."""
    context = tokens[: options.context_tokens]
    lm.prefill(model, context[: lm.PREFILL_CHUNK], make_prompt_cache(model))  # else the first would wait for weights
    held, prefill = {}, {}
    for variant in variants:
        start = time.perf_counter()
        held[variant.name] = variant.build(model, context)
        prefill[variant.name] = time.perf_counter() - start
    seconds: dict[str, list[list[float]]] = {name: [] for name in held}
    peaks = dict.fromkeys(held, 0)
    for begin in range(options.context_tokens, len(tokens), options.tokens):
        for name in held:
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            seconds[name].append(
                [decode(model, held[name].cache, token) for token in tokens[begin : begin + options.tokens]]
            )
            peaks[name] = max(peaks[name], mx.get_peak_memory() - before)
    first = variants[0].name
    return [
        {
            "variant": name,
            **held[name].sizes,
            "prefill_seconds": prefill[name],
            "prefill_relative": prefill[first] / prefill[name],
            "token_seconds": float(np.median(times)),
            "slowest_token_seconds": float(np.quantile(times, SLOWEST)),
            "decode_relative": median(sum(a) / sum(b) for a, b in zip(seconds[first], times)),
            "decode_peak_bytes": peaks[name],
            "seconds": times,
        }
        for name, times in seconds.items()
    ]


def decode(model: Any, cache: list[Any], token: int) -> float:
    """Seconds of one token through the model and its cache."""
    start = time.perf_counter()
    mx.eval(model(mx.array([[token]]), cache=cache), [entry.state for entry in cache])
    return time.perf_counter() - start

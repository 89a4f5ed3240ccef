"""Seconds of prefill and of every decoded token."""

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

SLOW_QUANTILE = 0.95  # the quantile that stands for tokens with extra work


@dataclass(frozen=True)
class LatencyOptions(Config):
    """Options of `mlxkv eval latency`."""

    text_file: Path | None = option(None, texts.TEXT_FILE)
    context_tokens: int = option(512, "tokens cached before any is decoded", least=1)
    tokens: int = option(32, "tokens decoded in each round", least=1)
    rounds: int = option(3, "rounds, in which all decode the same tokens", least=1)


@evaluations.register("latency")
class Latency(Evaluation):
    """Measure the seconds of prefill and of every decoded token.

    - prefill_seconds: building the cache of the context
    - token_seconds: median over decoded tokens
    - slowest_token_seconds: 95 % quantile, as methods that pack a block now and then have slow tokens
    - prefill_relative, decode_relative: speed relative to the untouched cache; 2 is twice as fast

    Notes
    -----
    All variants decode the same tokens, in turn: a machine that slows down slows all of them, and relative speeds are
    medians of those within a round. Records also have decode_peak_bytes, the peak above the memory of all caches.
    """

    options_class = LatencyOptions
    scores = ("prefill_seconds", "token_seconds", "slowest_token_seconds", "prefill_relative", "decode_relative")
    options: LatencyOptions

    def samples(self, tokenizer: Any, seed: int) -> list[EvalSample]:
        """Return one sample; each seed has another part of the text."""
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
    """Return a record for each variant, with the seconds of each token by round."""
    context = tokens[: options.context_tokens]
    lm.prefill(model, context[: lm.PREFILL_CHUNK], make_prompt_cache(model))  # else the first would wait for weights
    contexts, prefill = {}, {}
    for variant in variants:
        start = time.perf_counter()
        contexts[variant.name] = variant.build(model, context)
        prefill[variant.name] = time.perf_counter() - start
    seconds: dict[str, list[list[float]]] = {name: [] for name in contexts}
    peaks = dict.fromkeys(contexts, 0)
    for begin in range(options.context_tokens, len(tokens), options.tokens):
        for name in contexts:
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            seconds[name].append(
                [decode_seconds(model, contexts[name].cache, token) for token in tokens[begin : begin + options.tokens]]
            )
            peaks[name] = max(peaks[name], mx.get_peak_memory() - before)
    first = variants[0].name
    return [
        {
            "variant": name,
            **contexts[name].sizes,
            "prefill_seconds": prefill[name],
            "prefill_relative": prefill[first] / prefill[name],
            "token_seconds": float(np.median(times)),
            "slowest_token_seconds": float(np.quantile(times, SLOW_QUANTILE)),
            "decode_relative": median(sum(a) / sum(b) for a, b in zip(seconds[first], times)),
            "decode_peak_bytes": peaks[name],
            "seconds": times,
        }
        for name, times in seconds.items()
    ]


def decode_seconds(model: Any, cache: list[Any], token: int) -> float:
    """Time one token through a model and its cache.

    Parameters
    ----------
    model
        A model that mlx-lm loaded.
    cache
        A prompt cache, in which the token is afterwards.
    token
        The token.

    Returns
    -------
    float
        Seconds until logits and cache are computed.
    """
    start = time.perf_counter()
    mx.eval(model(mx.array([[token]]), cache=cache), [entry.state for entry in cache])
    return time.perf_counter() - start

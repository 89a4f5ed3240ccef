"""Perplexity of a text after its first part is in the cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxkv.evaluate import texts
from mlxkv.evaluate.evaluation import EvalSample, Evaluation, Record, evaluations, option
from mlxkv.evaluate.tasks import fidelity
from mlxkv.evaluate.variants import Variant, iter_logits, iter_variants

EXCELLENT_DELTA, GOOD_DELTA = 0.1, 0.5


@dataclass(frozen=True)
class PerplexityOptions(fidelity.FidelityOptions):
    """Options of `mlxkv eval perplexity`."""

    eval_tokens: int = option(512, "tokens predicted after them", least=1)
    samples: int = option(2, texts.EXCERPTS, least=1)


@evaluations.register("perplexity")
class Perplexity(Evaluation):
    """Measure the perplexity of a text after its first part is in the cache.

    - perplexity: exp of the mean cross-entropy of the tokens after the first part
    - perplexity_delta: perplexity less that with the untouched cache
    - bits_per_token: the cross-entropy itself

    Notes
    -----
    The verdict in records is excellent for a delta below 0.1, good below 0.5, and noticed otherwise.
    """

    options_class = PerplexityOptions
    scores = ("perplexity", "perplexity_delta", "bits_per_token")
    options: PerplexityOptions

    def samples(self, tokenizer: Any, seed: int) -> list[EvalSample]:
        """Return one sample for each excerpt of the text."""
        length = self.options.context_tokens + self.options.eval_tokens + 1
        return texts.text_samples(
            tokenizer, self.options.text_file, length, self.options.samples, seed, partial(_measure, self.options)
        )


def _measure(
    options: PerplexityOptions, tokens: Sequence[int], model: Any, tokenizer: Any, variants: Sequence[Variant]
) -> list[Record]:
    """Return a record for each variant."""
    context, following = tokens[: options.context_tokens], tokens[options.context_tokens :]
    records: list[Record] = []
    for variant, cached in iter_variants(model, variants, context):
        loss = sum(_losses(model, cached.cache, following, options.chunk)) / (len(following) - 1)
        perplexity = math.exp(loss)
        delta = perplexity - records[0]["perplexity"] if records else 0.0
        verdict = "excellent" if delta < EXCELLENT_DELTA else "good" if delta < GOOD_DELTA else "noticed"
        records.append(
            {
                "variant": variant.name,
                **cached.sizes,
                "predicted_tokens": len(following) - 1,
                "perplexity": perplexity,
                "perplexity_delta": delta,
                "bits_per_token": loss / math.log(2),
                "verdict": verdict,
            }
        )
    return records


def _losses(model: Any, cache: list[Any], following: Sequence[int], chunk: int) -> Iterator[float]:
    """Yield the sum of losses of each chunk of predictions, in nats."""
    predicted = 1
    for logits in iter_logits(model, cache, following, chunk):
        targets = mx.array(list(following[predicted : predicted + len(logits)]))
        predicted += len(logits)
        yield float(nn.losses.cross_entropy(logits.astype(mx.float32), targets, reduction="sum"))

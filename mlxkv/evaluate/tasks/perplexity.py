"""How surprised is the model by the rest of a text? Perplexity after the first part is held."""

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

GOOD, EXCELLENT = 0.5, 0.1


@dataclass(frozen=True)
class PerplexityOptions(fidelity.FidelityOptions):
    eval_tokens: int = option(512, "tokens that are predicted after them", least=1)
    samples: int = option(2, "stretches of the text for each seed", least=1)


@evaluations.register("perplexity")
class Perplexity(Evaluation):
    """How surprised is the model by the rest of a text? Perplexity after the first part is held.

    The plan's approach B: a delta below 0.5 is good, below 0.1 excellent.
    """

    options_class = PerplexityOptions
    scores = ("perplexity", "perplexity_delta", "bits_per_token")
    options: PerplexityOptions

    def samples(self, tokenizer: Any, seed: int) -> list[EvalSample]:
        """One for each stretch of the text. Raises InputError for a text that is too short."""
        return texts.text_samples(
            tokenizer,
            self.options,
            self.options.context_tokens + self.options.eval_tokens + 1,
            seed,
            partial(_measure, self.options),
        )


def _measure(
    options: PerplexityOptions, tokens: Sequence[int], model: Any, tokenizer: Any, variants: Sequence[Variant]
) -> list[Record]:
    context, following = tokens[: options.context_tokens], tokens[options.context_tokens :]
    records: list[Record] = []
    for variant, held in iter_variants(model, variants, context):
        loss = sum(_losses(model, held.cache, following, options.chunk)) / (len(following) - 1)
        perplexity = math.exp(loss)
        delta = perplexity - records[0]["perplexity"] if records else 0.0
        verdict = "excellent" if delta < EXCELLENT else "good" if delta < GOOD else "noticed"
        records.append(
            {
                "variant": variant.name,
                **held.sizes,
                "predicted_tokens": len(following) - 1,
                "perplexity": perplexity,
                "perplexity_delta": delta,
                "bits_per_token": loss / math.log(2),
                "verdict": verdict,
            }
        )
    return records


def _losses(model: Any, cache: list[Any], following: Sequence[int], chunk: int) -> Iterator[float]:
    """The sum of the losses of each chunk's next tokens, in nats."""
    place = 1
    for logits in iter_logits(model, cache, following, chunk):
        targets = mx.array(list(following[place : place + len(logits)]))
        place += len(logits)
        yield float(nn.losses.cross_entropy(logits.astype(mx.float32), targets, reduction="sum"))

"""How surprised is the model by the rest of a text? Perplexity after the first part is held.

The plan's approach B: a delta below 0.5 is good, below 0.1 excellent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxkv.evaluate import _texts, fidelity
from mlxkv.evaluate._run import Record, Unit, option
from mlxkv.evaluate._variants import Variant, each, follow

SCORES = ("perplexity", "perplexity_delta", "bits_per_token")
GOOD, EXCELLENT = 0.5, 0.1


@dataclass(frozen=True)
class Options(fidelity.Options):
    predict: int = option(512, "tokens that are predicted after them")
    samples: int = option(2, "stretches of the text for each seed")


def units(tokenizer: Any, options: Options, seed: int) -> list[Unit]:
    """One for each stretch of the text. Raises InputError for a text that is too short."""
    return _texts.units(tokenizer, options, options.at + options.predict + 1, seed, partial(_measure, options))


def _measure(
    options: Options, tokens: Sequence[int], model: Any, tokenizer: Any, variants: Sequence[Variant]
) -> list[Record]:
    context, following = tokens[: options.at], tokens[options.at :]
    records: list[Record] = []
    for variant, held in each(model, variants, context):
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
    for logits in follow(model, cache, following, chunk):
        targets = mx.array(list(following[place : place + len(logits)]))
        place += len(logits)
        yield float(nn.losses.cross_entropy(logits.astype(mx.float32), targets, reduction="sum"))

"""Does the model notice? What it says of the tokens that follow a held text, against what it says from the whole cache.

Of a codec the record is that of the plan's phase 4: cosine and KL of the next token's logits, sizes, errors by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxkv.errors import InputError
from mlxkv.evaluate import metrics, texts
from mlxkv.evaluate.runner import EvalSample, Record, check_at_least, option
from mlxkv.evaluate.variants import Variant, iter_logits, iter_variants

SCORES = ("kl", "top1_agreement", "next_token_cosine", "perplexity_delta")


@dataclass(frozen=True)
class FidelityOptions:
    text_file: Path | None = option(None, texts.TEXT_FILE)
    at: int = option(512, "tokens that are held before any is predicted")
    predict: int = option(200, "tokens that are predicted after them")
    samples: int = option(3, "stretches of the text for each seed")
    chunk: int = option(16, "tokens given at a time after that; 1 is as in generation, and slower")

    def __post_init__(self) -> None:
        check_at_least(self, "at", "predict", "samples", "chunk")


def units(tokenizer: Any, options: FidelityOptions, seed: int) -> list[EvalSample]:
    """One for each stretch of the text. Raises InputError for a text that is too short."""

    def measure(tokens: Sequence[int], model: Any, tokenizer: Any, variants: Sequence[Variant]) -> list[Record]:
        return evaluate(model, variants, tokens, options.at, options.chunk)

    return texts.text_samples(tokenizer, options, options.at + options.predict + 1, seed, measure)


def evaluate(
    model: Any, variants: Sequence[Variant], tokens: Sequence[int], at: int, chunk: int = 16
) -> list[dict[str, Any]]:
    """A record for each variant: the first `at` tokens are held, the rest are predicted, `chunk` at a time.

    The first variant is the reference. Raises InputError for too few tokens.
    """
    if not 1 <= at <= len(tokens) - 2:
        raise InputError(f"{len(tokens)} tokens are too few to hold {at} and predict 1 or more after the next")
    following, records = tokens[at:], []
    reference: mx.array | None = None
    for variant, held in iter_variants(model, variants, tokens[:at]):
        logits = mx.concatenate([*iter_logits(model, held.cache, following, chunk)])
        reference = logits if reference is None else reference
        records.append({"variant": variant.name, **held.sizes, **held.details, **compare(reference, logits, following)})
    return records


def compare(reference: mx.array, logits: mx.array, following: Sequence[int]) -> dict[str, Any]:
    """Logits `[n, vocabulary]` from a held cache against the reference's, over the n + 1 tokens that follow."""
    targets = mx.array(list(following[1:]))
    before, after = metrics.perplexity(reference, targets), metrics.perplexity(logits, targets)
    kl = metrics.kl_divergence(reference, logits)
    return {
        "predicted_tokens": len(following) - 1,
        "next_token_cosine": float(metrics.cosine(reference[0], logits[0])),
        "next_token_kl": float(kl[0]),
        "kl": float(kl.mean()),
        "top1_agreement": metrics.top1_agreement(reference, logits),
        "perplexity_reference": before,
        "perplexity": after,
        "perplexity_delta": after - before,
    }

"""Does the model notice? What it says of the tokens that follow a held text, against what it says from the whole cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxkv.config import Config
from mlxkv.errors import InputError
from mlxkv.evaluate import metrics, texts
from mlxkv.evaluate.evaluation import EvalSample, Evaluation, Record, evaluations, option
from mlxkv.evaluate.variants import Variant, iter_logits, iter_variants


@dataclass(frozen=True)
class FidelityOptions(Config):
    text_file: Path | None = option(None, texts.TEXT_FILE)
    context_tokens: int = option(512, "tokens that are held before any is predicted", least=1)
    eval_tokens: int = option(200, "tokens that are predicted after them", least=1)
    samples: int = option(3, "stretches of the text for each seed", least=1)
    chunk: int = option(16, "tokens given at a time after that; 1 is as in generation, and slower", least=1)


@evaluations.register("fidelity")
class Fidelity(Evaluation):
    """Does the model notice? What it says of the tokens that follow a held text, against what it says from the whole cache.

    Of a codec the record is that of the plan's phase 4: cosine and KL of the next token's logits, sizes, errors by layer.
    """

    options_class = FidelityOptions
    scores = ("kl", "top1_agreement", "next_token_cosine", "perplexity_delta")
    options: FidelityOptions

    def samples(self, tokenizer: Any, seed: int) -> list[EvalSample]:
        """One for each stretch of the text. Raises InputError for a text that is too short."""

        def measure(tokens: Sequence[int], model: Any, tokenizer: Any, variants: Sequence[Variant]) -> list[Record]:
            return evaluate(model, variants, tokens, self.options.context_tokens, self.options.chunk)

        return texts.text_samples(
            tokenizer, self.options, self.options.context_tokens + self.options.eval_tokens + 1, seed, measure
        )


def evaluate(
    model: Any, variants: Sequence[Variant], tokens: Sequence[int], context_tokens: int, chunk: int = 16
) -> list[dict[str, Any]]:
    """A record for each variant: the first `context_tokens` tokens are held, the rest are predicted, `chunk` at a time.

    The first variant is the reference. Raises InputError for too few tokens.
    """
    if not 1 <= context_tokens <= len(tokens) - 2:
        raise InputError(
            f"{len(tokens)} tokens are too few to hold {context_tokens} and predict 1 or more after the next"
        )
    following, records = tokens[context_tokens:], []
    reference: mx.array | None = None
    for variant, held in iter_variants(model, variants, tokens[:context_tokens]):
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

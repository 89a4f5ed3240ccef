"""Divergence of next-token predictions from those of the untouched cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    """Options of `mlxkv eval fidelity`."""

    text_file: Path | None = option(None, texts.UNSEEN_TEXT_FILE)
    context_tokens: int = option(512, "tokens cached before any is predicted", least=1)
    eval_tokens: int = option(200, "tokens predicted after them", least=1)
    samples: int = option(3, texts.EXCERPTS, least=1)
    chunk: int = option(16, "tokens read at a time; 1 as in generation, slower", least=1)


@evaluations.register("fidelity")
class Fidelity(Evaluation):
    """Measure how far predictions of the tokens after a text diverge from those of the untouched cache.

    - kl: KL divergence of the next token's distribution in nats, mean over tokens
    - top1_agreement: share of tokens at which both caches make the same token the most probable one
    - next_token_cosine: cosine of the logits of the first prediction
    - perplexity_delta: perplexity less that with the untouched cache

    Notes
    -----
    Records of codecs also have the sizes of the file's parts, and errors of keys and values by layer.
    """

    options_class = FidelityOptions
    scores = ("kl", "top1_agreement", "next_token_cosine", "perplexity_delta")
    options: FidelityOptions

    def samples(self, tokenizer: Any, seed: int) -> list[EvalSample]:
        """Return one sample for each excerpt of the text."""

        def measure(tokens: Sequence[int], model: Any, tokenizer: Any, variants: Sequence[Variant]) -> list[Record]:
            return evaluate(model, variants, tokens, self.options.context_tokens, self.options.chunk)

        length = self.options.context_tokens + self.options.eval_tokens + 1
        return texts.text_samples(tokenizer, self.options.text_file, length, self.options.samples, seed, measure)


def evaluate(
    model: Any, variants: Sequence[Variant], tokens: Sequence[int], context_tokens: int, chunk: int = 16
) -> list[Record]:
    """Compare predictions of the tokens after a context from the caches of several variants.

    Parameters
    ----------
    model
        A model that mlx-lm loaded.
    variants
        The variants; the first one is the reference.
    tokens
        The text, `context_tokens` + 2 tokens or more.
    context_tokens
        Tokens of the context, 1 or more; predicted are all tokens after the next.
    chunk
        Tokens that the model reads at a time after the context.

    Returns
    -------
    list of dict
        For each variant its name, sizes and details, and what `compare` returns.

    Raises
    ------
    InputError
        For too few tokens.
    """
    return list(iter_records(model, variants, tokens, context_tokens, chunk))


def iter_records(
    model: Any, variants: Sequence[Variant], tokens: Sequence[int], context_tokens: int, chunk: int = 16
) -> Iterator[Record]:
    """Compare as `evaluate` does, one variant after the other.

    Parameters
    ----------
    model, variants, tokens, context_tokens, chunk
        As for `evaluate`.

    Yields
    ------
    dict
        What `evaluate` returns of a variant.

    Raises
    ------
    InputError
        For too few tokens.
    """
    if not 1 <= context_tokens <= len(tokens) - 2:
        raise InputError(
            f"{len(tokens)} tokens are too few to hold {context_tokens} and predict 1 or more after the next"
        )
    following = tokens[context_tokens:]
    reference: mx.array | None = None
    for variant, cached in iter_variants(model, variants, tokens[:context_tokens]):
        logits = mx.concatenate([*iter_logits(model, cached.cache, following, chunk)])
        reference = logits if reference is None else reference
        record = {"variant": variant.name, **cached.sizes, **cached.details, **compare(reference, logits, following)}
        del cached, logits  # whoever asks for one record at a time may use the memory between two
        yield record


def compare(reference: mx.array, logits: mx.array, following: Sequence[int]) -> dict[str, Any]:
    """Compare predictions with those of a reference.

    Parameters
    ----------
    reference, logits
        Logits `[n, vocabulary]`, such as `iter_logits` yields.
    following
        The n + 1 tokens that follow the context; the first one is not predicted.

    Returns
    -------
    dict
        `predicted_tokens`, n; `kl`, KL(reference || logits) in nats, and `top1_agreement`, 0 to 1, means over all
        predictions; `next_token_kl` and `next_token_cosine` of the first prediction; `perplexity`,
        `perplexity_reference` and their difference `perplexity_delta`.
    """
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

"""How much of what a model writes stays the same? Greedy continuations of prompts, with a method and without.

BLEU is sacrebleu's for a sentence and ROUGE-L rouge-score's, both with the continuation of the untouched cache as the
reference, and both by words of alphabets that put spaces between them. The other two measures hold for any text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from random import Random
from typing import Any

from mlxkv.errors import InputError
from mlxkv.evaluate.scores import library
from mlxkv.evaluate.variants import Variant, answer, beside_whole


def evaluate(model: Any, tokenizer: Any, variants: Sequence[Variant], prompts: Sequence[str], *, max_tokens: int = 128,
             limit: int | None = None, seed: int = 0,
             progress: Callable[[int], None] | None = None) -> list[dict[str, Any]]:  # fmt: skip
    """Every prompt continued by every variant: one JSON-ready record a prompt and variant, the untouched cache first.

    limit: most prompts, drawn by seed. progress is called with 1 after each continuation. Raises InputError for a prompt
    of fewer than 2 tokens or a number below 1, MlxkvError where a library for the scores is missing.
    """
    if max_tokens < 1 or (limit is not None and limit < 1):
        raise InputError(f"max_tokens and limit must be 1 or more, not {max_tokens} and {limit}")
    count = len(prompts) if limit is None else min(limit, len(prompts))
    chosen = sorted(Random(seed).sample(range(len(prompts)), count))
    encoded = {index: tokenizer.encode(prompts[index]) for index in chosen}
    short = [index for index, tokens in encoded.items() if len(tokens) < 2]
    if short:
        raise InputError(f"prompts need 2 tokens or more; too short: {short}, counted from 0")
    compare(tokenizer, [], [])  # a missing library should not be found out after the model has worked
    records = []
    for index, tokens in encoded.items():
        continuations: list[list[int]] = []
        for variant in beside_whole(variants):
            continuations.append(answer(model, tokenizer, variant, tokens[:-1], tokens[-1:], max_tokens))
            reference, said = continuations[0], continuations[-1]
            records.append(
                {
                    "prompt": index,
                    "variant": variant.name,
                    "text": tokenizer.decode(said),
                    "prompt_tokens": len(tokens),
                    "tokens": len(said),
                    **compare(tokenizer, reference, said),
                    "seed": seed,
                }
            )
            if progress:
                progress(1)
    return records


def compare(tokenizer: Any, reference: Sequence[int], said: Sequence[int]) -> dict[str, Any]:
    """From 0 to 1: BLEU and ROUGE-L of the texts; the share of the longer one's tokens that are equal from the start
    to the first that is not; exact: whether all are."""
    texts = tokenizer.decode(list(said)), tokenizer.decode(list(reference))
    exact = list(said) == list(reference)
    equal = sum(takewhile(bool, (a == b for a, b in zip(said, reference))))
    return {
        "bleu": bleu(*texts),
        "rouge_l": rouge_l(*texts),
        "equal_leading_tokens": 1.0 if exact else equal / max(len(said), len(reference)),
        "exact": exact,
    }


def bleu(said: str, reference: str) -> float:
    """sacrebleu's BLEU of one sentence, divided by 100; 1 for equal texts, empty ones too."""
    score = library("sacrebleu").sentence_bleu(said, [reference]).score / 100
    return 1.0 if said == reference else score


def rouge_l(said: str, reference: str) -> float:
    """F1 of rouge-score's ROUGE-L, without stemming; 1 for equal texts, ones without words too."""
    score = library("rouge_score.rouge_scorer").RougeScorer(["rougeL"]).score(reference, said)["rougeL"].fmeasure
    return 1.0 if said == reference else score

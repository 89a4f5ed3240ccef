"""How much of what a model writes stays the same? Greedy continuations of prompts, with a method and without."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from mlxkv.config import Config
from mlxkv.evaluate import texts
from mlxkv.evaluate.answer_scores import library
from mlxkv.evaluate.evaluation import EvalSample, Evaluation, Record, evaluations, option
from mlxkv.evaluate.variants import Variant, generate_answer, iter_variants


@dataclass(frozen=True)
class TextOptions(Config):
    text_file: Path | None = option(None, texts.TEXT_FILE)
    context_tokens: int = option(256, "tokens of the text that a continuation begins after", least=2)
    max_tokens: int = option(128, "tokens to generate, at most", least=1)
    samples: int = option(5, "stretches of the text for each seed", least=1)


@evaluations.register("text")
class Text(Evaluation):
    """How much of what a model writes stays the same? Greedy continuations of prompts, with a method and without.

    BLEU is sacrebleu's for a sentence and ROUGE-L rouge-score's, both with the continuation of the untouched cache as the
    reference, and both by words of alphabets that put spaces between them. The other two measures hold for any text.
    """

    options_class = TextOptions
    scores = ("bleu", "rouge_l", "equal_leading_tokens", "exact")
    options: TextOptions

    def samples(self, tokenizer: Any, seed: int) -> list[EvalSample]:
        """One for each stretch of the text. Raises InputError for a text that is too short, MlxkvError where a library for the
        scores is missing."""
        compare(tokenizer, [], [])  # a missing library should not be found out after the model has worked
        return texts.text_samples(
            tokenizer, self.options, self.options.context_tokens, seed, partial(continue_text, self.options.max_tokens)
        )


def continue_text(
    max_tokens: int, tokens: Sequence[int], model: Any, tokenizer: Any, variants: Sequence[Variant]
) -> list[Record]:
    """Every variant's continuation of tokens, of which all but the last are held: a record each, against the first's."""
    records: list[Record] = []
    reference: list[int] | None = None
    for variant, held in iter_variants(model, variants, tokens[:-1]):
        said = generate_answer(model, tokenizer, held, tokens[-1:], max_tokens)
        reference = said if reference is None else reference
        scores = compare(tokenizer, reference, said)
        records.append(
            {
                "variant": variant.name,
                **held.sizes,
                "continuation": tokenizer.decode(said),
                "generated_tokens": len(said),
                **scores,
            }
        )
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
    scorer = library("rouge_score.rouge_scorer").RougeScorer(["rougeL"], tokenizer=_Words())
    return 1.0 if said == reference else scorer.score(reference, said)["rougeL"].fmeasure


class _Words:
    """rouge-score's own words are those of ASCII letters and digits; these are the same in any alphabet."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())

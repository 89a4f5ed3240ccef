"""Similarity of greedy continuations to those with the untouched cache."""

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
from mlxkv.evaluate.evaluation import EvalSample, Evaluation, Record, evaluations, option
from mlxkv.evaluate.optional import import_optional
from mlxkv.evaluate.variants import Variant, generate_answer, iter_variants


@dataclass(frozen=True)
class TextOptions(Config):
    """Options of `mlxkv eval text`."""

    text_file: Path | None = option(None, texts.UNSEEN_TEXT_FILE)
    context_tokens: int = option(256, "tokens of the prompt, an excerpt of the text", least=2)
    max_tokens: int = option(128, "most tokens to generate", least=1)
    samples: int = option(5, texts.EXCERPTS, least=1)


@evaluations.register("text")
class Text(Evaluation):
    """Measure how similar greedy continuations are to those with the untouched cache.

    - bleu: BLEU of a sentence, by sacrebleu
    - rouge_l: F1 of ROUGE-L, by rouge-score
    - equal_leading_tokens: share of tokens before the first difference
    - exact: share of continuations that are equal to the end

    Notes
    -----
    BLEU and ROUGE-L need alphabets that put spaces between words; the other two hold for any text.
    """

    options_class = TextOptions
    scores = ("bleu", "rouge_l", "equal_leading_tokens", "exact")
    options: TextOptions

    def samples(self, tokenizer: Any, seed: int) -> list[EvalSample]:
        """Return one sample for each excerpt of the text."""
        options = self.options
        compare(tokenizer, [], [])  # a missing package should be found out before the model works
        return texts.text_samples(
            tokenizer, options.text_file, options.context_tokens, options.samples, seed,
            partial(continue_text, options.max_tokens),
        )  # fmt: skip


def continue_text(
    max_tokens: int, tokens: Sequence[int], model: Any, tokenizer: Any, variants: Sequence[Variant]
) -> list[Record]:
    """Continue a text from the cache of every variant.

    Parameters
    ----------
    max_tokens
        The most tokens to generate.
    tokens
        The text, 2 tokens or more: all but the last are in the cache, and the last is what the model is given.
    model, tokenizer
        As `mlxkv.lm.load` returns them.
    variants
        The variants; the first one's continuation is the reference.

    Returns
    -------
    list of dict
        For each variant its name, sizes, `continuation`, `generated_tokens`, and what `compare` returns.
    """
    records: list[Record] = []
    reference: list[int] | None = None
    for variant, cached in iter_variants(model, variants, tokens[:-1]):
        continuation = generate_answer(model, tokenizer, cached, tokens[-1:], max_tokens)
        reference = continuation if reference is None else reference
        scores = compare(tokenizer, reference, continuation)
        records.append(
            {
                "variant": variant.name,
                **cached.sizes,
                "continuation": tokenizer.decode(continuation),
                "generated_tokens": len(continuation),
                **scores,
            }
        )
    return records


def compare(tokenizer: Any, reference: Sequence[int], continuation: Sequence[int]) -> dict[str, Any]:
    """Compare two continuations.

    Parameters
    ----------
    tokenizer
        The model's.
    reference, continuation
        Generated tokens.

    Returns
    -------
    dict
        From 0 to 1: `bleu` and `rouge_l` of the texts, and `equal_leading_tokens`, the share of the longer one's tokens
        that are equal from the start to the first difference; and `exact`, whether all are.
    """
    texts = tokenizer.decode(list(continuation)), tokenizer.decode(list(reference))
    exact = list(continuation) == list(reference)
    equal = sum(takewhile(bool, (a == b for a, b in zip(continuation, reference))))
    return {
        "bleu": bleu(*texts),
        "rouge_l": rouge_l(*texts),
        "equal_leading_tokens": 1.0 if exact else equal / max(len(continuation), len(reference)),
        "exact": exact,
    }


def bleu(text: str, reference: str) -> float:
    """Return sacrebleu's BLEU of one sentence.

    Parameters
    ----------
    text, reference
        Two texts.

    Returns
    -------
    float
        0 to 1; 1 for equal texts, also for empty ones.
    """
    score = import_optional("sacrebleu").sentence_bleu(text, [reference]).score / 100
    return 1.0 if text == reference else score


def rouge_l(text: str, reference: str) -> float:
    """Return the F1 score of rouge-score's ROUGE-L, without stemming.

    Parameters
    ----------
    text, reference
        Two texts; words are sequences of letters and digits of any alphabet.

    Returns
    -------
    float
        0 to 1; 1 for equal texts, also for those without words.
    """
    scorer = import_optional("rouge_score.rouge_scorer").RougeScorer(["rougeL"], tokenizer=_Words())
    return 1.0 if text == reference else scorer.score(reference, text)["rougeL"].fmeasure


class _Words:
    """Tokenizer for rouge-score, whose own one knows only ASCII letters and digits."""

    def tokenize(self, text: str) -> list[str]:
        """Split a text into words of any alphabet."""
        return re.findall(r"[^\W_]+", text.lower())

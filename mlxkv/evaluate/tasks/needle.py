"""Needle in a haystack: a pass key hidden in an essay, at several lengths and depths, asked for after the essay is held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import mlx.core as mx

from mlxkv import lm
from mlxkv.config import Config
from mlxkv.errors import InputError
from mlxkv.evaluate.evaluation import EvalSample, Evaluation, evaluations, option
from mlxkv.evaluate.sources import Sources
from mlxkv.evaluate.variants import Variant, iter_variants, split_tokens

DIGITS = 5
NEEDLE = "\n\nThe pass key is {}. Remember it.\n\n"
WORD = "a"  # what comes before a needle and a question is encoded as after a word
QUESTION = "\n\nWhat is the pass key? The pass key is "


@dataclass(frozen=True)
class NeedleOptions(Config):
    lengths: tuple[int, ...] = option((256, 512, 1024), "tokens of essay and needle together", least=1)
    depths: tuple[float, ...] = option((0.1, 0.3, 0.5, 0.7, 0.9), "where the needle is, from 0, the start, to 1")
    essays: Path | None = option(
        None, "text file, folder of .txt files or RULER's JSON; if not given, a built-in essay"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise InputError(f"depths must lie in 0..1: {list(self.depths)}")


@evaluations.register("needle")
class Needle(Evaluation):
    """Needle in a haystack: a pass key hidden in an essay, at several lengths and depths, asked for after the essay is held.

    After github.com/gkamradt/LLMTest_NeedleInAHaystack, with digits for a sentence and no judging model: the key is fed
    digit by digit, so a record says how many digits the model puts first, and how probable they are to it. That tells
    methods apart even on models too small to answer freely.
    """

    options_class = NeedleOptions
    scores = ("found", "digits_first", "log_probability")
    options: NeedleOptions

    def samples(self, tokenizer: Any, seed: int) -> list[EvalSample]:
        """One for each length and depth; the key follows from them and the seed.

        Raises InputError for a length without room for the needle.
        """
        sources = Sources(essays=self.options.essays)
        drawn = []
        for length in self.options.lengths:
            for depth in self.options.depths:
                key = drawn_key(length, depth, seed)
                facts = {"length": length, "depth": depth, "key": key, "text": sources.name("essays"), "seed": seed}
                drawn.append(
                    EvalSample(facts, partial(_measure, haystack(tokenizer, sources, length, depth, key), key))
                )
        return drawn


def _measure(
    context: Sequence[int], key: str, model: Any, tokenizer: Any, variants: Sequence[Variant]
) -> list[dict[str, Any]]:
    records = []
    for variant, held in iter_variants(model, variants, context):
        ranked = digits(model, tokenizer, held.cache, key)
        records.append({"variant": variant.name, **held.sizes, "found": ranked["digits_first"] == 1, **ranked})
    return records


def drawn_key(length: int, depth: float, seed: int) -> str:
    """The key hidden in so many tokens at this depth."""
    return "".join(Random(f"{seed} {length} {float(depth)}").choices("123456789", k=DIGITS))


def haystack(tokenizer: Any, sources: Sources, length: int, depth: float, key: str) -> list[int]:
    """`length` tokens of the essays with the needle in them."""
    _, needle = split_tokens(tokenizer, WORD, NEEDLE.format(key))
    room = length - len(needle)
    if room < 1:
        raise InputError(f"a length of {length} tokens has no room for a needle of {len(needle)}")
    hay: list[int] = []
    words = 0
    while len(hay) < room:
        words += room
        hay = tokenizer.encode(" ".join(sources.essay_words(words)))
    first = len(tokenizer.encode(WORD)) - len(tokenizer.encode(WORD, add_special_tokens=False))
    place = max(first, round(depth * room))  # not before the tokenizer's own first token
    return [*hay[:place], *needle, *hay[place:room]]


def digits(model: Any, tokenizer: Any, cache: list[Any], key: str) -> dict[str, float]:
    """The share of the key's tokens that the model puts first after the question, given those before, and the mean of
    their log-probabilities."""
    _, question = split_tokens(tokenizer, WORD, QUESTION)
    _, asked = split_tokens(tokenizer, WORD, QUESTION + key)
    answer = len(asked) - len(question)
    if asked[: len(question)] != question:
        raise InputError("this tokenizer joins the question with the key's first digit, so the key cannot be scored")
    logits = [lm.prefill(model, asked[:-answer], cache)]
    for token in asked[-answer:-1]:
        logits.append(model(mx.array([[token]]), cache=cache)[0, -1])
        mx.eval(logits[-1], [entry.state for entry in cache])
    scores = mx.stack(logits).astype(mx.float32)
    right = mx.array(asked[-answer:])[:, None]
    chances = mx.take_along_axis(scores - mx.logsumexp(scores, axis=-1, keepdims=True), right, axis=-1)
    return {
        "digits_first": float((mx.argmax(scores, axis=-1) == right[:, 0]).mean()),
        "log_probability": float(chances.mean()),
    }

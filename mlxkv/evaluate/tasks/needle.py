"""Needle in a haystack: retrieval of a pass key that is hidden in an essay."""

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
from mlxkv.evaluate.evaluation import EvalSample, Evaluation, Record, evaluations, option
from mlxkv.evaluate.sources import ESSAYS, Sources
from mlxkv.evaluate.variants import Variant, iter_variants, split_tokens

DIGITS = 5
NEEDLE = "\n\nThe pass key is {}. Remember it.\n\n"
WORD = "a"  # needles and questions are tokenized as after a word
QUESTION = "\n\nWhat is the pass key? The pass key is "


@dataclass(frozen=True)
class NeedleOptions(Config):
    """Options of `mlxkv eval needle`."""

    lengths: tuple[int, ...] = option((256, 512, 1024), "tokens of essay and needle", least=1)
    depths: tuple[float, ...] = option((0.1, 0.3, 0.5, 0.7, 0.9), "places of the needle, from 0 to 1")
    essays: Path | None = option(None, ESSAYS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise InputError(f"depths must lie in 0..1: {list(self.depths)}")


@evaluations.register("needle")
class Needle(Evaluation):
    """Measure whether the model finds a pass key in an essay (needle in a haystack), at several lengths and depths.

    - found: share of keys of which every digit is the most probable one
    - digits_first: share of digits that are the most probable ones
    - log_probability: mean log-probability of a digit, in nats

    Notes
    -----
    After github.com/gkamradt/LLMTest_NeedleInAHaystack, with digits in place of a sentence and without a model that
    judges answers: the model is given the key digit by digit, and its predictions are scored. That tells methods apart
    even on models that are too small to answer freely.
    """

    options_class = NeedleOptions
    scores = ("found", "digits_first", "log_probability")
    options: NeedleOptions

    def samples(self, tokenizer: Any, seed: int) -> list[EvalSample]:
        """Return one sample for each length and depth; the key depends on them and on the seed."""
        sources = Sources(essays=self.options.essays)
        drawn = []
        for length in self.options.lengths:
            for depth in self.options.depths:
                key = draw_key(length, depth, seed)
                facts = {"length": length, "depth": depth, "key": key, "text": sources.name("essays"), "seed": seed}
                drawn.append(
                    EvalSample(facts, partial(_measure, build_haystack(tokenizer, sources, length, depth, key), key))
                )
        return drawn


def _measure(context: Sequence[int], key: str, model: Any, tokenizer: Any, variants: Sequence[Variant]) -> list[Record]:
    """Return a record for each variant."""
    records = []
    for variant, cached in iter_variants(model, variants, context):
        found = score_digits(model, tokenizer, cached.cache, key)
        records.append({"variant": variant.name, **cached.sizes, "found": found["digits_first"] == 1, **found})
    return records


def draw_key(length: int, depth: float, seed: int) -> str:
    """Draw the key of a sample.

    Parameters
    ----------
    length
        Tokens of essay and needle.
    depth
        Position of the needle, 0 to 1.
    seed
        The sample's.

    Returns
    -------
    str
        Five digits from 1 to 9.

    Examples
    --------
    >>> draw_key(1024, 0.5, seed=0) == draw_key(1024, 0.5, seed=0) != draw_key(1024, 0.5, seed=1)
    True
    """
    return "".join(Random(f"{seed} {length} {float(depth)}").choices("123456789", k=DIGITS))


def build_haystack(tokenizer: Any, sources: Sources, length: int, depth: float, key: str) -> list[int]:
    """Hide a key in essays.

    Parameters
    ----------
    tokenizer
        The model's.
    sources
        Has the essays, which are repeated where they are too short.
    length
        Tokens to return.
    depth
        Position of the needle, 0 to 1.
    key
        The key.

    Returns
    -------
    list of int
        `length` tokens.

    Raises
    ------
    InputError
        For a length without room for the needle.
    """
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


def score_digits(model: Any, tokenizer: Any, cache: list[Any], key: str) -> dict[str, float]:
    """Score the model's predictions of a key after the question for it.

    Parameters
    ----------
    model, tokenizer
        As `mlxkv.lm.load` returns them.
    cache
        A prompt cache of the haystack; the question and the key are in it afterwards.
    key
        The key.

    Returns
    -------
    dict
        `digits_first`, the share of the key's tokens that are the most probable ones after those before them, 0 to 1;
        and `log_probability`, the mean of their log-probabilities, in nats.

    Raises
    ------
    InputError
        For a tokenizer that joins the question with the key's first digit.
    """
    _, question = split_tokens(tokenizer, WORD, QUESTION)
    _, asked = split_tokens(tokenizer, WORD, QUESTION + key)
    count = len(asked) - len(question)
    if asked[: len(question)] != question:
        raise InputError("this tokenizer joins the question with the key's first digit, so the key cannot be scored")
    logits = [lm.prefill(model, asked[:-count], cache)]
    for token in asked[-count:-1]:
        logits.append(model(mx.array([[token]]), cache=cache)[0, -1])
        mx.eval(logits[-1], [entry.state for entry in cache])
    scores = mx.stack(logits).astype(mx.float32)
    right = mx.array(asked[-count:])[:, None]
    log_probabilities = mx.take_along_axis(scores - mx.logsumexp(scores, axis=-1, keepdims=True), right, axis=-1)
    return {
        "digits_first": float((mx.argmax(scores, axis=-1) == right[:, 0]).mean()),
        "log_probability": float(log_probabilities.mean()),
    }

"""Needle in a haystack: a pass key hidden in an essay, at several lengths and depths, asked for after the essay is held.

After github.com/gkamradt/LLMTest_NeedleInAHaystack, with digits for a sentence and no judging model: the key is fed
digit by digit, so a record says how many digits the model puts first, and how probable they are to it. That tells
methods apart even on models too small to answer freely.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import mlx.core as mx

from mlxkv import lm
from mlxkv.errors import InputError
from mlxkv.evaluate.ruler.sources import Sources
from mlxkv.evaluate.variants import Variant, beside_whole

DIGITS = 5
NEEDLE = "\n\nThe pass key is {}. Remember it.\n\n"
QUESTION = "\n\nWhat is the pass key? The pass key is "


def evaluate(
    model: Any, tokenizer: Any, variants: Sequence[Variant], lengths: Sequence[int], depths: Sequence[float], *,
    seed: int = 0, sources: Sources | None = None, progress: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """A record for each length, depth and variant, the untouched cache `variants.whole()` first.

    lengths: tokens of essay and needle together. depths: from 0, where the needle comes first, to 1. The key follows from
    seed, length and depth. found: whether every digit came first. progress is called with 1 after each answer.
    Raises InputError for a depth outside 0 to 1, or a length without room for the needle.
    """
    if not all(0 <= depth <= 1 for depth in depths):
        raise InputError(f"depths must lie in 0..1: {list(depths)}")
    sources = sources or Sources()
    records = []
    for length in lengths:
        for depth in depths:
            key = "".join(Random(f"{seed} {length} {depth}").choices("123456789", k=DIGITS))
            context = haystack(tokenizer, sources, length, depth, key)
            for variant in beside_whole(variants):
                ranked = digits(model, tokenizer, variant.hold(model, context), key)
                records.append(
                    {
                        "length": length,
                        "depth": depth,
                        "variant": variant.name,
                        "key": key,
                        "found": ranked["digits_first"] == 1,
                        **ranked,
                        "text": sources.name("essays"),
                        "seed": seed,
                    }
                )
                if progress:
                    progress(1)
    return records


def haystack(tokenizer: Any, sources: Sources, length: int, depth: float, key: str) -> list[int]:
    """`length` tokens of the essays with the needle in them."""
    needle = tokenizer.encode(NEEDLE.format(key), add_special_tokens=False)
    room = length - len(needle)
    if room < 1:
        raise InputError(f"a length of {length} tokens has no room for a needle of {len(needle)}")
    hay: list[int] = []
    words = 0
    while len(hay) < room:
        words += room
        hay = tokenizer.encode(" ".join(sources.essay_words(words)))
    place = round(depth * room)
    return [*hay[:place], *needle, *hay[place:room]]


def digits(model: Any, tokenizer: Any, cache: list[Any], key: str) -> dict[str, float]:
    """The share of the key's tokens that the model puts first after the question, given those before, and the mean of
    their log-probabilities."""
    question = tokenizer.encode(QUESTION, add_special_tokens=False)
    asked = tokenizer.encode(QUESTION + key, add_special_tokens=False)
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

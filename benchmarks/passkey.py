"""A five-digit pass key hidden in prose, asked for after the cache has been made small."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks import texts
from benchmarks.live_runs import Variants, prefilled

KEYS = {0.1: "48213", 0.3: "90657", 0.5: "31846", 0.7: "75092", 0.9: "26479"}  # by depth
NEEDLE = "\n\nThe pass key is {}. Remember it.\n\n"
QUESTION = "\n\nWhat is the pass key? The pass key is "


def prompts(tokenizer: Any, context: int) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """Contexts `[B, context]` of one essay with a key at each depth, question and key `[B, n]`, and what stands where."""
    filler = tokenizer.encode(texts.written("letter_history"))
    contexts, questions, places = [], [], []
    for depth, key in KEYS.items():
        needle = tokenizer.encode(NEEDLE.format(key))
        room = context - len(needle)
        start = round(depth * room)
        contexts.append([*filler[:start], *needle, *filler[start:room]])
        questions.append(tokenizer.encode(QUESTION + key))
        places.append({"key": key, "depth": depth})
    return np.array(contexts), np.array(questions), places


def retrieved(model: Any, tokenizer: Any, context: int, variants: Variants) -> list[dict[str, Any]]:
    """Of every variant and key: how many digits the model puts first given those before, and their mean log-probability."""
    contexts, questions, places = prompts(tokenizer, context)
    digits = len(places[0]["key"])
    asked = mx.array(questions)
    records = []
    for name, cache in prefilled(model, mx.array(contexts), variants).items():
        logits = model(asked[:, :-1], cache=cache)[:, -digits:].astype(mx.float32)
        right = asked[:, -digits:]
        first = (mx.argmax(logits, axis=-1) == right).sum(axis=-1)
        chances = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        chance = mx.take_along_axis(chances, right[..., None], axis=-1).mean(axis=(-2, -1))
        for i, place in enumerate(places):
            records.append(
                {"variant": name, **place, "digits_first": first[i].item(), "log_probability": chance[i].item()}
            )
    return records

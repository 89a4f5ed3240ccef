"""Stretches of a text to hold and to go on with: the user's file, or an essay that was written for the project."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from mlxkv.errors import InputError
from mlxkv.evaluate.evaluation import EvalSample, Record
from mlxkv.evaluate.sources import Sources, read_text

BUILT_IN = Path(__file__).parent / "data" / "essay.txt"
TEXT_FILE = "UTF-8 text, one that calibration has not seen; if not given, an essay written for this project"


def draw_stretches(tokenizer: Any, text_file: Path | None, length: int, count: int, seed: int) -> dict[int, list[int]]:
    """`count` stretches of `length` tokens by where they start, drawn by seed, one in each of `count` parts of the text.

    Fewer where the text has no room for so many. Raises InputError when it is shorter than one stretch.
    """
    tokens = tokenizer.encode(read_text(text_file or BUILT_IN))
    room = len(tokens) - length
    if room < 0:
        name = "the built-in text" if text_file is None else text_file.name
        raise InputError(f"{name} has {len(tokens)} tokens and {length} are needed; give a longer text file")
    random = Random(f"{seed} {length}")
    starts = [random.randint(room * i // count, room * (i + 1) // count) for i in range(count)]
    return {start: tokens[start : start + length] for start in starts}


def text_samples(
    tokenizer: Any, options: Any, length: int, seed: int, measure: Callable[..., list[Record]]
) -> list[EvalSample]:
    """`options.samples` stretches of `options.text_file` as samples; `measure` is also given the tokens, first.

    Raises InputError for a text that is too short.
    """
    stretches = draw_stretches(tokenizer, options.text_file, length, options.samples, seed)
    text = text_name(options.text_file)
    return [
        EvalSample({"text": text, "start": start, "seed": seed}, partial(measure, tokens))
        for start, tokens in stretches.items()
    ]


def repeated_tokens(tokenizer: Any, text_file: Path | None, count: int, seed: int = 0) -> list[int]:
    """`count` tokens of a text, begun again where it ends; each seed's from another place."""
    read = Sources(essays=text_file).essay_words((seed + 1) * count)
    tokens: list[int] = tokenizer.encode(" ".join(read[-count:]))
    return tokens[:count]  # a word has one token or more


def text_name(text_file: Path | None) -> str:
    """What a record says about where its text comes from."""
    return text_file.name if text_file else "built-in"

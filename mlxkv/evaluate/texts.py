"""Excerpts of a text as samples: of the user's file, or of an essay written for the project."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from mlxkv.errors import InputError
from mlxkv.evaluate.evaluation import EvalSample, Record
from mlxkv.evaluate.sources import Sources
from mlxkv.io.inputs import read_text
from mlxkv.lm import text_start

BUILT_IN = Path(__file__).parent / "data" / "essay.txt"
# Help of options that evaluations share.
TEXT_FILE = "text to read, in place of an essay"
UNSEEN_TEXT_FILE = "text that calibration has not seen"
EXCERPTS = "excerpts of the text for each seed"


def draw_excerpts(tokenizer: Any, text_file: Path | None, length: int, count: int, seed: int) -> dict[int, list[int]]:
    """Draw excerpts of a text at random, one from each of `count` equal parts of it.

    Parameters
    ----------
    tokenizer
        The model's.
    text_file
        UTF-8 text; None for the built-in essay.
    length
        Tokens of each excerpt.
    count
        Number of excerpts.
    seed
        Decides, with `length`, where excerpts start.

    Returns
    -------
    dict of int to list of int
        Tokens of each excerpt by its position in the text; fewer than `count` where the text has no room for so many.
        Each begins with the tokens that the tokenizer puts before every text, which count as tokens of the excerpt.

    Raises
    ------
    InputError
        When the text is shorter than one excerpt.
    """
    tokens, first = tokenizer.encode(read_text(text_file or BUILT_IN)), text_start(tokenizer)
    room = len(tokens) - length
    if room < 0:
        name = "the built-in text" if text_file is None else text_file.name
        raise InputError(f"{name} has {len(tokens)} tokens and {length} are needed; give a longer text file")
    random = Random(f"{seed} {length}")
    starts = [random.randint(room * i // count, room * (i + 1) // count) for i in range(count)]
    return {start: [*first, *tokens[start + len(first) : start + length]][:length] for start in starts}


def text_samples(
    tokenizer: Any, text_file: Path | None, length: int, count: int, seed: int, measure: Callable[..., list[Record]]
) -> list[EvalSample]:
    """Make samples of excerpts of a text.

    Parameters
    ----------
    tokenizer, text_file, length, count, seed
        As in `draw_excerpts`, which raises InputError for a text that is too short.
    measure
        As in `EvalSample`, but with the tokens of the excerpt as its first argument.

    Returns
    -------
    list of EvalSample
        One for each excerpt.
    """
    text = text_name(text_file)
    return [
        EvalSample({"text": text, "start": start, "seed": seed}, partial(measure, tokens))
        for start, tokens in draw_excerpts(tokenizer, text_file, length, count, seed).items()
    ]


def repeated_tokens(tokenizer: Any, text_file: Path | None, count: int, seed: int = 0) -> list[int]:
    """Return tokens of a text, which begins again where it ends.

    Parameters
    ----------
    tokenizer
        The model's.
    text_file
        UTF-8 text; None for the built-in essay.
    count
        Number of tokens.
    seed
        Selects the part of the text: each seed's begins where the one of the seed before ends.

    Returns
    -------
    list of int
        `count` tokens.
    """
    read = Sources(essays=text_file).essay_words((seed + 1) * count)
    tokens: list[int] = tokenizer.encode(" ".join(read[-count:]))
    return tokens[:count]  # a word has one token or more


def text_name(text_file: Path | None) -> str:
    """Return the name of a text in records.

    Parameters
    ----------
    text_file
        None for the built-in essay.

    Returns
    -------
    str
        The file's name, or "built-in".
    """
    return text_file.name if text_file else "built-in"

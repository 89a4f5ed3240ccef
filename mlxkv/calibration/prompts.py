"""Prompts that are tokens already, as stretches to learn from: what they share is taken once, and other texts fill up."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from mlxkv.calibration.texts import Stretch, Stretches, cut_tokens

OWN = "own prompts"  # kind of these stretches
LEAST_RUN = 64  # tokens of a prompt that are in no other one, in a row
_SHINGLE = 16  # tokens in a row that are the same somewhere else are not taken again
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_OWN_SHARE = 0.75  # of the tokens to learn from, at most: what is learnt has to serve other prompts as well
_HELD_OUT, _HELD_OUT_OTHER = 2, 2  # stretches of prompts, and of other texts


class Distinct(NamedTuple):
    """Parts of prompts that are in no other one.

    Attributes
    ----------
    runs
        Tokens that follow each other, at least 64, the newest prompts first.
    prompts
        Number of prompts that they are of.
    tokens
        Of all runs together.
    """

    runs: list[list[int]]
    prompts: int
    tokens: int


def distinct(
    prompts: Iterable[Sequence[int]], most: int, vocabulary: int, enough: Callable[[], bool] = lambda: False
) -> Distinct:
    """Take from prompts what is in none that came before: conversations and their branches share most of what they are.

    Parameters
    ----------
    prompts
        Tokens of each prompt, from any source.
    most
        Tokens after which no further prompt is read.
    vocabulary
        Prompts with other tokens than 0 to `vocabulary` - 1 are left out: models read beyond their weights for those.
    enough
        Asked before each prompt whether to stop.

    Returns
    -------
    Distinct
        The parts.
    """
    runs: list[list[int]] = []
    seen, total, count = np.zeros(0, np.uint64), 0, 0
    for prompt in prompts:
        if total >= most or enough():
            break
        tokens = np.array(prompt, dtype=np.int64)
        if tokens.ndim != 1 or len(tokens) < LEAST_RUN or tokens.min() < 0 or tokens.max() >= vocabulary:
            continue
        hashes = _hashes(tokens)
        found = _runs(_is_new(hashes, seen), tokens)
        seen = np.union1d(seen, hashes)
        runs += found
        total += sum(map(len, found))
        count += bool(found)
    return Distinct(runs, count, total)


def stretches_of(
    own: Distinct, start: Sequence[int], size: int, most: int, fill: Callable[[], Stretches] | None = None
) -> Stretches:
    """Cut prompts into stretches, and fill up with other texts.

    Parameters
    ----------
    own
        Parts of prompts.
    start
        Tokens that every text of the model begins with.
    size
        Most tokens of a stretch, 32 to 672.
    most
        Tokens to learn from, about.
    fill
        Returns stretches of other texts; None for none. A quarter of all tokens is theirs at least.

    Returns
    -------
    Stretches
        Prompts and other texts in turn, so that any first few of them are diverse.
    """
    begun = [run[len(start) :] if start and run[: len(start)] == list(start) else run for run in own.runs]
    cut = cut_tokens({OWN: begun}, start, size, _HELD_OUT)
    other = fill() if fill else Stretches([], [])
    trained = _first(cut.trained, int(most * _OWN_SHARE) if other.trained else most)
    rest = _first(other.trained, most - sum(len(stretch.tokens) for stretch in trained))
    return Stretches(_mixed(trained, rest), cut.held_out + other.held_out[:_HELD_OUT_OTHER])


def _hashes(tokens: np.ndarray) -> np.ndarray:
    """Return a hash of each 16 tokens that follow each other."""
    count = len(tokens) - _SHINGLE + 1
    total = np.zeros(count, np.uint64)
    for i in range(_SHINGLE):
        total = (total ^ tokens[i : i + count].astype(np.uint64)) * _FACTOR
        total ^= total >> np.uint64(29)
    return total


def _is_new(hashes: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Return which of them are neither among those seen nor earlier in the same text."""
    first = np.zeros(len(hashes), bool)
    first[np.unique(hashes, return_index=True)[1]] = True
    return first & ~np.isin(hashes, seen)


def _runs(new: np.ndarray, tokens: np.ndarray) -> list[list[int]]:
    """Return the runs of tokens that are in no 16 tokens seen before."""
    old = np.zeros(len(tokens), bool)
    for i in range(_SHINGLE):
        old[i : i + len(new)] |= ~new
    edges = np.flatnonzero(np.diff(np.r_[True, old, True].astype(np.int8)))
    return [tokens[a:b].tolist() for a, b in zip(edges[::2], edges[1::2]) if b - a >= LEAST_RUN]


def _first(stretches: Sequence[Stretch], most: int) -> list[Stretch]:
    """Return the first stretches, with as many tokens in all at most."""
    ends = itertools.accumulate(len(stretch.tokens) for stretch in stretches)
    return [stretch for stretch, end in zip(stretches, ends) if end <= most]


def _mixed(first: Sequence[Stretch], second: Sequence[Stretch]) -> list[Stretch]:
    """Return two lists as one in which both are spread evenly."""
    placed = [((i + 0.5) / len(part), stretch) for part in (first, second) for i, stretch in enumerate(part)]
    return [stretch for _, stretch in sorted(placed, key=lambda pair: pair[0])]

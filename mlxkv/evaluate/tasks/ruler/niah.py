"""Needles in a haystack: sentences that give a key a value, hidden in text, and questions about keys.

https://arxiv.org/abs/2404.06654, section 3.1. Quoted from RULER, since they define the task: the sentence of a needle,
the five sentences of noise, the instruction and the question. Departures:
- sentences of an essay end at a full stop, question or exclamation mark before white space, RULER's where NLTK says;
- keys are all different, and so are values, so that no distractor can be an answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random
from uuid import UUID

from mlxkv.evaluate.tasks.ruler import vocabulary
from mlxkv.evaluate.tasks.ruler.task import Draft, Request, RulerTask

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it."
    " I will quiz you about the {kind} afterwards.\n",
    "What is the special magic {kind} for {keys} mentioned in the provided text?"
    " The special magic {kind} for {keys} mentioned in the provided text is",
)
_MANY = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it."
    " I will quiz you about the {kind} afterwards.\n",
    "What are all the special magic {kind} for {keys} mentioned in the provided text?"
    " The special magic {kind} for {keys} mentioned in the provided text are",
)
_DEPTHS = [round(100 * i / 39) for i in range(40)]


@dataclass(frozen=True, kw_only=True)
class Needles(RulerTask):
    """haystack: "noise", "essay" or "needle" (other needles). key_kind, value_kind: "words", "numbers" or "uuids".

    keys: how many are hidden, each with `values` values. queries: how many of the keys are asked for.
    Size: paragraphs of noise, words of the essay, or other needles.
    """

    haystack: str
    key_kind: str = "words"
    value_kind: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1
    tokens: int = 128

    @property
    def smallest(self) -> int:
        return self.keys * self.values

    @property
    def asks(self) -> str:
        return self._template[1].partition(" {kind}")[0]

    @property
    def _template(self) -> tuple[str, str]:
        return _ONE if self.queries * self.values == 1 else _MANY

    def draft(self, request: Request, size: int) -> Draft:
        rng = request.random()
        hay = size if self.haystack == "needle" else 0
        keys = draw(rng, self.key_kind, self.keys + hay)
        values = draw(rng, self.value_kind, self.keys * self.values + hay)
        owners = [key for key in keys[: self.keys] for _ in range(self.values)] + keys[self.keys :]
        sentences = [NEEDLE.format(kind=self.value_kind, key=k, value=v) for k, v in zip(owners, values)]
        needles, distractors = sentences[: self.smallest], sentences[self.smallest :]
        rng.shuffle(needles)
        if self.haystack == "essay":
            text = in_essay(rng, request.sources.essay_words(size), needles)
        else:
            text = "\n".join(among(rng, distractors or [NOISE] * size, needles))
        asked = rng.sample(range(self.keys), self.queries)
        kind = self.value_kind if self.queries * self.values > 1 else self.value_kind.removesuffix("s")
        before, question = self._template
        return Draft(
            before.format(kind=kind) + text + "\n",
            question.format(kind=kind, keys=listed([keys[i] for i in asked])),
            tuple(values[i * self.values + j] for i in asked for j in range(self.values)),
        )


def draw(rng: Random, kind: str, count: int) -> list[str]:
    """`count` different words, 7-digit numbers or UUIDs of version 4."""
    if kind == "words":
        return vocabulary.keys(rng, count)
    if kind == "numbers":
        return [str(number) for number in rng.sample(range(10**6, 10**7), count)]
    return [str(UUID(int=rng.getrandbits(128), version=4)) for _ in range(count)]


def in_essay(rng: Random, words: list[str], needles: list[str]) -> str:
    """The words, with needles between sentences at different ones of 40 evenly spaced depths, in the order given."""
    sentences = re.split(r"(?<=[.!?]) ", " ".join(words))
    places = sorted(len(sentences) * depth // 100 for depth in rng.sample(_DEPTHS, len(needles)))
    for place, needle in zip(reversed(places), reversed(needles)):
        sentences.insert(place, needle)
    return " ".join(sentences)


def among(rng: Random, hay: list[str], needles: list[str]) -> list[str]:
    """The hay with needles before different ones of its lines, at random, in the order given."""
    lines = list(hay)
    places = sorted(rng.sample(range(len(hay)), len(needles)))
    for place, needle in zip(reversed(places), reversed(needles)):
        lines.insert(place, needle)
    return lines


def listed(keys: list[str]) -> str:
    """The keys of a question: "a", or "a, b, and c" in RULER's way."""
    return keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + ", and " + keys[-1]

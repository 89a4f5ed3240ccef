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
class NeedleInHaystack(RulerTask):
    """Sentences with keys and their values in a haystack, and a question for the values of some keys.

    Parameters
    ----------
    haystack
        "noise" (sizes count paragraphs), "essay" (words), or "needle" (other needles).
    key_kind, value_kind
        "words", "numbers" or "uuids".
    keys
        Number of hidden keys.
    values
        Number of values of each key.
    queries
        Number of keys that the question asks for.
    max_tokens, source
        As in `RulerTask`.
    """

    haystack: str
    key_kind: str = "words"
    value_kind: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1
    max_tokens: int = 128

    @property
    def min_size(self) -> int:
        """Number of needles."""
        return self.keys * self.values

    @property
    def question_start(self) -> str:
        """The question up to the kind of value."""
        return self._template[1].partition(" {kind}")[0]

    @property
    def _template(self) -> tuple[str, str]:
        """Instruction and question, for one value or for several."""
        return _ONE if self.queries * self.values == 1 else _MANY

    def draft(self, request: Request, size: int) -> Draft:
        """Hide the needles in a haystack of some size."""
        rng = request.random()
        hay = size if self.haystack == "needle" else 0
        keys = draw_values(rng, self.key_kind, self.keys + hay)
        values = draw_values(rng, self.value_kind, self.keys * self.values + hay)
        owners = [key for key in keys[: self.keys] for _ in range(self.values)] + keys[self.keys :]
        sentences = [NEEDLE.format(kind=self.value_kind, key=k, value=v) for k, v in zip(owners, values)]
        needles, distractors = sentences[: self.min_size], sentences[self.min_size :]
        rng.shuffle(needles)
        if self.haystack == "essay":
            text = insert_between_sentences(rng, request.sources.essay_words(size), needles)
        else:
            text = "\n".join(insert_between_lines(rng, distractors or [NOISE] * size, needles))
        asked = rng.sample(range(self.keys), self.queries)
        kind = self.value_kind if self.queries * self.values > 1 else self.value_kind.removesuffix("s")
        before, question = self._template
        return Draft(
            before.format(kind=kind) + text + "\n",
            question.format(kind=kind, keys=join_keys([keys[i] for i in asked])),
            tuple(values[i * self.values + j] for i in asked for j in range(self.values)),
        )


def draw_values(rng: Random, kind: str, count: int) -> list[str]:
    """Draw keys or values.

    Parameters
    ----------
    rng
        Random numbers.
    kind
        "words", "numbers" (of 7 digits) or "uuids" (of version 4).
    count
        Number of values.

    Returns
    -------
    list of str
        `count` different ones.
    """
    if kind == "words":
        return vocabulary.draw_keys(rng, count)
    if kind == "numbers":
        return [str(number) for number in rng.sample(range(10**6, 10**7), count)]
    return [str(UUID(int=rng.getrandbits(128), version=4)) for _ in range(count)]


def insert_between_sentences(rng: Random, words: list[str], needles: list[str]) -> str:
    """Insert needles between the sentences of an essay, at different ones of 40 evenly spaced depths.

    Parameters
    ----------
    rng
        Random numbers.
    words
        Words of the essay.
    needles
        Up to 40 sentences; they keep their order.

    Returns
    -------
    str
        The text.
    """
    sentences = re.split(r"(?<=[.!?]) ", " ".join(words))
    places = sorted(len(sentences) * depth // 100 for depth in rng.sample(_DEPTHS, len(needles)))
    for place, needle in zip(reversed(places), reversed(needles)):
        sentences.insert(place, needle)
    return " ".join(sentences)


def insert_between_lines(rng: Random, hay: list[str], needles: list[str]) -> list[str]:
    """Insert needles before different ones of the lines of a haystack, at random.

    Parameters
    ----------
    rng
        Random numbers.
    hay
        Lines, as many as needles or more.
    needles
        Lines to insert; they keep their order.

    Returns
    -------
    list of str
        All lines.
    """
    lines = list(hay)
    places = sorted(rng.sample(range(len(hay)), len(needles)))
    for place, needle in zip(reversed(places), reversed(needles)):
        lines.insert(place, needle)
    return lines


def join_keys(keys: list[str]) -> str:
    """Join the keys of a question as RULER does.

    Parameters
    ----------
    keys
        1 or more.

    Returns
    -------
    str
        The keys with commas, and "and" before the last.

    Examples
    --------
    >>> join_keys(["a", "b", "c"]), join_keys(["a", "b"]), join_keys(["a"])
    ('a, b, and c', 'a, and b', 'a')
    """
    return keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + ", and " + keys[-1]

"""What every RULER task is: a text of any size, a question about it, and the strings that a good answer holds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from mlxkv.evaluate.sources import Sources


@dataclass(frozen=True)
class Request:
    """Which sample is wanted. task: its name. length: in tokens, what is generated included. sources: essays and questions."""

    task: str
    length: int
    seed: int
    index: int
    sources: Sources

    def random(self) -> Random:
        """The sample's own random numbers, from the start: the same at every size that is tried."""
        return Random(f"{self.task} {self.seed} {self.index}")


@dataclass(frozen=True)
class Draft:
    """A sample of some size. question: what comes after the context, up to where the model goes on."""

    context: str
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class RulerTask(ABC):
    """tokens: to generate. reads: the field of `Sources` that the text is made of, if any."""

    tokens: int
    reads: str | None = None

    @property
    def smallest(self) -> int:
        """The smallest size that `draft` takes."""
        return 1

    @property
    @abstractmethod
    def asks(self) -> str:
        """How the question begins; its last occurrence in an input is where the context ends."""

    @abstractmethod
    def draft(self, request: Request, size: int) -> Draft:
        """A sample with `size` pieces of haystack. Raises InputError when the length is too short for the task."""

    def score(self, said: str, answers: Sequence[str]) -> float:
        """From 0 to 1: all answers count alike, unless the task says otherwise."""
        return all_parts(said, answers)


def all_parts(said: str, answers: Sequence[str]) -> float:
    """RULER's string_match_all of one sample: the fraction of the answers that are in what was said, in any case."""
    return sum(answer.lower() in said.lower() for answer in answers) / len(answers)


def any_part(said: str, answers: Sequence[str]) -> float:
    """RULER's string_match_part of one sample: 1 when any of the answers is in what was said, in any case."""
    return float(any(answer.lower() in said.lower() for answer in answers))

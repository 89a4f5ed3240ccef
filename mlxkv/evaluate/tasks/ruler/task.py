"""Base of all RULER tasks: a text of any size, a question about it, and the strings that a good answer contains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from mlxkv.evaluate.sources import Sources


@dataclass(frozen=True)
class Request:
    """Description of the sample to make.

    Parameters
    ----------
    task
        Name of the task.
    length
        The most tokens of context, question and answer together.
    seed
        The sample's seed.
    index
        Its number among those of one seed, 0 or more.
    sources
        Essays and questions.
    """

    task: str
    length: int
    seed: int
    index: int
    sources: Sources

    def random(self) -> Random:
        """Return the sample's random numbers from their start, the same at every size that is tried.

        Returns
        -------
        random.Random
            Seeded by task, seed and index.
        """
        return Random(f"{self.task} {self.seed} {self.index}")


@dataclass(frozen=True)
class Draft:
    """A sample of some size, not yet tokenized.

    Parameters
    ----------
    context
        The text before the question.
    question
        The question, up to where the model goes on.
    answers
        Strings that a good answer contains, 1 or more.
    """

    context: str
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class RulerTask(ABC):
    """One task with its published settings.

    Parameters
    ----------
    max_tokens
        Tokens to generate.
    source
        Field of `Sources` that the text is made of; None for a text that is all generated.
    """

    max_tokens: int
    source: str | None = None

    @property
    def min_size(self) -> int:
        """The smallest size that `draft` takes."""
        return 1

    @property
    @abstractmethod
    def question_start(self) -> str:
        """The first words of the question; where they come last in an input, the context ends."""

    @abstractmethod
    def draft(self, request: Request, size: int) -> Draft:
        """Make a sample of some size.

        Parameters
        ----------
        request
            The sample to make.
        size
            Pieces of haystack, `min_size` or more; each task says of what.

        Returns
        -------
        Draft
            The sample.

        Raises
        ------
        InputError
            When the length of the request is too short for the task.
        """

    def score(self, answer: str, answers: Sequence[str]) -> float:
        """Score an answer; all right answers have the same weight, unless the task says otherwise.

        Parameters
        ----------
        answer
            Text that the model generated.
        answers
            Strings that a good answer contains, 1 or more.

        Returns
        -------
        float
            0 to 1.
        """
        return string_match_all(answer, answers)


def string_match_all(answer: str, answers: Sequence[str]) -> float:
    """Return the share of the right answers that an answer contains, in any case of letters.

    Parameters
    ----------
    answer
        Text that the model generated.
    answers
        Right answers, 1 or more.

    Returns
    -------
    float
        0 to 1; RULER's metric of that name, for one sample.

    Examples
    --------
    >>> string_match_all("They are 12 and ABC.", ["12", "abc", "34", "5"])
    0.5
    """
    return sum(expected.lower() in answer.lower() for expected in answers) / len(answers)


def string_match_part(answer: str, answers: Sequence[str]) -> float:
    """Return 1 when an answer contains one of the right answers or more, in any case of letters, else 0.

    Parameters
    ----------
    answer
        Text that the model generated.
    answers
        Right answers, 1 or more.

    Returns
    -------
    float
        0 or 1; RULER's metric of that name, for one sample.

    Examples
    --------
    >>> string_match_part("It was PARIS, I think", ["the city of Paris", "Paris"])
    1.0
    """
    return float(any(expected.lower() in answer.lower() for expected in answers))

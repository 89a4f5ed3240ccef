"""Essays and questions on disk: the user's files, or a little text that was written for the project.

Everything that is read is treated as hostile: bounded sizes, typed errors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from mlxkv.errors import FormatError, InputError
from mlxkv.io.inputs import read_text

_BUILT_IN = {"essays": "essay.txt", "squad": "squad.json", "hotpotqa": "hotpotqa.json"}
ESSAYS = "text, folder of .txt files or RULER's JSON, in place of an essay"  # help of options
_SHAPE_ERRORS = (AttributeError, KeyError, TypeError, ValueError)


@dataclass(frozen=True)
class Question:
    """One question about documents, which are given by their indices in a list.

    Parameters
    ----------
    query
        The question.
    answers
        Strings that all mean the right answer; 1 or more.
    required
        Documents that always come with the question.
    article
        All documents of the same article, for SQuAD; one tuple for all questions of an article.
    """

    query: str
    answers: tuple[str, ...]
    required: tuple[int, ...]
    article: tuple[int, ...] = ()

    @property
    def related(self) -> list[int]:
        """The article's other documents."""
        return [number for number in self.article if number not in self.required]


@dataclass(frozen=True)
class Sources:
    """Files that text comes from; None stands for the project's own. They are read when first needed.

    Parameters
    ----------
    essays
        A text file, a folder of `.txt` files, or RULER's JSON with a "text".
    squad
        SQuAD's JSON as published, version 1.1 or 2.0.
    hotpotqa
        HotpotQA's JSON as published.
    """

    essays: Path | None = None
    squad: Path | None = None
    hotpotqa: Path | None = None

    def name(self, field: str) -> str:
        """Return the name of a source in records.

        Parameters
        ----------
        field
            "essays", "squad" or "hotpotqa".

        Returns
        -------
        str
            The file's or folder's name, or "built-in".
        """
        path: Path | None = getattr(self, field)
        return path.name if path else "built-in"

    def essay_words(self, count: int) -> list[str]:
        """Return the first words of the essays, which begin again after the last.

        Parameters
        ----------
        count
            Number of words.

        Returns
        -------
        list of str
            The words, without white space.
        """
        return list(islice(cycle(self._words), count))

    def questions(self, field: str) -> tuple[list[Question], list[str]]:
        """Return the questions of a source and the documents that they are about.

        Parameters
        ----------
        field
            "squad" or "hotpotqa".

        Returns
        -------
        questions : list of Question
            All questions that have an answer, 1 or more.
        documents : list of str
            Different documents, sorted; questions refer to them by index.
        """
        return self._squad if field == "squad" else self._hotpotqa

    @cached_property
    def _words(self) -> list[str]:
        """All words of the essays, in order."""
        path = self._path("essays")
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        words = " ".join(_essay(file) for file in files).split()
        if not words:
            raise InputError(f"no essays in {path}: give a text file or a folder of .txt files")
        return words

    @cached_property
    def _squad(self) -> tuple[list[Question], list[str]]:
        """Questions and documents of SQuAD: a document is a paragraph."""
        path = self._path("squad")
        try:
            articles = [article["paragraphs"] for article in _json(path)["data"]]
            documents = sorted({_text(part["context"]) for parts in articles for part in parts})
            number = {document: i for i, document in enumerate(documents)}
            return _some(list(_squad_questions(articles, number)), path), documents
        except _SHAPE_ERRORS as error:
            raise FormatError(f"{path} is not SQuAD's JSON: {error!r}") from None

    @cached_property
    def _hotpotqa(self) -> tuple[list[Question], list[str]]:
        """Questions and documents of HotpotQA: a document is a title with its sentences."""
        path = self._path("hotpotqa")
        try:
            items = [
                (_text(item["question"]), _text(item["answer"]), [_document(*pair) for pair in item["context"]])
                for item in _json(path)
            ]
            documents = sorted({document for _, _, context in items for document in context})
            number = {document: i for i, document in enumerate(documents)}
            questions = [
                Question(query, (answer,), tuple(dict.fromkeys(number[document] for document in context)))
                for query, answer, context in items
                if answer.strip()
            ]
            return _some(questions, path), documents
        except _SHAPE_ERRORS as error:
            raise FormatError(f"{path} is not HotpotQA's JSON: {error!r}") from None

    def _path(self, field: str) -> Path:
        """Return the file of a source."""
        return getattr(self, field) or Path(__file__).parent / "data" / _BUILT_IN[field]


def _essay(path: Path) -> str:
    """Return the text of an essay's file."""
    if path.suffix != ".json":
        return read_text(path)
    try:
        return _text(_json(path)["text"])
    except _SHAPE_ERRORS as error:
        raise FormatError(f'{path} is not JSON with a "text": {error!r}') from None


def _json(path: Path) -> Any:
    """Return the content of a JSON file."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not valid JSON: {error}") from None


def _text(value: Any) -> str:
    """Return a value if it is text that can be encoded. Raises TypeError or ValueError."""
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {type(value).__name__}")
    value.encode()
    return value


def _squad_questions(articles: list[Any], number: dict[str, int]) -> Iterator[Question]:
    """Yield questions that have an answer; SQuAD 2 has others too."""
    for parts in articles:
        article = tuple(dict.fromkeys(number[part["context"]] for part in parts))
        for part in parts:
            required = number[part["context"]]
            for asked in part["qas"]:
                texts = dict.fromkeys(_text(answer["text"]) for answer in asked["answers"])
                answers = tuple(text for text in texts if text.strip())
                if answers and not asked.get("is_impossible"):
                    yield Question(_text(asked["question"]), answers, (required,), article)


def _document(title: Any, sentences: list[Any]) -> str:
    """Return one of HotpotQA's documents as RULER writes it."""
    return _text(title) + "\n" + "".join(_text(sentence) for sentence in sentences)


def _some(questions: list[Question], path: Path) -> list[Question]:
    """Return the questions unless there are none."""
    if not questions:
        raise FormatError(f"{path} holds no question that has an answer")
    return questions

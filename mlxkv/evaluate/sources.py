"""Essays and questions on disk: the user's files, or a little text that was written for the project.

essays: a text file, a folder of `.txt` files, or RULER's JSON with a "text". squad, hotpotqa: JSON as published.
Everything read is treated as hostile: bounded sizes, typed errors.
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
from mlxkv.io.inputs import open_input

LIMIT = 64 << 20  # bytes of a source; HotpotQA's development set has 46 million
_BUILT_IN = {"essays": "essay.txt", "squad": "squad.json", "hotpotqa": "hotpotqa.json"}
_SHAPE_ERRORS = (AttributeError, KeyError, TypeError, ValueError)


@dataclass(frozen=True)
class Question:
    """answers: ways to say the same. own: numbers of the documents it needs. article: of all in the same article, if
    there is one."""

    query: str
    answers: tuple[str, ...]
    own: tuple[int, ...]
    article: tuple[int, ...] = ()  # one tuple for all questions of an article

    @property
    def related(self) -> list[int]:
        """The article's other documents."""
        return [number for number in self.article if number not in self.own]


@dataclass(frozen=True)
class Sources:
    """Where text comes from; None stands for the project's own. Files are read when first needed."""

    essays: Path | None = None
    squad: Path | None = None
    hotpotqa: Path | None = None

    def name(self, field: str) -> str:
        """What a record says about a source: the file's name, or "built-in"."""
        path: Path | None = getattr(self, field)
        return path.name if path else "built-in"

    def essay_words(self, count: int) -> list[str]:
        """The first `count` words of the essays, which begin again after the last."""
        return list(islice(cycle(self._words), count))

    def questions(self, field: str) -> tuple[list[Question], list[str]]:
        """Questions and documents of "squad" or "hotpotqa"."""
        return self._squad if field == "squad" else self._hotpotqa

    @cached_property
    def _words(self) -> list[str]:
        path = self._path("essays")
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        words = " ".join(_essay(file) for file in files).split()
        if not words:
            raise InputError(f"no essays in {path}: give a text file or a folder of .txt files")
        return words

    @cached_property
    def _squad(self) -> tuple[list[Question], list[str]]:
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
        path = self._path("hotpotqa")
        try:
            items = [
                (_text(item["question"]), _text(item["answer"]), [_document(*pair) for pair in item["context"]])
                for item in _json(path)
            ]
            documents = sorted({document for _, _, own in items for document in own})
            number = {document: i for i, document in enumerate(documents)}
            questions = [
                Question(query, (answer,), tuple(dict.fromkeys(number[document] for document in own)))
                for query, answer, own in items
                if answer.strip()
            ]
            return _some(questions, path), documents
        except _SHAPE_ERRORS as error:
            raise FormatError(f"{path} is not HotpotQA's JSON: {error!r}") from None

    def _path(self, field: str) -> Path:
        return getattr(self, field) or Path(__file__).parent / "data" / _BUILT_IN[field]


def read_text(path: Path, limit: int = LIMIT) -> str:
    """A UTF-8 file of at most `limit` bytes. Raises InputError or FormatError."""
    with open_input(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise InputError(f"{path} has more than {limit >> 20} MiB; give a part of it")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8 text: {error}") from None


def _essay(path: Path) -> str:
    if path.suffix != ".json":
        return read_text(path)
    try:
        return _text(_json(path)["text"])
    except _SHAPE_ERRORS as error:
        raise FormatError(f'{path} is not JSON with a "text": {error!r}') from None


def _json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not valid JSON: {error}") from None


def _text(value: Any) -> str:
    """`value`, when it is text that can be encoded. Raises TypeError or ValueError."""
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {type(value).__name__}")
    value.encode()
    return value


def _squad_questions(articles: list[Any], number: dict[str, int]) -> Iterator[Question]:
    """Questions that have an answer; SQuAD 2 has others too."""
    for parts in articles:
        article = tuple(dict.fromkeys(number[part["context"]] for part in parts))
        for part in parts:
            own = number[part["context"]]
            for asked in part["qas"]:
                texts = dict.fromkeys(_text(answer["text"]) for answer in asked["answers"])
                answers = tuple(text for text in texts if text.strip())
                if answers and not asked.get("is_impossible"):
                    yield Question(_text(asked["question"]), answers, (own,), article)


def _document(title: Any, sentences: list[Any]) -> str:
    return _text(title) + "\n" + "".join(_text(sentence) for sentence in sentences)


def _some(questions: list[Question], path: Path) -> list[Question]:
    if not questions:
        raise FormatError(f"{path} holds no question that has an answer")
    return questions

"""Samples of a task, as long as the wanted length allows; and JSONL files that RULER reads and writes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxkv.errors import FormatError, InputError
from mlxkv.evaluate.sources import Sources
from mlxkv.evaluate.tasks.ruler.task import Request, RulerTask
from mlxkv.evaluate.variants import split_tokens
from mlxkv.io.atomic import atomic_write
from mlxkv.io.inputs import parse_json, read_text

MAX_BYTES = 512 << 20  # bytes of a JSONL file; 500 rows of 128K tokens have about 300 million


@dataclass(frozen=True)
class Sample:
    """One question about one context.

    Parameters
    ----------
    context
        The text before the question.
    question
        The question, up to where the model goes on.
    answers
        Strings that a good answer contains, 1 or more.
    length
        Tokens of context and question, and those to generate, as RULER counts.
    index
        Number of the sample.
    """

    context: str
    question: str
    answers: tuple[str, ...]
    length: int
    index: int


def samples(
    task: RulerTask, name: str, tokenizer: Any, length: int, count: int, seed: int, sources: Sources
) -> Iterator[Sample]:
    """Make samples of a task, each with as much haystack as fits.

    Parameters
    ----------
    task, name
        The task and its name.
    tokenizer
        The model's.
    length
        The most tokens of context, question and answer together.
    count
        Number of samples; a sample depends on its index, not on how many there are.
    seed
        Of the samples.
    sources
        Essays and questions.

    Yields
    ------
    Sample
        The samples, in order of their indices; InputError where `fit` raises it.
    """
    for index in range(count):
        yield fit(task, tokenizer, Request(name, length, seed, index, sources))


def fit(task: RulerTask, tokenizer: Any, request: Request) -> Sample:
    """Make the longest sample that fits: the size is doubled while it fits, then the gap is halved.

    Parameters
    ----------
    task
        The task.
    tokenizer
        The model's.
    request
        The sample to make.

    Returns
    -------
    Sample
        The sample with the most haystack among those tried.

    Raises
    ------
    InputError
        When the smallest size is too long.
    """

    def attempt(size: int) -> Sample:
        draft = task.draft(request, size)
        length = sum(map(len, split_tokens(tokenizer, draft.context, draft.question))) + task.max_tokens
        return Sample(draft.context, draft.question, draft.answers, length, request.index)

    best, fits = attempt(task.min_size), task.min_size
    if best.length > request.length:
        raise InputError(f"a length of {request.length} tokens is too short: this sample needs {best.length} or more")
    step, doubling = 1, True
    while step:
        longer = attempt(fits + step)
        if longer.length <= request.length:
            best, fits = longer, fits + step
        else:
            doubling = False
        step = step * 2 if doubling else step // 2
    return best


def write_rows(path: str | Path, rows: Iterable[Sample]) -> None:
    """Write samples as JSONL, as RULER does.

    Parameters
    ----------
    path
        The file; an existing one is replaced.
    rows
        Samples. A line has index, input (context and question with the beginning of the answer), outputs and length.
    """
    with atomic_write(path) as file:
        for row in rows:
            fields = {
                "index": row.index,
                "input": row.context + row.question,
                "outputs": row.answers,
                "length": row.length,
            }
            file.write(json.dumps(fields).encode() + b"\n")


def read_rows(path: str | Path, task: RulerTask) -> list[Sample]:
    """Read samples of a task from JSONL that RULER or `write_rows` wrote.

    Parameters
    ----------
    path
        The file.
    task
        The task.

    Returns
    -------
    list of Sample
        In the order of the file. The index is the row's; in RULER's needle tasks it is not the number of the row.

    Raises
    ------
    InputError
        For a file that cannot be read.
    FormatError
        For a line that is no sample of this task; the message has its number.

    Notes
    -----
    Newer versions of RULER have the beginning of the answer in a field of its own, answer_prefix. Fields that are not
    needed are ignored.
    """
    lines = read_text(Path(path), MAX_BYTES).split("\n")
    if lines[-1] == "":
        lines.pop()
    return [_sample(line, task, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _sample(line: str, task: RulerTask, name: str) -> Sample:
    """Return the sample in a line."""
    row = parse_json(line, name)
    index, length, answers = row.get("index"), row.get("length"), row.get("outputs")
    text, prefix = row.get("input"), row.get("answer_prefix", "")
    if (
        not isinstance(answers, list)
        or not answers
        or not all(isinstance(part, str) and part.strip() for part in answers)
    ):
        raise FormatError(f"{name}: outputs should be a list of words, not {answers!r:.80}")
    if type(index) is not int or type(length) is not int or min(index, length) < 0:
        raise FormatError(f"{name}: index and length should be numbers, not {index!r:.80} and {length!r:.80}")
    if not isinstance(text, str) or not isinstance(prefix, str):
        raise FormatError(f"{name}: input and answer_prefix should be strings")
    context, question, rest = text.rpartition(task.question_start)
    if not context:
        raise FormatError(
            f"{name}: the input asks no question of this task; expected {task.question_start!r} after a context"
        )
    try:
        "".join([text, prefix, *answers]).encode()
    except UnicodeEncodeError as error:
        raise FormatError(f"{name}: not text: {error}") from None
    return Sample(context, question + rest + prefix, tuple(answers), length, index)

"""Samples of a task: as long as the wanted length allows, and rows interchangeable with RULER's JSONL."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxkv.errors import FormatError, InputError
from mlxkv.evaluate.sources import Sources, read_text
from mlxkv.evaluate.tasks.ruler.task import Request, RulerTask
from mlxkv.evaluate.variants import split_tokens
from mlxkv.io.atomic import atomic_write
from mlxkv.io.inputs import parse_json

LIMIT = 512 << 20  # bytes of a JSONL file; 500 rows of 128K tokens have about 300 million


@dataclass(frozen=True)
class Sample:
    """One question about one context. length: tokens of both, and those to generate, as RULER counts."""

    context: str
    question: str
    answers: tuple[str, ...]
    length: int
    index: int


def samples(
    task: RulerTask, name: str, tokenizer: Any, length: int, count: int, seed: int, sources: Sources
) -> Iterator[Sample]:
    """`count` samples of at most `length` tokens, each with as much haystack as fits.

    A sample depends on its index, the seed and the name of its task, not on how many there are. Raises InputError when nothing fits.
    """
    for index in range(count):
        yield fit(task, tokenizer, Request(name, length, seed, index, sources))


def fit(task: RulerTask, tokenizer: Any, request: Request) -> Sample:
    """The sample with the most haystack among those tried that fits: sizes double, then the gap is halved."""

    def attempt(size: int) -> Sample:
        draft = task.draft(request, size)
        length = sum(map(len, split_tokens(tokenizer, draft.context, draft.question))) + task.tokens
        return Sample(draft.context, draft.question, draft.answers, length, request.index)

    best, fits = attempt(task.smallest), task.smallest
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
    """Write samples as JSONL: index, input (context and question with the beginning of the answer), outputs, length."""
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
    """Samples of a task from JSONL as RULER or `write_rows` writes it; other fields are let be.

    RULER's newer rows have the beginning of the answer apart, as answer_prefix. The index is what the row says; in
    RULER's needle tasks it is no number of the row. Raises InputError or FormatError with the number of the line.
    """
    lines = read_text(Path(path), LIMIT).split("\n")
    if lines[-1] == "":
        lines.pop()
    return [_sample(line, task, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _sample(line: str, task: RulerTask, name: str) -> Sample:
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
    context, question, rest = text.rpartition(task.asks)
    if not context:
        raise FormatError(f"{name}: the input asks no question of this task; expected {task.asks!r} after a context")
    try:
        "".join([text, prefix, *answers]).encode()
    except UnicodeEncodeError as error:
        raise FormatError(f"{name}: not text: {error}") from None
    return Sample(context, question + rest + prefix, tuple(answers), length, index)

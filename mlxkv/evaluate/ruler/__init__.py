"""RULER: thirteen synthetic tasks at any length, https://arxiv.org/abs/2404.06654 and github.com/NVIDIA/RULER.

Sizes of the tasks, tokens to generate and metrics are the published ones; each family's file says what is quoted and
where it departs. Inputs have no chat markup, RULER's "base" template. The context is held before the question is
asked, so a method cannot prepare for the question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlxkv.errors import InputError
from mlxkv.evaluate._run import Unit, option, positive
from mlxkv.evaluate._variants import Variant, answer, each, encode
from mlxkv.evaluate.ruler.niah import Needles
from mlxkv.evaluate.ruler.qa import Answering
from mlxkv.evaluate.ruler.samples import Sample, samples
from mlxkv.evaluate.ruler.sources import Sources
from mlxkv.evaluate.ruler.task import Task
from mlxkv.evaluate.ruler.tracing import Tracing
from mlxkv.evaluate.ruler.words import Common, Frequent

TASKS: dict[str, Task] = {
    "niah_single_1": Needles(haystack="noise"),
    "niah_single_2": Needles(haystack="essay", reads="essays"),
    "niah_single_3": Needles(haystack="essay", reads="essays", value_kind="uuids"),
    "niah_multikey_1": Needles(haystack="essay", reads="essays", keys=4),
    "niah_multikey_2": Needles(haystack="needle"),
    "niah_multikey_3": Needles(haystack="needle", key_kind="uuids", value_kind="uuids"),
    "niah_multivalue": Needles(haystack="essay", reads="essays", values=4),
    "niah_multiquery": Needles(haystack="essay", reads="essays", keys=4, queries=4),
    "vt": Tracing(),
    "cwe": Common(),
    "fwe": Frequent(),
    "qa_1": Answering(reads="squad"),
    "qa_2": Answering(reads="hotpotqa"),
}


SCORES = ("score",)


@dataclass(frozen=True)
class Options:
    tasks: tuple[str, ...] = option(tuple(TASKS), f"of {', '.join(TASKS)}")
    lengths: tuple[int, ...] = option((1024,), "tokens of context, question and answer together")
    samples: int = option(5, "samples of each task and length, for each seed")
    essays: Path | None = option(
        None, "text file, folder of .txt files or RULER's JSON; if not given, a built-in essay"
    )
    squad: Path | None = option(None, "SQuAD's JSON, for qa_1; if not given, a few built-in questions")
    hotpotqa: Path | None = option(None, "HotpotQA's JSON, for qa_2; if not given, a few built-in questions")

    def __post_init__(self) -> None:
        positive(self, "lengths", "samples")
        unknown = [name for name in self.tasks if name not in TASKS]
        if unknown or not self.tasks:
            raise InputError(f"unknown RULER tasks {', '.join(unknown) or '(none)'}; known: {', '.join(TASKS)}")


def units(tokenizer: Any, options: Options, seed: int) -> list[Unit]:
    """`samples` of each task and length; groups are tasks. Raises InputError for a length that is too short for a task."""
    sources = Sources(options.essays, options.squad, options.hotpotqa)
    drawn = []
    for name in options.tasks:
        task = TASKS[name]
        text = sources.name(task.reads) if task.reads else None
        for length in options.lengths:
            try:
                rows = list(samples(task, tokenizer, length, options.samples, seed, sources))
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
            for row in rows:
                key = {"task": name, "length": length, "index": row.index, "text": text, "seed": seed}
                drawn.append(Unit(key, partial(ask, task, row), group=name))
    return drawn


def ask(task: Task, sample: Sample, model: Any, tokenizer: Any, variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """A sample asked of every variant: a record each. prompt_tokens: of context and question."""
    context, question = encode(tokenizer, sample.context, sample.question)
    records = []
    for variant, held in each(model, variants, context):
        said = tokenizer.decode(answer(model, tokenizer, held, question, task.tokens))
        records.append(
            {
                "variant": variant.name,
                **held.sizes,
                "score": task.score(said, sample.answers),
                "answer": said,
                "outputs": list(sample.answers),
                "prompt_tokens": len(context) + len(question),
            }
        )
    return records

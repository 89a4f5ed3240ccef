"""RULER: thirteen synthetic tasks at any length, https://arxiv.org/abs/2404.06654 and github.com/NVIDIA/RULER.

Sizes of the tasks, tokens to generate and metrics are the published ones; each family's file says what is quoted and
where it departs. Inputs have no chat markup, RULER's "base" template. The context is held before the question is
asked, so a method cannot prepare for the question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from mlxkv.errors import InputError
from mlxkv.evaluate.ruler.niah import Needles
from mlxkv.evaluate.ruler.qa import Answering
from mlxkv.evaluate.ruler.samples import Sample, samples
from mlxkv.evaluate.ruler.sources import Sources
from mlxkv.evaluate.ruler.task import Task
from mlxkv.evaluate.ruler.tracing import Tracing
from mlxkv.evaluate.ruler.words import Common, Frequent
from mlxkv.evaluate.variants import Variant, answer, beside_whole, encode

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


def evaluate(model: Any, tokenizer: Any, variants: Sequence[Variant], tasks: Iterable[str] = tuple(TASKS), *,
             length: int, count: int, seed: int = 0, sources: Sources | None = None,
             progress: Callable[[int], None] | None = None) -> list[dict[str, Any]]:  # fmt: skip
    """`count` samples of each task, asked of every variant: one JSON-ready record a sample and variant.

    The untouched cache, `variants.whole()`, comes first. progress is called with 1 after each answer.
    Raises InputError for an unknown task or a length that is too short for one.
    """
    sources, names = sources or Sources(), list(tasks)
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise InputError(f"unknown RULER tasks {', '.join(unknown)}; known: {', '.join(TASKS)}")
    # All samples come first: a length that is too short for one task is not found out hours into the run.
    drawn = {name: list(samples(TASKS[name], tokenizer, length, count, seed, sources)) for name in names}
    records = []
    for name, rows in drawn.items():
        task = TASKS[name]
        facts = {"task": name, "length": length, "seed": seed, "text": sources.name(task.reads) if task.reads else None}
        for record in ask(model, tokenizer, variants, task, rows):
            records.append({**facts, **record})
            if progress:
                progress(1)
    return records


def ask(
    model: Any, tokenizer: Any, variants: Sequence[Variant], task: Task, rows: Iterable[Sample]
) -> Iterator[dict[str, Any]]:
    """Each sample asked of every variant and of the untouched cache. tokens: of context and question together."""
    for row in rows:
        context, question = encode(tokenizer, row.context, row.question)
        for variant in beside_whole(variants):
            said = tokenizer.decode(answer(model, tokenizer, variant, context, question, task.tokens))
            yield {
                "index": row.index,
                "variant": variant.name,
                "score": task.score(said, row.answers),
                "answer": said,
                "outputs": list(row.answers),
                "tokens": len(context) + len(question),
            }

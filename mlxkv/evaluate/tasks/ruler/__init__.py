"""RULER: thirteen synthetic tasks at any length, https://arxiv.org/abs/2404.06654 and github.com/NVIDIA/RULER."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlxkv.config import Config
from mlxkv.errors import InputError
from mlxkv.evaluate.evaluation import EvalSample, Evaluation, evaluations, option
from mlxkv.evaluate.sources import Sources
from mlxkv.evaluate.tasks.ruler.niah import Needles
from mlxkv.evaluate.tasks.ruler.qa import Answering
from mlxkv.evaluate.tasks.ruler.samples import Sample, read_rows, samples
from mlxkv.evaluate.tasks.ruler.task import RulerTask
from mlxkv.evaluate.tasks.ruler.tracing import Tracing
from mlxkv.evaluate.tasks.ruler.words import Common, Frequent
from mlxkv.evaluate.variants import Variant, generate_answer, iter_variants, split_tokens

TASKS: dict[str, RulerTask] = {
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


ROWS = "validation.jsonl"  # RULER's name for the file in each task's folder


@dataclass(frozen=True)
class RulerOptions(Config):
    tasks: tuple[str, ...] = option(tuple(TASKS), f"of {', '.join(TASKS)}")
    lengths: tuple[int, ...] = option((1024,), "tokens of context, question and answer together", least=1)
    samples: int = option(5, "samples of each task and length, for each seed", least=1)
    essays: Path | None = option(
        None,
        "text file, folder of .txt files or RULER's JSON; if not given, a built-in essay of 1,500 tokens, again and again",
    )
    squad: Path | None = option(None, "SQuAD's JSON, for qa_1; if not given, a few built-in questions")
    hotpotqa: Path | None = option(None, "HotpotQA's JSON, for qa_2; if not given, a few built-in questions")
    rows: Path | None = option(
        None, f"folder in which RULER wrote its own rows, TASK/{ROWS}; these are then asked, and none are made"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows and (self.essays or self.squad or self.hotpotqa):
            raise InputError("rows are asked as they are: essays, squad and hotpotqa are for rows that are made here")
        unknown = [name for name in self.tasks if name not in TASKS]
        if unknown or not self.tasks:
            raise InputError(f"unknown RULER tasks {', '.join(unknown) or '(none)'}; known: {', '.join(TASKS)}")


@evaluations.register("ruler")
class Ruler(Evaluation):
    """RULER: thirteen synthetic tasks at any length, https://arxiv.org/abs/2404.06654 and github.com/NVIDIA/RULER.

    Sizes of the tasks, tokens to generate and metrics are the published ones; each family's file says what is quoted and
    where it departs. Inputs have no chat markup, RULER's "base" template. The context is held before the question is
    asked, so a method cannot prepare for the question.
    """

    options_class = RulerOptions
    scores = ("score",)
    options: RulerOptions

    def samples(self, tokenizer: Any, seed: int) -> list[EvalSample]:
        """`samples` of each task and length, or RULER's own rows; groups are tasks, at a length where there are several.

        Raises InputError for a length that is too short for a task, FormatError for rows that are not RULER's.
        """
        if self.options.rows:
            return [
                EvalSample(
                    {"task": name, "row": number, "length": row.length}, partial(ask, TASKS[name], row), group=name
                )
                for name in self.options.tasks
                for number, row in enumerate(read_rows(self.options.rows / name / ROWS, TASKS[name]))
            ]
        sources = Sources(self.options.essays, self.options.squad, self.options.hotpotqa)
        drawn = []
        for name in self.options.tasks:
            task = TASKS[name]
            text = sources.name(task.reads) if task.reads else None
            for length in self.options.lengths:
                try:
                    rows = list(samples(task, name, tokenizer, length, self.options.samples, seed, sources))
                except InputError as error:
                    raise InputError(f"{name}: {error}") from None
                group = f"{name} {length}" if len(self.options.lengths) > 1 else name
                for row in rows:
                    key = {"task": name, "length": length, "index": row.index, "text": text, "seed": seed}
                    drawn.append(EvalSample(key, partial(ask, task, row), group=group))
        return drawn


def ask(
    task: RulerTask, sample: Sample, model: Any, tokenizer: Any, variants: Sequence[Variant]
) -> list[dict[str, Any]]:
    """A sample asked of every variant: a record each. prompt_tokens: of context and question."""
    context, question = split_tokens(tokenizer, sample.context, sample.question)
    records = []
    for variant, held in iter_variants(model, variants, context):
        said = tokenizer.decode(
            generate_answer(model, tokenizer, held, question, task.tokens), skip_special_tokens=True
        )
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

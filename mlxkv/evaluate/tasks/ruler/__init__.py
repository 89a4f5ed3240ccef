"""RULER: thirteen synthetic tasks at any length, https://arxiv.org/abs/2404.06654 and github.com/NVIDIA/RULER."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlxkv.config import Config
from mlxkv.errors import InputError, suggest
from mlxkv.evaluate.evaluation import EvalSample, Evaluation, Record, evaluations, option
from mlxkv.evaluate.sources import ESSAYS, Sources
from mlxkv.evaluate.tasks.ruler.niah import NeedleInHaystack
from mlxkv.evaluate.tasks.ruler.qa import QuestionAnswering
from mlxkv.evaluate.tasks.ruler.samples import Sample, read_rows, samples
from mlxkv.evaluate.tasks.ruler.task import RulerTask
from mlxkv.evaluate.tasks.ruler.tracing import VariableTracking
from mlxkv.evaluate.tasks.ruler.words import CommonWords, FrequentWords
from mlxkv.evaluate.variants import Variant, generate_answer, iter_variants, split_tokens

TASKS: dict[str, RulerTask] = {
    "niah_single_1": NeedleInHaystack(haystack="noise"),
    "niah_single_2": NeedleInHaystack(haystack="essay", source="essays"),
    "niah_single_3": NeedleInHaystack(haystack="essay", source="essays", value_kind="uuids"),
    "niah_multikey_1": NeedleInHaystack(haystack="essay", source="essays", keys=4),
    "niah_multikey_2": NeedleInHaystack(haystack="needle"),
    "niah_multikey_3": NeedleInHaystack(haystack="needle", key_kind="uuids", value_kind="uuids"),
    "niah_multivalue": NeedleInHaystack(haystack="essay", source="essays", values=4),
    "niah_multiquery": NeedleInHaystack(haystack="essay", source="essays", keys=4, queries=4),
    "vt": VariableTracking(),
    "cwe": CommonWords(),
    "fwe": FrequentWords(),
    "qa_1": QuestionAnswering(source="squad"),
    "qa_2": QuestionAnswering(source="hotpotqa"),
}
ROWS = "validation.jsonl"  # RULER's name for the file in each task's folder


@dataclass(frozen=True)
class RulerOptions(Config):
    """Options of `mlxkv eval ruler`."""

    tasks: tuple[str, ...] = option(tuple(TASKS), "tasks to run")
    lengths: tuple[int, ...] = option((1024,), "tokens of context, question and answer together", least=1)
    samples: int = option(5, "samples of each task, length and seed", least=1)
    essays: Path | None = option(None, ESSAYS)
    squad: Path | None = option(None, "SQuAD's JSON for qa_1, in place of a few questions")
    hotpotqa: Path | None = option(None, "HotpotQA's JSON for qa_2, likewise")
    rows: Path | None = option(None, "folder of samples that RULER itself wrote")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows and (self.essays or self.squad or self.hotpotqa):
            raise InputError("rows are asked as they are: essays, squad and hotpotqa are for rows that are made here")
        unknown = [name for name in self.tasks if name not in TASKS]
        if unknown or not self.tasks:
            raise InputError(
                f"unknown RULER tasks {', '.join(unknown) or '(none)'}", suggest((unknown or [""])[0], TASKS)
            )


@evaluations.register("ruler")
class Ruler(Evaluation):
    """Score answers to RULER: 13 synthetic tasks at any length, https://arxiv.org/abs/2404.06654.

    - score: share of the right answers that the generated text contains; for qa, whether it contains one of them

    Tasks are needles in a haystack (niah_single_1, _2 and _3, niah_multikey_1, _2 and _3, niah_multivalue,
    niah_multiquery), variable tracking (vt), common and frequent words (cwe, fwe), and questions about documents (qa_1,
    qa_2).

    Notes
    -----
    After github.com/NVIDIA/RULER, whose own samples are files TASK/validation.jsonl. Sizes, tokens to generate and metrics of the tasks are the published ones; the files in mlxkv/evaluate/tasks/ruler list departures. Inputs have no chat markup, as in RULER's template
    "base". The cache is built of the context before the question is asked, so a method cannot prepare for it.
    """

    options_class = RulerOptions
    scores = ("score",)
    options: RulerOptions

    def samples(self, tokenizer: Any, seed: int) -> list[EvalSample]:
        """Return samples of each task and length, or RULER's own; groups are tasks, or tasks of one length."""
        if self.options.rows:
            return [
                EvalSample(
                    {"task": name, "row": number, "length": row.length},
                    partial(ask_sample, TASKS[name], row),
                    group=name,
                )
                for name in self.options.tasks
                for number, row in enumerate(read_rows(self.options.rows / name / ROWS, TASKS[name]))
            ]
        sources = Sources(self.options.essays, self.options.squad, self.options.hotpotqa)
        drawn = []
        for name in self.options.tasks:
            task = TASKS[name]
            text = sources.name(task.source) if task.source else None
            for length in self.options.lengths:
                try:
                    rows = list(samples(task, name, tokenizer, length, self.options.samples, seed, sources))
                except InputError as error:
                    raise InputError(f"{name}: {error}") from None
                group = f"{name} {length}" if len(self.options.lengths) > 1 else name
                for row in rows:
                    key = {"task": name, "length": length, "index": row.index, "text": text, "seed": seed}
                    drawn.append(EvalSample(key, partial(ask_sample, task, row), group=group))
        return drawn


def ask_sample(
    task: RulerTask, sample: Sample, model: Any, tokenizer: Any, variants: Sequence[Variant]
) -> list[Record]:
    """Ask the question of a sample with every variant.

    Parameters
    ----------
    task
        The sample's task, which scores answers.
    sample
        The sample.
    model, tokenizer
        As `mlxkv.lm.load` returns them.
    variants
        The variants.

    Returns
    -------
    list of dict
        For each variant its name, sizes, `score`, `answer`, the right answers as `outputs`, and `prompt_tokens` of
        context and question.
    """
    context, question = split_tokens(tokenizer, sample.context, sample.question)
    records = []
    for variant, cached in iter_variants(model, variants, context):
        answer = tokenizer.decode(
            generate_answer(model, tokenizer, cached, question, task.max_tokens), skip_special_tokens=True
        )
        records.append(
            {
                "variant": variant.name,
                **cached.sizes,
                "score": task.score(answer, sample.answers),
                "answer": answer,
                "outputs": list(sample.answers),
                "prompt_tokens": len(context) + len(question),
            }
        )
    return records

"""LongBench: 21 tasks on real texts in English and Chinese, https://arxiv.org/abs/2308.14508."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlxkv.config import Config
from mlxkv.errors import FormatError, InputError
from mlxkv.evaluate import answer_scores as scores
from mlxkv.evaluate.evaluation import EvalSample, Evaluation, evaluations, option
from mlxkv.evaluate.variants import Variant, generate_answer, iter_variants, split_tokens
from mlxkv.io.inputs import open_input, parse_json

TASKS: dict[str, Callable[..., float]] = {
    "narrativeqa": scores.f1,
    "qasper": scores.f1,
    "multifieldqa_en": scores.f1,
    "multifieldqa_zh": scores.f1_zh,
    "hotpotqa": scores.f1,
    "2wikimqa": scores.f1,
    "musique": scores.f1,
    "dureader": scores.rouge_zh,
    "gov_report": scores.rouge,
    "qmsum": scores.rouge,
    "multi_news": scores.rouge,
    "vcsum": scores.rouge_zh,
    "trec": scores.classification,
    "triviaqa": scores.f1,
    "samsum": scores.rouge,
    "lsht": scores.classification,
    "passage_count": scores.count,
    "passage_retrieval_en": scores.retrieval,
    "passage_retrieval_zh": scores.retrieval,
    "lcc": scores.code_similarity,
    "repobench-p": scores.code_similarity,
}
FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")  # examples come before the question; models go on with more of them
MAX_CONFIG = 1 << 20  # bytes; the published files have 5 thousand
MAX_LINE = 16 << 20  # bytes; the longest published context has less than a million
MAX_ANSWER = 32_768  # characters; ROUGE takes time and memory by the product of both texts' words
MAX_TOKENS = 4096  # to generate; the published numbers go up to 512


@dataclass(frozen=True)
class Sample:
    """One row. context: the prompt up to where its long text ends. question: the prompt's rest. length: the row's own,
    in words or Chinese characters. classes: all names of the task's classes, or none. tokens: to generate."""

    task: str
    id: str
    context: str
    question: str
    answers: tuple[str, ...]
    classes: tuple[str, ...]
    length: int
    tokens: int


@dataclass(frozen=True)
class LongBenchOptions(Config):
    folder: Path = option(MISSING, "LongBench's own, with config/ and data/ in it")
    length: int = option(4096, "most tokens of prompt and answer together; a longer prompt loses its middle", least=1)
    tasks: tuple[str, ...] = option(tuple(TASKS), f"of {', '.join(TASKS)}")

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.tasks if name not in TASKS]
        if unknown or not self.tasks:
            raise InputError(f"unknown LongBench tasks {', '.join(unknown) or '(none)'}; known: {', '.join(TASKS)}")


@evaluations.register("longbench")
class LongBench(Evaluation):
    """LongBench: 21 tasks on real texts in English and Chinese, https://arxiv.org/abs/2308.14508.

    Nothing of it is shipped here. A folder holds it as the folder LongBench of github.com/THUDM/LongBench does, with its data unpacked inside:
    `config/dataset2prompt.json`, `config/dataset2maxlen.json` and `data/<task>.jsonl`.

    The prompt up to the end of its `{context}` is held; what comes after it, the question, is asked then. A prompt that is
    too long loses its middle. The metrics are in `scores`; tokens to generate and the first lines that alone count are the
    published ones. Departures:
    - prompts have no chat template, which LongBench adds for chat models in 15 of the tasks;
    - the answer has its room within the length, and a prompt that was cut is not decoded and tokenised again;
    - samsum's answers do not end at a new line. Their first line counts either way; LongBench forbids an empty one;
    - the row of all tasks is the mean of tasks, both languages together; LongBench's is the mean of six kinds of tasks, by language.
    """

    options_class = LongBenchOptions
    scores = ("score",)
    options: LongBenchOptions

    def samples(self, tokenizer: Any, seed: int) -> list[EvalSample]:
        """Every sample of every task; groups are tasks. The seed changes nothing but which ones a limit leaves.

        Raises InputError for a missing file or a length too short for a task's answers, FormatError for files that are
        damaged, and MlxkvError where a library for the scores is missing.
        """
        drawn = [sample for task in self.options.tasks for sample in read(self.options.folder, task)]
        for sample in {sample.task: sample for sample in drawn}.values():
            score(sample, "")  # a missing library should not be found out hours into the run
            if self.options.length < sample.tokens + 2:
                raise InputError(
                    f"{sample.task} generates {sample.tokens} tokens; a length of {self.options.length} leaves no prompt"
                )
        return [
            EvalSample(
                {"task": sample.task, "id": sample.id},
                partial(ask_sample, sample, self.options.length),
                group=sample.task,
            )
            for sample in drawn
        ]


def ask_sample(
    sample: Sample, length: int, model: Any, tokenizer: Any, variants: Sequence[Variant]
) -> list[dict[str, Any]]:
    """A sample asked of every variant: a record each. words: the row's own length. prompt_tokens: of what was asked."""
    context, question = prompt(tokenizer, sample, length)
    records = []
    for variant, held in iter_variants(model, variants, context):
        said = tokenizer.decode(
            generate_answer(model, tokenizer, held, question, sample.tokens), skip_special_tokens=True
        )
        records.append(
            {
                "variant": variant.name,
                **held.sizes,
                "score": score(sample, said),
                "answer": said,
                "answers": list(sample.answers),
                "words": sample.length,
                "prompt_tokens": len(context) + len(question),
            }
        )
    return records


def score(sample: Sample, said: str) -> float:
    """The score of what was said: against the answer it comes closest to."""
    metric = TASKS[sample.task]
    if metric is scores.classification:
        metric = partial(metric, classes=sample.classes)
    if sample.task in FIRST_LINE:
        said = said.lstrip("\n").split("\n")[0]
    return max(metric(said, expected) for expected in sample.answers)


def prompt(tokenizer: Any, sample: Sample, length: int) -> tuple[list[int], list[int]]:
    """Tokens of context and question, cut so that the answer fits into `length` tokens beside them."""
    return cut(*split_tokens(tokenizer, sample.context, sample.question), length - sample.tokens)


def cut(context: Sequence[int], question: Sequence[int], length: int) -> tuple[list[int], list[int]]:
    """Both as they are, or, where they are longer than `length` together, the first and the last half of `length`.

    length is 2 or more. A question of more than half loses tokens too.
    """
    tokens, boundary = [*context, *question], len(context)
    if len(tokens) > length:
        start, end = length // 2, len(tokens) - length // 2
        tokens = tokens[:start] + tokens[end:]
        boundary = min(boundary, start) + max(0, boundary - end)
    return tokens[:boundary], tokens[boundary:]


def read(folder: str | Path, task: str) -> list[Sample]:
    """A task's samples in the file's order.

    Raises InputError for a missing file, FormatError with file and line for anything that is not as LongBench publishes it.
    """
    template, tokens = _config(Path(folder) / "config", task)
    path = Path(folder) / "data" / f"{task}.jsonl"
    rows = [_sample(row, name, task, template, tokens) for name, row in _rows(path)]
    if not rows:
        raise FormatError(f"{path} has no samples")
    if len({row.id for row in rows}) < len(rows):
        raise FormatError(f"{path} has two samples with one _id")
    return rows


def _config(folder: Path, task: str) -> tuple[tuple[str, str], int]:
    """A task's prompt, before and after its context, and how many tokens it generates."""
    prompts, lengths = folder / "dataset2prompt.json", folder / "dataset2maxlen.json"
    template, tokens = _object(prompts).get(task), _object(lengths).get(task)
    before, _, after = template.partition("{context}") if isinstance(template, str) else ("", "", "")
    if not after or "{context}" in after or "{input}" in before or not _is_text(before, after):
        raise FormatError(f"{prompts}: {task} should be a text with one {{context}} and the question after it")
    if type(tokens) is not int or not 1 <= tokens <= MAX_TOKENS:
        raise FormatError(f"{lengths}: {task} should be a number of tokens, 1 to {MAX_TOKENS}, not {tokens!r:.80}")
    return (before, after), tokens


def _object(path: Path) -> dict[str, Any]:
    with open_input(path) as file:
        text = file.read(MAX_CONFIG + 1)
    if len(text) > MAX_CONFIG:
        raise FormatError(f"{path} has more than {MAX_CONFIG} bytes")
    return parse_json(text, str(path))


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's place, for errors, and its object."""
    with open_input(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
            name = f"{path}, line {number}"
            if len(line) > MAX_LINE:
                raise FormatError(f"{name}: more than {MAX_LINE} bytes")
            yield name, parse_json(line, name)


def _sample(row: dict[str, Any], name: str, task: str, template: tuple[str, str], tokens: int) -> Sample:
    wrong = [key for key in ("input", "context", "dataset", "_id") if not _is_text(row.get(key))]
    if wrong or not row["context"]:
        raise FormatError(f"{name}: {', '.join(wrong) or 'context'} should be text, and the context not empty")
    if row["dataset"] != task:
        raise FormatError(f"{name}: a sample of {row['dataset']!r:.80} among those of {task}")
    answers, classes, length = row.get("answers"), row.get("all_classes") or [], row.get("length")
    if not isinstance(answers, list) or not answers or not _is_text(*answers) or max(map(len, answers)) > MAX_ANSWER:
        raise FormatError(f"{name}: answers should be 1 or more texts of up to {MAX_ANSWER} characters")
    if TASKS[task] is scores.retrieval and not all(map(scores.PARAGRAPH.search, answers)):
        raise FormatError(f"{name}: an answer names no paragraph, such as Paragraph 3")
    if (
        not isinstance(classes, list)
        or not _is_text(*classes)
        or (TASKS[task] is scores.classification and not classes)
    ):
        raise FormatError(f"{name}: all_classes should be a list of names")
    if type(length) is not int or length < 0:
        raise FormatError(f"{name}: length should be a number, not {length!r:.80}")
    before, after = template
    question = after.replace("{input}", row["input"])
    return Sample(task, row["_id"], before + row["context"], question, tuple(answers), tuple(classes), length, tokens)


def _is_text(*values: Any) -> bool:
    """Whether all are strings that can be encoded; JSON can also hold halves of characters."""
    if not all(isinstance(value, str) for value in values):
        return False
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        return False
    return True

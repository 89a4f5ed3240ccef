"""LongBench: 21 tasks on real texts in English and Chinese, https://arxiv.org/abs/2308.14508."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlxkv.config import Config
from mlxkv.errors import FormatError, InputError, suggest
from mlxkv.evaluate import answer_scores as scores
from mlxkv.evaluate.evaluation import EvalSample, Evaluation, Record, evaluations, option
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
FIRST_LINE_TASKS = ("trec", "triviaqa", "samsum", "lsht")  # models go on with more examples like those of the prompt
MAX_CONFIG_BYTES = 1 << 20  # bytes; the published files have 5 thousand
MAX_LINE_BYTES = 16 << 20  # bytes; the longest published context has less than a million
MAX_ANSWER = 32_768  # characters; ROUGE takes time and memory by the product of both texts' words
MAX_TOKENS = 4096  # to generate; the published numbers go up to 512


@dataclass(frozen=True)
class Sample:
    """One row of LongBench.

    Parameters
    ----------
    task
        Name of the task.
    id
        The row's `_id`.
    context
        The prompt up to the end of its long text.
    question
        The rest of the prompt.
    answers
        Right answers, 1 or more.
    classes
        Names of all classes of the task, or none.
    length
        As the row says, in words or Chinese characters.
    max_tokens
        The most tokens to generate.
    """

    task: str
    id: str
    context: str
    question: str
    answers: tuple[str, ...]
    classes: tuple[str, ...]
    length: int
    max_tokens: int


@dataclass(frozen=True)
class LongBenchOptions(Config):
    """Options of `mlxkv eval longbench`."""

    folder: Path = option(MISSING, "LongBench's own folder, with config/ and data/ in it")
    length: int = option(4096, "most tokens; the middle of more is cut out", least=1)
    tasks: tuple[str, ...] = option(tuple(TASKS), "tasks to run")

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.tasks if name not in TASKS]
        if unknown or not self.tasks:
            raise InputError(
                f"unknown LongBench tasks {', '.join(unknown) or '(none)'}", suggest((unknown or [""])[0], TASKS)
            )


@evaluations.register("longbench")
class LongBench(Evaluation):
    """Score answers to LongBench: 21 tasks on real texts in English and Chinese, https://arxiv.org/abs/2308.14508.

    - score: the task's own metric (F1, ROUGE-L, accuracy or similarity), 0 to 1

    The data are not part of mlxkv. --folder is the folder LongBench of github.com/THUDM/LongBench with the data
    unpacked in it: config/dataset2prompt.json, config/dataset2maxlen.json and data/TASK.jsonl. Tasks: narrativeqa,
    qasper, multifieldqa_en, multifieldqa_zh, hotpotqa, 2wikimqa, musique, dureader, gov_report, qmsum, multi_news,
    vcsum, trec, triviaqa, samsum, lsht, passage_count, passage_retrieval_en, passage_retrieval_zh, lcc, repobench-p.

    Notes
    -----
    The cache is built of the prompt up to the end of its long text; the rest, the question, is asked then. Metrics,
    tokens to generate, and the tasks of which only the first line of an answer counts are the published ones.
    Departures:

    - prompts have no chat template, which LongBench adds for chat models in 15 of the tasks;
    - the length includes the answer, and a prompt that was cut is not decoded and tokenized again;
    - samsum's answers do not end at a new line. Their first line counts either way; LongBench forbids an empty one;
    - the row of all tasks is the mean of tasks; LongBench's is the mean of six kinds of tasks, by language.
    """

    options_class = LongBenchOptions
    scores = ("score",)
    options: LongBenchOptions

    def samples(self, tokenizer: Any, seed: int) -> list[EvalSample]:
        """Return all samples of all tasks, the same for every seed; groups are tasks."""
        drawn = [sample for task in self.options.tasks for sample in read_task(self.options.folder, task)]
        for sample in {sample.task: sample for sample in drawn}.values():
            score(sample, "")  # a missing package should be found out before the model works
            if self.options.length < sample.max_tokens + 2:
                raise InputError(
                    f"{sample.task} generates {sample.max_tokens} tokens; a length of {self.options.length} leaves no prompt"
                )
        return [
            EvalSample(
                {"task": sample.task, "id": sample.id},
                partial(ask_sample, sample, self.options.length),
                group=sample.task,
            )
            for sample in drawn
        ]


def ask_sample(sample: Sample, length: int, model: Any, tokenizer: Any, variants: Sequence[Variant]) -> list[Record]:
    """Ask the question of a sample with every variant.

    Parameters
    ----------
    sample
        The sample.
    length
        The most tokens of prompt and answer together.
    model, tokenizer
        As `mlxkv.lm.load` returns them.
    variants
        The variants.

    Returns
    -------
    list of dict
        For each variant its name, sizes, `score`, `answer`, the right `answers`, `words` (the row's length), and
        `prompt_tokens`.
    """
    context, question = tokenize_prompt(tokenizer, sample, length)
    records = []
    for variant, cached in iter_variants(model, variants, context):
        answer = tokenizer.decode(
            generate_answer(model, tokenizer, cached, question, sample.max_tokens), skip_special_tokens=True
        )
        records.append(
            {
                "variant": variant.name,
                **cached.sizes,
                "score": score(sample, answer),
                "answer": answer,
                "answers": list(sample.answers),
                "words": sample.length,
                "prompt_tokens": len(context) + len(question),
            }
        )
    return records


def score(sample: Sample, answer: str) -> float:
    """Score an answer with the metric of its task.

    Parameters
    ----------
    sample
        The sample.
    answer
        Text that the model generated.

    Returns
    -------
    float
        0 to 1: the highest score over the right answers.
    """
    metric = TASKS[sample.task]
    if metric is scores.classification:
        metric = partial(metric, classes=sample.classes)
    if sample.task in FIRST_LINE_TASKS:
        answer = answer.lstrip("\n").split("\n")[0]
    return max(metric(answer, expected) for expected in sample.answers)


def tokenize_prompt(tokenizer: Any, sample: Sample, length: int) -> tuple[list[int], list[int]]:
    """Tokenize the prompt of a sample, and cut out its middle where it is too long.

    Parameters
    ----------
    tokenizer
        The model's.
    sample
        The sample.
    length
        The most tokens of prompt and answer together; 2 more than the answer's or more.

    Returns
    -------
    context : list of int
        Tokens that the cache is built of.
    question : list of int
        Tokens that come after them.
    """
    return truncate_middle(*split_tokens(tokenizer, sample.context, sample.question), length - sample.max_tokens)


def truncate_middle(context: Sequence[int], question: Sequence[int], length: int) -> tuple[list[int], list[int]]:
    """Cut the middle out of a context and a question that are too long together.

    Parameters
    ----------
    context, question
        Tokens.
    length
        The most tokens to keep, 2 or more: the first half of them and the last half.

    Returns
    -------
    context : list of int
        What is left of the context.
    question : list of int
        What is left of the question; it loses tokens only where it is longer than half of `length`.

    Examples
    --------
    >>> truncate_middle([0, 1, 2, 3, 4, 5], [6, 7], 6)
    ([0, 1, 2, 5], [6, 7])
    """
    tokens, boundary = [*context, *question], len(context)
    if len(tokens) > length:
        start, end = length // 2, len(tokens) - length // 2
        tokens = tokens[:start] + tokens[end:]
        boundary = min(boundary, start) + max(0, boundary - end)
    return tokens[:boundary], tokens[boundary:]


def read_task(folder: str | Path, task: str) -> list[Sample]:
    """Read the samples of a task.

    Parameters
    ----------
    folder
        LongBench's own, with config/ and data/ in it.
    task
        Name of the task.

    Returns
    -------
    list of Sample
        1 or more, in the order of the file.

    Raises
    ------
    InputError
        For a missing file.
    FormatError
        For anything that is not as LongBench publishes it; the message names file and line.
    """
    template, max_tokens = _config(Path(folder) / "config", task)
    path = Path(folder) / "data" / f"{task}.jsonl"
    rows = [_sample(row, name, task, template, max_tokens) for name, row in _rows(path)]
    if not rows:
        raise FormatError(f"{path} has no samples")
    if len({row.id for row in rows}) < len(rows):
        raise FormatError(f"{path} has two samples with one _id")
    return rows


def _config(folder: Path, task: str) -> tuple[tuple[str, str], int]:
    """Return a task's prompt, before and after its context, and the number of tokens to generate."""
    prompts, lengths = folder / "dataset2prompt.json", folder / "dataset2maxlen.json"
    template, tokens = _object(prompts).get(task), _object(lengths).get(task)
    before, _, after = template.partition("{context}") if isinstance(template, str) else ("", "", "")
    if not after or "{context}" in after or "{input}" in before or not _is_text(before, after):
        raise FormatError(f"{prompts}: {task} should be a text with one {{context}} and the question after it")
    if type(tokens) is not int or not 1 <= tokens <= MAX_TOKENS:
        raise FormatError(f"{lengths}: {task} should be a number of tokens, 1 to {MAX_TOKENS}, not {tokens!r:.80}")
    return (before, after), tokens


def _object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file."""
    with open_input(path) as file:
        text = file.read(MAX_CONFIG_BYTES + 1)
    if len(text) > MAX_CONFIG_BYTES:
        raise FormatError(f"{path} has more than {MAX_CONFIG_BYTES} bytes")
    return parse_json(text, str(path))


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place of each line, for errors, and the object in it."""
    with open_input(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
            name = f"{path}, line {number}"
            if len(line) > MAX_LINE_BYTES:
                raise FormatError(f"{name}: more than {MAX_LINE_BYTES} bytes")
            yield name, parse_json(line, name)


def _sample(row: dict[str, Any], name: str, task: str, template: tuple[str, str], max_tokens: int) -> Sample:
    """Return the sample of a row. Raises FormatError for anything that is not as LongBench publishes it."""
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
    return Sample(
        task, row["_id"], before + row["context"], question, tuple(answers), tuple(classes), length, max_tokens
    )


def _is_text(*values: Any) -> bool:
    """Return whether all are strings that can be encoded; JSON can also hold halves of characters."""
    if not all(isinstance(value, str) for value in values):
        return False
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        return False
    return True

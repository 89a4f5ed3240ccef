"""Help that fits a screen, and its examples, which all run."""

import inspect
import json
import re
import shlex
from io import StringIO

import pytest
import typer
from conftest import run
from mlx_lm.models.cache import make_prompt_cache, save_prompt_cache

from mlxkv import lm
from mlxkv.cli import build
from mlxkv.evaluate.tasks.longbench import TASKS as LONGBENCH
from mlxkv.evaluate.tasks.ruler import TASKS as RULER

LINES, WIDTH = 48, 80
TEXT = "The quick brown fox jumps over the lazy dog. Once upon a time in a land far away, nothing happened. "
ID = "4f0c2a91"  # of artifacts, in examples
# What keeps an example small, after its own words; without, some would take minutes.
SMALLER = {
    "artifacts rm": ["--yes"],
    "store rm": ["--yes"],
    "calibrate": ["--text", "notes.txt", "--budget-minutes", "0.05"],
    "chat": ["--max-tokens", "8"],
    "generate": ["--max-tokens", "8"],
    "eval": ["--samples", "1", "--context-tokens", "100", "--eval-tokens", "20"],
    "eval attention": ["--context-tokens", "64", "--queries", "4"],
    "eval fidelity": ["--samples", "1", "--context-tokens", "100", "--eval-tokens", "20"],
    "eval latency": ["--context-tokens", "64", "--tokens", "4", "--rounds", "1"],
    "eval longbench": ["--tasks", "trec,lcc"],
    "eval memory": ["--lengths", "64"],
    "eval needle": ["--lengths", "100", "--depths", "0.5"],
    "eval perplexity": ["--samples", "1", "--context-tokens", "100", "--eval-tokens", "20"],
    "eval ruler": ["--tasks", "fwe", "--lengths", "3000", "--samples", "1"],
    "eval text": ["--samples", "1", "--context-tokens", "50", "--max-tokens", "8"],
}
LAST = ("artifacts rm", "artifacts import")  # after all that need artifacts
ENDLESS = ("serve",)  # tests/serving has servers, which end
SLOW = ("doctor", "eval attention", "eval longbench", "eval memory", "eval ruler", "eval text")


def commands(command, words=()):
    """Every command and group of the application, with its words."""
    yield " ".join(words), command
    for name in command.list_commands(typer.Context(command)) if hasattr(command, "list_commands") else ():
        yield from commands(command.get_command(typer.Context(command), name), (*words, name))


COMMANDS = dict(commands(typer.main.get_command(build())))


def examples(words):
    """The examples in a command's help, in which a line may go on below."""
    found = re.findall(r"^Example: (.*?)(?:\n\n|\Z)", inspect.cleandoc(COMMANDS[words].help or ""), re.M | re.S)
    return [" ".join(example.split()) for example in found]


@pytest.mark.parametrize("words", COMMANDS)
def test_help_fits_a_screen_and_ends_with_an_example(words, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    assert run(*words.split(), "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= WIDTH
    assert examples(words)
    told = " ".join(" ".join(lines).split())
    assert all(f"Example: {example}" in told for example in examples(words))


@pytest.mark.parametrize(("words", "tasks"), [("eval ruler", RULER), ("eval longbench", LONGBENCH)])
def test_help_names_every_task(words, tasks):
    told = COMMANDS[words].help
    short = re.sub(r"(\w+_)(\d), _(\d) and _(\d)", r"\1\2 \1\3 \1\4", told).replace("qa_1, qa_2", "qa_1 qa_2")
    assert [name for name in tasks if not re.search(rf"\b{name}\b", short)] == []


@pytest.fixture(scope="module")
def place(model_dir, tmp_path_factory):
    """A folder with what examples read."""
    folder = tmp_path_factory.mktemp("examples")
    for name in ("notes.txt", "chat.txt"):
        (folder / name).write_text(TEXT * 6)
    model, tokenizer = lm.load(str(model_dir))
    cache = make_prompt_cache(model)
    lm.prefill(model, tokenizer.encode(TEXT * 6), cache)
    save_prompt_cache(str(folder / "chat.safetensors"), cache)
    bench = folder / "FOLDER"
    (bench / "config").mkdir(parents=True)
    (bench / "data").mkdir()
    (bench / "config/dataset2prompt.json").write_text(json.dumps(dict.fromkeys(LONGBENCH, "{context} {input}")))
    (bench / "config/dataset2maxlen.json").write_text(json.dumps(dict.fromkeys(LONGBENCH, 4)))
    for task in ("trec", "lcc"):
        row = {"input": "Which?", "context": TEXT, "answers": ["x"], "length": 9, "dataset": task, "language": "en"}
        (bench / f"data/{task}.jsonl").write_text(json.dumps({**row, "all_classes": ["x"], "_id": "0"}) + "\n")
    return folder


def as_here(word, model_dir):
    """A word of an example, with a tiny model for one that is large or not here, and an id that is there."""
    from mlxkv.codec import library

    if word == "smollm2-135m" or word.startswith("mlx-community/"):
        return str(model_dir)
    return library.short_id(library.items()[0], library.items()) if word == ID else word


def rank(words):
    """Commands in an order in which what one reads was written before: as they are used."""
    order = ("plan", "chat", "compress", "decompress", "inspect", "generate", "calibrate")
    return (words in LAST and 1 + LAST.index(words), order.index(words) if words in order else len(order))


@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_example_runs(slow, place, model_dir, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setenv("MLXKV_ARTIFACTS", str(place / "library"))
    monkeypatch.setenv("MLXKV_HOME", str(place / "home"))
    failed, done = {}, set()
    for words in sorted((words for words in COMMANDS if (words in SLOW) == slow and words not in ENDLESS), key=rank):
        for example in examples(words):
            first, *rest = shlex.split(example)
            if first != "mlxkv" or example in done:
                continue
            done.add(example)
            monkeypatch.setattr("sys.stdin", StringIO("Hello.\n/quit\n"))
            if code := run(*(as_here(word, model_dir) for word in rest), *SMALLER.get(words, [])):
                failed[example] = code, capsys.readouterr().err[-800:]
    assert failed == {}

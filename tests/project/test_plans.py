import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import typer

from benchmarks.run import STUDIES, phases
from mlxkv.cli import build
from mlxkv.live import live_config

ROOT = Path(__file__).parents[2]
COMMANDS = re.findall(r"`((?:python -m|mlxkv|make|pytest) [^`]+)`", (ROOT / "docs" / "plans.md").read_text())
COMMAND_LINE = typer.main.get_command(build())
PHASES = phases() | STUDIES  # a settled study's command says how its code is brought back


def problem(command: str) -> str | None:
    """What of a command does not exist, or None. Files and models that a command names are not looked for."""
    match shlex.split(command):
        case ["python", "-m", "benchmarks.run", *words]:
            return _of_run(words)
        case ["python", "-m", module, *_]:
            return None if (ROOT / f"{module.replace('.', '/')}.py").exists() else f"no module {module}"
        case ["make", *targets]:
            known = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
            return next((f"no target {target}" for target in targets if target not in known), None)
        case ["pytest", *files]:
            return next((f"no {file}" for file in files if not (ROOT / file).is_file()), None)
        case ["mlxkv", *words]:
            return _of_mlxkv(words)
    return "no such command"


def _of_run(words: list[str]) -> str | None:
    for before, word in zip(["", *words], words):
        if before == "--phase":
            if int(word) not in PHASES.values():
                return f"no phase {word}"
        elif word not in (*PHASES, "NAME", "--phase", "--all", "--quick"):
            return f"no benchmark {word}"
    return None


def _of_mlxkv(words: list[str]) -> str | None:
    """Parses as the command line does, without running anything: unknown and missing options are noticed."""
    command = COMMAND_LINE
    try:
        while hasattr(command, "resolve_command"):
            context = command.make_context("mlxkv", [*words])
            _, command, words = command.resolve_command(context, words)
        command.make_context("mlxkv", [*words])
        for before, word in pairwise(words):
            if before == "--cache":
                live_config(word)
    except Exception as error:
        if not hasattr(error, "exit_code"):  # as those of wrong use have; their types differ by Typer's version
            raise
        return str(error)
    return None


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_every_command_of_the_plans_exists(command):
    assert problem(command) is None


@pytest.mark.parametrize(
    "command",
    [
        "python -m benchmarks.run nonsense",
        "python -m benchmarks.run --phase 99",
        "python -m benchmarks.nonsense",
        "make nonsense",
        "pytest tests/test_nonsense.py",
        "mlxkv nonsense",
        "mlxkv eval nonsense",
        "mlxkv _output",
        "mlxkv eval fidelity --cache int8",
        "mlxkv eval fidelity --model smollm2-135m --cache int5",
        "mlxkv eval fidelity --model smollm2-135m --nonsense 1",
    ],
)
def test_a_command_that_does_not_exist_is_noticed(command):
    assert problem(command) is not None


def test_every_line_of_the_plans_has_a_command():
    rows = [line for line in (ROOT / "docs" / "plans.md").read_text().splitlines() if line.startswith("| ")]
    bare = [row for row in rows if row != "| item | state | how |" and not re.search(r"`[^`]+`[^`|]*\|$", row)]
    assert not bare

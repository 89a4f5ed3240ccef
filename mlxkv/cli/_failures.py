"""Errors as people and programs read them: a message, what to do, and an exit code."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from mlxkv.cli._work import interrupted
from mlxkv.errors import MlxkvError, suggest

INTERRUPTED = 130
UsageError: Any = typer.BadParameter.__base__  # Typer has its own Click, or uses the package, by its version


@dataclass(frozen=True)
class Failure:
    """Why a command ended without a result."""

    error: str
    kind: str  # the name of an exception of mlxkv.errors, or Usage or Interrupted
    code: int
    hint: str = ""

    def show(self, as_json: bool) -> None:
        """Say it on standard error; and where JSON was asked for, as the one document on standard output."""
        console = Console(stderr=True)
        console.print(Text("error: ", "bold red").append(_plain(self.error)), soft_wrap=True)
        if self.hint:
            console.print(Text("       ").append(_plain(self.hint)), soft_wrap=True)
        if as_json:
            print(json.dumps({"error": self.error, "kind": self.kind, "code": self.code, "hint": self.hint or None}))


def failure_of(error: BaseException, words: list[str]) -> Failure:
    """Return what to say of an error of ours, of a wrong command line, or of an interruption."""
    if isinstance(error, MlxkvError):
        return Failure(error.message, type(error).__name__, error.exit_code, error.hint)
    if isinstance(error, UsageError):
        return _usage(error, words)
    message, left = interrupted()
    return Failure(message, "Interrupted", INTERRUPTED, left)


def _usage(error: Any, words: list[str]) -> Failure:
    """Return a mistake on the command line in plain words."""
    asked = words[: 1 + (words[:1] in (["artifacts"], ["eval"], ["store"]))]
    command = error.ctx.command_path if error.ctx else " ".join(["mlxkv", *asked])
    everything = f"{command} --help"
    option, message = getattr(error, "option_name", ""), error.message
    if type(error).__name__ == "NoSuchOption":
        known = {name for parameter in error.ctx.command.params for name in parameter.opts if name.startswith("--")}
        hint = suggest(option, known, everything)
        if hasattr(error.ctx.command, "list_commands"):
            hint = f"options of a command come after it; {everything} lists the commands"
        return Failure(f"{command} has no option {option}", "Usage", 2, hint)
    if message.startswith("No such command"):
        name, group = message.split("'")[1], error.ctx.command
        known = set(group.list_commands(error.ctx))
        return Failure(f"{command} has no command {name!r}", "Usage", 2, suggest(name, known, everything))
    text = error.format_message().rstrip(".").replace("Value error, ", "")
    text = text.replace("Got unexpected extra argument(s)", "there are more words than the command takes:")
    return Failure(text, "Usage", 2, f"{everything} explains it")


def _plain(text: str) -> str:
    """Return text without control characters, which a name or a file may hold."""
    return "".join(char if char.isprintable() or char == "\n" else "?" for char in text)

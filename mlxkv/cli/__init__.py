"""The command line: one command a file, which registers itself; `mlxkv compress` runs cli/compress.py.

Files whose name starts with an underscore are shared pieces. Only this package prints, and only here do errors turn
into messages and exit codes: 2 wrong use or missing file, 3 damaged file, 4 things that do not belong together,
5 unsupported model, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Annotated

import typer
from rich.console import Console

from mlxkv.cli._arguments import asks_for_json, with_new_names
from mlxkv.cli._commands import commands
from mlxkv.cli._failures import INTERRUPTED, Failure, UsageError, failure_of
from mlxkv.cli._output import warnings_as_notes
from mlxkv.cli._work import begin
from mlxkv.errors import MlxkvError
from mlxkv.version import __version__


def build() -> typer.Typer:
    """Return the application with every command file registered."""
    app = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for name, command in commands.items():
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name, context_settings=getattr(command, "context_settings", None))(command)
    app.callback()(_options)
    return app


def _print_version(asked: bool) -> None:
    if asked:
        print(f"mlxkv {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Key/value caches of mlx-lm models, many times smaller.

    Example: mlxkv chat --model smollm2-135m
    """


def main(arguments: list[str] | None = None) -> None:
    """Run a command line and exit with its code.

    Parameters
    ----------
    arguments
        Those of the process where None.
    """
    for name in ("stdout", "stderr"):  # closed ones: a file that is opened later may not take their place
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # for as long as the process runs
    try:
        try:
            code = _run(sys.argv[1:] if arguments is None else arguments)
        finally:
            sys.stdout.flush()  # here, where a full disk is told in one line
    except BrokenPipeError:  # whoever read the output has stopped
        sys.stderr.close()
        code = INTERRUPTED
    except OSError as error:  # of the standard output: whatever reads or writes files has errors of its own
        with suppress(OSError):
            Failure(f"cannot write the output: {error}", "OSError", MlxkvError.exit_code).show(as_json=False)
        with suppress(OSError, ValueError):  # not again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = MlxkvError.exit_code
    sys.exit(code)


def _run(words: list[str]) -> int:
    """Run a command line, and return its exit code after saying what went wrong."""
    begin()
    app = build()
    try:
        renamed, found = with_new_names(app, words)
        for old, new in found.items():
            Console(stderr=True).print(f"note: {old} is called {new} now", soft_wrap=True, highlight=False)
        with warnings_as_notes():
            code = app(renamed, prog_name="mlxkv", standalone_mode=False) or 0
        if code != INTERRUPTED:  # which Typer makes of Ctrl-C
            return code
        failure = failure_of(KeyboardInterrupt(), words)
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            if error.message:  # with Rich the help is already printed
                print(error.message)
            return error.exit_code
        failure = failure_of(error, words)
    except (MlxkvError, KeyboardInterrupt, typer.Abort) as error:
        failure = failure_of(error, words)
    failure.show(asks_for_json(app, words))
    return failure.code

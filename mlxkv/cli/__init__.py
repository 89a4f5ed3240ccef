"""The command line: one command a file, which registers itself; `mlxkv compress` runs cli/compress.py.

Files whose name starts with an underscore are shared pieces. Only this package prints, and only here do errors turn
into messages and exit codes: 2 wrong use or missing file, 3 damaged file, 4 things that do not belong together,
5 unsupported model, 130 interrupted.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from mlxkv.cli._commands import commands
from mlxkv.errors import MlxkvError
from mlxkv.version import __version__

INTERRUPTED = 130
# Options of before the first release, by the commands that had them.
OLD_OPTIONS = {
    "compress": {"--w": "--recent", "--s": "--sinks"},
    "eval": {"--w": "--recent", "--s": "--sinks", "--at": "--context-tokens", "--predict": "--eval-tokens"},
}


def build() -> typer.Typer:
    """Return the application with every command file registered."""
    app = typer.Typer(
        help="Key/value caches of mlx-lm models, many times smaller.",
        no_args_is_help=True,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for name, command in commands.items():
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
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
    """Key/value caches of mlx-lm models, many times smaller."""


def main(arguments: list[str] | None = None) -> None:
    """Run a command line and exit with its code.

    Parameters
    ----------
    arguments
        Those of the process where None.
    """
    try:
        build()(_with_new_names(sys.argv[1:] if arguments is None else arguments))
    except MlxkvError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(INTERRUPTED)


def _with_new_names(arguments: list[str]) -> list[str]:
    """Return the arguments with old options as they are called now; and say so once for each."""
    old = OLD_OPTIONS.get(arguments[0], {}) if arguments else {}
    if arguments[:2] == ["eval", "latency"]:
        old = {**old, "--context": "--context-tokens"}
    renamed, said = [], set()
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if option in old and option not in said:
            said.add(option)
            Console(stderr=True).print(f"note: {option} is called {old[option]} now", soft_wrap=True)
        option = old.get(option, option)
        renamed.append(f"{option}{equals}{value}")
    return renamed

"""The command line. Every file here is a command: its name is the command's name, its `command` function, or application, the command.

Files whose name starts with an underscore are shared pieces. Only this package prints, and only here do errors turn
into messages and exit codes: 2 wrong use or missing file, 3 damaged file, 4 things that do not belong together,
5 unsupported model, 130 interrupted.
"""

from __future__ import annotations

import pkgutil
import sys
from importlib import import_module

import typer
from rich.console import Console
from rich.markup import escape

from mlxkv.errors import MlxkvError

INTERRUPTED = 130


def build() -> typer.Typer:
    """The application with every command file registered."""
    app = typer.Typer(
        help="Key/value caches of mlx-lm models, many times smaller.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            command = import_module(f"{__name__}.{module.name}").command
            if isinstance(command, typer.Typer):
                app.add_typer(command, name=module.name)
            else:
                app.command(module.name)(command)
    app.callback()(lambda: None)
    return app


def main(arguments: list[str] | None = None) -> None:
    """Run a command line and exit with its code."""
    try:
        build()(arguments)
    except MlxkvError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(INTERRUPTED)

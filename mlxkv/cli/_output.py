"""Tables, JSON, progress bars and option types that the commands share."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from mlxkv.cli._work import working

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, of the result or of the error.")]
Artifacts = Annotated[
    Path | None, typer.Option("--artifacts", help="Folder of artifacts, if not those that mlxkv artifacts lists.")
]


def note(text: str) -> None:
    """Say something beside the result, on standard error."""
    Console(stderr=True).print(_cell(f"note: {text}"), soft_wrap=True)


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Print what the library warns users of as notes, without the line of code that warned."""
    from mlxkv.errors import LibraryWarning, WeakFingerprintWarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, LibraryWarning | WeakFingerprintWarning):
            note(str(message))
        else:
            usual(message, category, *place, **more)

    with warnings.catch_warnings():
        usual, warnings.showwarning = warnings.showwarning, show
        yield


def print_record(facts: Mapping[str, Any], as_json: bool, title: str = "") -> None:
    """Print one record: JSON as it is, or a table of two columns."""
    if as_json:
        print(json.dumps(facts))
        return
    table = Table(title=_cell(title) if title else None, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in facts.items():
        for i, part in enumerate(_records(value) or [value]):
            table.add_row("" if i else key.replace("_", " "), _cell(format_value(key, part)))
    Console().print(table)


def _records(value: Any) -> list[dict[str, Any]]:
    """Return a list of records with names as people read them; an empty list for any other value."""
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        return []
    return [{name.replace("_", " "): item for name, item in part.items()} for part in value]


def print_table(rows: list[dict[str, Any]], as_json: bool, title: str = "") -> None:
    """Print several records with the same keys."""
    if as_json:
        print(json.dumps(rows))
        return
    table = Table(title=_cell(title) if title else None, title_justify="left")
    for key in rows[0]:
        table.add_column(key.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(_cell(format_value(key, value)) for key, value in row.items()))
    Console().print(table)


def format_value(key: str, value: Any) -> str:
    """Return a value as a person reads it; the key tells the unit."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return _number(key, value)
    if isinstance(value, dict):
        lists = any(isinstance(item, list | tuple) for item in value.values())
        return ("; " if lists else ", ").join(f"{name} {_item(name, item)}" for name, item in value.items()) or "-"
    if isinstance(value, list | tuple):
        return " x ".join(map(str, value)) if key.endswith("shape") else ", ".join(_ranges(value)) or "-"
    return str(value)


def _item(name: str, item: Any) -> str:
    """Return a value within a record; what is nested deeper stays as it is, for files may nest anything."""
    return str(item) if isinstance(item, dict) else format_value(name, item)


def _number(key: str, value: float) -> str:
    """Return a number with the unit that its key tells."""
    if key.endswith("bytes"):
        if value >= 1e10:
            return f"{value / 1e9:,.2f} GB"
        return f"{value / 1e6:,.2f} MB" if value >= 1e5 else f"{value:,.0f} B"
    if key.startswith("ratio"):
        return f"{value:.2f}x"
    if key.endswith("seconds"):
        return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms"
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}"


def _ranges(values: list[Any] | tuple[Any, ...]) -> list[str]:
    """Return items as text; three whole numbers or more that follow each other are a range, such as 0-29."""
    texts: list[str] = []
    runs: list[list[Any]] = []
    for value in values:
        if runs and type(value) is type(runs[-1][-1]) is int and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    for run in runs:
        texts += [f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run)
    return texts


def printable(text: str) -> str:
    """Return a text for a terminal without control characters, which could move the cursor or set the window's title."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)


def _cell(value: str) -> Text:
    """Return text from a file as it is: no markup, no control characters, no lone surrogates."""
    printable = value.encode("utf-8", "replace").decode()
    return Text("".join(char if char.isprintable() else "?" for char in printable), overflow="fold")


def _console_of_bars() -> Console:
    """Return standard error; where nobody watches it, a console that says nothing, not even Rich's empty lines."""
    console = Console(stderr=True)
    console.quiet = not console.is_interactive
    return console


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar with an estimate on standard error; yield a function that takes how much was done."""
    with counter(description, total) as (progress, task):
        yield lambda done: progress.advance(task, done)


@contextmanager
def counter(description: str, total: int | None = None) -> Iterator[tuple[Progress, TaskID]]:
    """Show a progress bar that the caller moves, for a total that comes to be known later."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=_console_of_bars(), transient=True)
    with working(description, spin=False), bar as progress:
        yield progress, progress.add_task(description, total=total)


@contextmanager
def steps(description: str, count: int) -> Iterator[Callable[[str], None]]:
    """Show a progress bar over named steps; yield a function to call as each step starts."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=_console_of_bars(), transient=True)
    with working(description, spin=False), bar as progress:
        task = progress.add_task("starting", total=count, completed=-1)

        def start(step: str) -> None:
            progress.update(task, description=step, advance=1)

        yield start


@contextmanager
def shares(description: str) -> Iterator[tuple[Callable[[str, float], None], Callable[[str], None]]]:
    """Show a progress bar over several kinds of work.

    Yield a function that takes what is being done and the share of everything that is done, and one that says something.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = _console_of_bars()
    bar = Progress(*columns, console=console, transient=True)
    with working(description, spin=False), bar as progress:
        task = progress.add_task(description, total=1.0)

        def say(text: str) -> None:
            (console if console.is_interactive else Console(stderr=True)).print(_cell(text), soft_wrap=True)

        yield lambda what, share: progress.update(task, description=what, completed=share), say

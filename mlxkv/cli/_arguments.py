"""A command line before it is run: old options, and whether JSON is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from mlxkv.errors import InputError

# Options of before the first release, by the commands that had them.
OLD_OPTIONS = {
    "compress": {"--w": "--recent", "--s": "--sinks"},
    "eval": {"--w": "--recent", "--s": "--sinks", "--at": "--context-tokens", "--predict": "--eval-tokens"},
    "eval latency": {"--context": "--context-tokens"},
}


def with_new_names(app: typer.Typer, arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return the arguments with old options as they are called now, and new names by the old ones that were found.

    A word is an option only where the command would read it as one, and not as the value of the option before it.
    Raises InputError where an option is given by both names.
    """
    if not any(word.partition("=")[0] in _every_old_option() for word in arguments):
        return arguments, {}
    renamed, found, given = list(arguments), {}, set()
    for place, option, path in _options(app, arguments):
        given.add(option)
        if new := _old_options(path).get(option):
            found[option] = new
            renamed[place] = new + arguments[place][len(option) :]
    for old, new in found.items():
        if new in given:
            raise InputError(f"{old} is the old name of {new}", "give one of them")
    return renamed, found


def asks_for_json(app: typer.Typer, arguments: list[str]) -> bool:
    """Return whether `--json` is among the options."""
    return "--json" in arguments and any(option == "--json" for _, option, _ in _options(app, arguments))


def _every_old_option() -> set[str]:
    return {old for options in OLD_OPTIONS.values() for old in options}


def _old_options(path: list[str]) -> dict[str, str]:
    """Return the old options of a command, by its words."""
    lists = (OLD_OPTIONS.get(" ".join(path[: n + 1]), {}) for n in range(len(path)))
    return {old: new for options in lists for old, new in options.items()}


def _options(app: typer.Typer, arguments: list[str]) -> Iterator[tuple[int, str, list[str]]]:
    """Yield the place and the name of each option, and the words of its command."""
    command: Any = typer.main.get_command(app)
    path: list[str] = []
    place = 0
    while place < len(arguments) and arguments[place] != "--":
        option, equals, _ = arguments[place].partition("=")
        if option.startswith("-"):
            yield place, option, path
            place += not equals and _old_options(path).get(option, option) in _with_value(command)
        elif hasattr(command, "get_command"):
            command = command.get_command(typer.Context(command), option)  # None for a name that is not there
            path.append(option)
        place += 1


def _with_value(command: Any) -> set[str]:
    """Return the options of a command that take a value."""
    parameters = getattr(command, "params", ())
    return {name for parameter in parameters if not getattr(parameter, "is_flag", False) for name in parameter.opts}

"""What a command is doing: shown while it lasts, and said when it is interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

_unfinished: list[tuple[str, str]] = []


@contextmanager
def working(what: str, left: str = "", spin: bool = True) -> Iterator[None]:
    """Show a spinner on a terminal while something takes its time, and remember what it is.

    `left` says what an interruption leaves behind, or how to go on.
    """
    _unfinished.append((what, left))
    console = Console(stderr=True)
    if spin and console.is_terminal:
        with console.status(f"{what} ..."):
            yield
    else:
        yield
    _unfinished.pop()  # not where it failed: `interrupted` is asked then


def begin() -> None:
    """Forget what an earlier command in this process was doing."""
    _unfinished.clear()


def interrupted() -> tuple[str, str]:
    """Return what was interrupted, and what is left of it."""
    if not _unfinished:
        return "interrupted", "nothing was written"
    left = next((left for _, left in reversed(_unfinished) if left), "nothing was written")
    return f"interrupted while {_unfinished[-1][0]}", left


def load_model(name: str) -> tuple[Any, Any]:
    """Load a model and its tokenizer, which takes seconds."""
    with working(f"loading {name}"):
        from mlxkv import lm

        return lm.load(name)

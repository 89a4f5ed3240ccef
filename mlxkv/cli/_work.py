"""The work that a command is doing: shown while it lasts, and named when it is interrupted."""

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


def promise(left: str) -> None:
    """Say what an interruption from here on leaves behind, where `working` says nothing else."""
    _unfinished.append(("", left))


def interrupted() -> tuple[str, str]:
    """Return what was interrupted, and what is left of it, if anything is to be said."""
    left = next((left for _, left in reversed(_unfinished) if left), "")
    what = next((what for what, _ in reversed(_unfinished) if what), "")
    return f"interrupted while {what}" if what else "interrupted", left


def load_model(name: str) -> tuple[Any, Any]:
    """Load a model and its tokenizer, which takes seconds."""
    with working(f"loading {name}"):
        from mlxkv import lm

        return lm.load(name)

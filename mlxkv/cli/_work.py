"""The work that a command is doing: shown while it lasts, and named when it is interrupted."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
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


@contextmanager
def ending_at_interrupt() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C end something between two steps; yield a function that says whether it was asked for.

    So nothing is stopped in the middle of a step. A second Ctrl-C interrupts at once, as always.
    """
    asked = threading.Event()

    def ask(*_: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    usual = signal.getsignal(signal.SIGINT)
    if usual is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield asked.is_set  # whoever embeds the command, or ignores the signal, has reasons
        return
    signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, usual)


def load_model(name: str, adapter_path: Path | None = None) -> tuple[Any, Any]:
    """Load a model, with an adapter in it if one is named, and its tokenizer, which takes seconds."""
    with working(f"loading {name}"):
        from mlxkv import lm

        return lm.load(name, adapter_path)

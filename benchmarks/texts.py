"""Offline text for calibration and for holding out: what any Python has, and `benchmarks/texts/*.txt`.

Calibration reads Python's language documentation (`pydoc_data.topics`). Held-out text is either of that kind
(other topics) or of other kinds: code, API reference, legal prose, fiction, essay, chat.
"""

from __future__ import annotations

import pydoc
import pydoc_data.topics
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

FOLDER = Path(__file__).parent / "texts"
_HELD_OUT_SHARE = 4  # every fourth topic is never calibrated on


def documentation(held_out: bool) -> list[str]:
    """Python's documentation topics, sorted by name: every fourth is held out, the rest is for calibration.

    Topics repeat each other's sections, so calibration leaves out every paragraph with a line that is held out.
    """
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    held = [text for i, text in enumerate(topics) if i % _HELD_OUT_SHARE == 1]
    if held_out:
        return held
    known = {line for text in held for line in long_lines(text)}
    rest = [text for i, text in enumerate(topics) if i % _HELD_OUT_SHARE != 1]
    return ["\n\n".join(part for part in text.split("\n\n") if not known & long_lines(part)) for text in rest]


def long_lines(text: str) -> set[str]:
    """The lines that are long enough to be no coincidence, without their indentation."""
    return {line.strip() for line in text.splitlines() if len(line.strip()) > 30}


def code(module: str) -> str:
    """Source of a standard-library module."""
    return Path(str(import_module(module).__file__)).read_text()


def reference(module: str) -> str:
    """API reference of a standard-library module as `help()` prints it."""
    return pydoc.plain(pydoc.render_doc(import_module(module)))


def written(name: str) -> str:
    """One of the texts written for this project."""
    return (FOLDER / f"{name}.txt").read_text()


OTHER_KINDS: dict[str, Callable[[], str]] = {
    "legal": lambda: written("legal"),
    "story": lambda: written("story"),
    "essay": lambda: written("letter_history"),
    "chat-travel": lambda: written("chat_travel"),
    "chat-support": lambda: written("chat_support"),
    "chat-code": lambda: written("chat_code_help"),
    "code": lambda: code("heapq"),
    "reference": lambda: reference("statistics"),
}


def same_kind(tokenizer: object, length: int, count: int) -> list[list[int]]:
    """`count` stretches of held-out documentation, each `length` tokens, spread evenly."""
    return spread(tokenizer.encode("\n".join(documentation(held_out=True))), length, count)  # type: ignore[attr-defined]


def calibration(tokenizer: object, length: int, count: int) -> list[list[int]]:
    """`count` stretches of calibration documentation, each `length` tokens, spread evenly."""
    return spread(tokenizer.encode("\n".join(documentation(held_out=False))), length, count)  # type: ignore[attr-defined]


def spread(tokens: list[int], length: int, count: int) -> list[list[int]]:
    """`count` stretches of `length` tokens at even distances; they do not overlap while there is room."""
    last = len(tokens) - length
    starts = [round(i * last / max(1, count - 1)) for i in range(count)]
    return [tokens[start : start + length] for start in starts]

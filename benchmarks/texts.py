"""Offline text for calibration and for holding out: what any Python has, and `benchmarks/texts/*.txt`.

Calibration reads Python's language documentation (`pydoc_data.topics`). Held-out text is either of that kind
(other topics) or of other kinds: code, API reference, legal prose, fiction, essay, chat. The miniatures were trained on
three quarters of the documentation and on the standard library's sources, of which every eighth module was held out.
"""

from __future__ import annotations

import pydoc
import pydoc_data.topics
import sysconfig
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from mlxkv.bundled import miniatures
from mlxkv.lm import text_start

FOLDER = Path(__file__).parent / "texts"
END = 256  # the miniatures' token between texts; all others are bytes
_STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
_HELD_OUT_SHARE = 4  # every fourth topic is never calibrated on
_HELD_OUT_MODULES = 8  # every eighth module was never trained on


def documentation(held_out: bool) -> list[str]:
    """Return Python's documentation topics, sorted by name: every fourth is held out, the rest is for calibration.

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
    """Return the lines that are long enough to be no coincidence, without their indentation."""
    return {line.strip() for line in text.splitlines() if len(line.strip()) > 30}


def code(module: str) -> str:
    """Return the source of a module of the standard library that is one file."""
    return (_STANDARD_LIBRARY / f"{module}.py").read_text(encoding="utf-8")


def reference(module: str) -> str:
    """Return the API reference of a standard-library module as `help()` prints it."""
    return pydoc.plain(pydoc.render_doc(import_module(module)))


def written(name: str) -> str:
    """Return one of the texts written for this project."""
    return (FOLDER / f"{name}.txt").read_text(encoding="utf-8")


OTHER_KINDS: dict[str, Callable[[], str]] = {
    "legal": partial(written, "legal"),
    "story": partial(written, "story"),
    "essay": partial(written, "letter_history"),
    "chat-travel": partial(written, "chat_travel"),
    "chat-support": partial(written, "chat_support"),
    "chat-code": partial(written, "chat_code_help"),
    "code": partial(code, "heapq"),
    "reference": partial(reference, "statistics"),
}


def same_kind(tokenizer: Any, length: int, count: int) -> list[list[int]]:
    """Return `count` stretches of held-out documentation, each `length` tokens, spread evenly."""
    return spread(tokenizer.encode("\n".join(documentation(held_out=True))), length, count, text_start(tokenizer))


def calibration(tokenizer: Any, length: int, count: int) -> list[list[int]]:
    """Return `count` stretches of calibration documentation, each `length` tokens, spread evenly."""
    return spread(tokenizer.encode("\n".join(documentation(held_out=False))), length, count, text_start(tokenizer))


def spread(tokens: list[int], length: int, count: int, first: Sequence[int] = ()) -> list[list[int]]:
    """Return `count` stretches of `length` tokens at even distances; they do not overlap while there is room.

    Each begins with `first`, the tokens that every text begins with.
    """
    last = len(tokens) - length
    starts = [round(i * last / max(1, count - 1)) for i in range(count)]
    return [[*first, *tokens[start + len(first) : start + length]] for start in starts]


def held_out(model: str, tokenizer: Any, length: int) -> dict[str, list[int]]:
    """Return held-out texts of `length` tokens by name: nine for a miniature, ten for any other model."""
    if not model.startswith(miniatures.PREFIX):
        found = {f"documentation-{i}": row for i, row in enumerate(same_kind(tokenizer, length, 2))}
        return found | {kind: tokenizer.encode(read())[:length] for kind, read in OTHER_KINDS.items()}
    streams = {kind: join_bytes(documents).tolist() for kind, documents in held_out_of_miniatures().items()}
    return {f"{kind}-{i}": row for kind, stream in streams.items() for i, row in enumerate(spread(stream, length, 3))}


def modules(held_out: bool) -> list[str]:
    """Return names of the standard library's one-file modules that no miniature has read, or of those that they have."""
    elsewhere = {"heapq", "statistics"}  # OTHER_KINDS
    names = sorted(path.stem for path in _STANDARD_LIBRARY.glob("[a-z]*.py"))
    unread = [name for i, name in enumerate(names) if i % _HELD_OUT_MODULES == 1 or name in elsewhere]
    return unread if held_out else [name for name in names if name not in unread]


def held_out_of_miniatures() -> dict[str, list[str]]:
    """Return the texts by kind that no miniature has read: documentation, code and other."""
    return {
        "documentation": documentation(held_out=True),
        "code": [code(name) for name in modules(held_out=True)],
        "other": [read() for read in OTHER_KINDS.values()],
    }


def join_bytes(documents: list[str]) -> np.ndarray:
    """Return a miniature's tokens `[T]`, int32: each document's UTF-8 bytes and END."""
    return np.concatenate([np.append(np.frombuffer(text.encode(), np.uint8), np.int32(END)) for text in documents])

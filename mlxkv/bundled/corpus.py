"""Texts that calibration reads when the user names none: `corpus/<kind>/<name>.<suffix>`, written for this project."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from mlxkv.errors import InputError

FOLDER = Path(__file__).with_suffix("")
_WITH_MESSAGES = ("chat", "tools")  # kinds whose JSON files are conversations; elsewhere JSON is text like any other


class Text(NamedTuple):
    """One text of the corpus.

    Attributes
    ----------
    name
        Its file's name up to the first dot.
    kind
        Its folder's name: "chat", "code", "prose", ...
    text
        What it says; of a conversation, a plain rendering with one "Role: content" a turn.
    messages
        A conversation's turns, each with "role" and "content"; None where the text is none.
    """

    name: str
    kind: str
    text: str
    messages: list[dict[str, str]] | None


def texts() -> list[Text]:
    """Return the texts that ship along, the same ones in the same order everywhere.

    Returns
    -------
    list of Text
        Sorted by kind, then by file name.

    Raises
    ------
    InputError
        When the folder is missing or holds no text.
    """
    paths = [path for path in FOLDER.glob("[!._]*/[!._]*") if path.is_file()]
    if not paths:
        raise InputError(f"no texts in {FOLDER}; reinstall mlxkv")
    return [_read(path) for path in sorted(paths, key=lambda path: (path.parent.name, path.name))]


def _read(path: Path) -> Text:
    text = path.read_text(encoding="utf-8")
    kind = path.parent.name
    messages = _messages(text) if kind in _WITH_MESSAGES and path.suffix == ".json" else None
    return Text(path.name.split(".")[0], kind, text if messages is None else _plain(messages), messages)


def _messages(text: str) -> list[dict[str, str]] | None:
    """Return the turns of a conversation; None where the JSON is something else."""
    found = json.loads(text)
    if not isinstance(found, list) or not all(isinstance(turn, dict) for turn in found):
        return None
    known = all({"role", "content"} == set(turn) and all(isinstance(v, str) for v in turn.values()) for turn in found)
    return found if found and known else None


def _plain(messages: list[dict[str, str]]) -> str:
    return "\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in messages) + "\n"

"""Texts to calibrate on, as stretches of tokens: the bundled corpus or the user's files, kinds in turn, some of each held out."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlxkv import lm
from mlxkv.bundled.corpus import Text, texts
from mlxkv.errors import FormatError, InputError
from mlxkv.io.inputs import read_text
from mlxkv.sensitivity import STRETCH_TOKENS

# Files of a folder that are read; one that is given by its name may have any.
SUFFIXES = frozenset(
    [
        ".txt",
        ".md",
        ".markdown",
        ".rst",
        ".tex",
        ".html",
        ".xml",
        ".json",
        ".jsonl",
        ".csv",
        ".tsv",
        ".yaml",
        ".yml",
        ".toml",
        ".ini",
        ".log",
        ".diff",
        ".sql",
        ".sh",
        ".py",
        ".js",
        ".ts",
        ".java",
        ".c",
        ".h",
        ".cc",
        ".cpp",
        ".hpp",
        ".rs",
        ".go",
        ".swift",
        ".kt",
        ".rb",
        ".php",
        ".lua",
        ".r",
        ".jl",
        ".m",
        ".css",
    ]
)
MAX_FILE, MAX_FILES, MAX_CHARACTERS = 16 * 2**20, 5_000, 4_000_000  # bytes of one; of all texts together
LEAST_TOKENS = 256  # of all texts
_LEAST_HELD_OUT = 96  # tokens that tell something of fidelity
_HELD_OUT_DIVISOR = 4  # of a text that is the only one of its kind, the last part is held out if it has so many


class Stretch(NamedTuple):
    """Tokens that are run through the model at once.

    Attributes
    ----------
    kind
        Kind of the text.
    tokens
        At most 672, and they begin as every text of the model does.
    """

    kind: str
    tokens: list[int]


class Stretches(NamedTuple):
    """Stretches of texts.

    Attributes
    ----------
    trained
        Those to learn from, kinds in turn, so that any first few of them are diverse.
    held_out
        Those to measure with, at most one of each kind; none where there is too little text.
    """

    trained: list[Stretch]
    held_out: list[Stretch]


def read_texts(paths: Sequence[Path]) -> list[Text]:
    """Read the user's texts.

    Parameters
    ----------
    paths
        Files, and folders whose text files are read, those in folders within them too.

    Returns
    -------
    list of Text
        The kind of each is the folder that it lies in, of a file that is given by its name its suffix. JSON that is a list
        of messages with role and content is a conversation.

    Raises
    ------
    InputError
        When there are none, too many or too long ones, or one cannot be read.
    FormatError
        For a file that is no text, such as a picture.
    """
    found = [(file, kind) for path in paths for file, kind in _files(path)]
    if not found:
        raise InputError(f"there are no text files in {', '.join(str(path) for path in paths)[:200]}")
    if len(found) > MAX_FILES:
        raise InputError(f"{len(found):,} files are more than {MAX_FILES:,}: give a folder with fewer")
    share = MAX_CHARACTERS // len(found)
    return [_read(file, kind, share) for file, kind in found]


def cut(tokenizer: Any, sources: Sequence[Text], size: int = STRETCH_TOKENS) -> Stretches:
    """Cut texts into stretches of tokens, and hold some out.

    Parameters
    ----------
    tokenizer
        The model's. Conversations go through its chat template if it has one.
    sources
        The texts.
    size
        Most tokens of a stretch, 32 to 672.

    Returns
    -------
    Stretches
        The same for the same texts and tokenizer.

    Raises
    ------
    InputError
        For fewer than 256 tokens in all.
    """
    start = lm.text_start(tokenizer)
    kinds: dict[str, list[list[int]]] = {}
    for text in sources:
        kinds.setdefault(text.kind, []).append(_tokens(tokenizer, text, start))
    total = sum(len(tokens) for found in kinds.values() for tokens in found)
    if total < LEAST_TOKENS:
        raise InputError(
            f"the texts have {total} tokens, and {LEAST_TOKENS} are the least to learn from: give more text"
        )
    return cut_tokens(kinds, start, size)


def cut_tokens(
    texts: Mapping[str, Sequence[list[int]]], start: Sequence[int] = (), size: int = STRETCH_TOKENS, held_out: int = 1
) -> Stretches:
    """Cut texts that are tokens already into stretches, and hold some out.

    Parameters
    ----------
    texts
        The tokens of each text, without those that every text begins with, by kind.
    start
        Tokens that every text of the model begins with: each stretch is given them.
    size
        Most tokens of a stretch, 32 to 672.
    held_out
        Stretches of each kind to hold out, at most.

    Returns
    -------
    Stretches
        The same for the same texts.
    """
    size -= len(start)
    kinds: dict[str, list[list[int]]] = {kind: [] for kind in texts}
    for kind, found in texts.items():
        for tokens in found:
            _add(kinds[kind], tokens, size)
    parts = [(kind, _hold_out(found, size)) for kind, found in kinds.items() for _ in range(held_out)]
    orders = [_turns(kind, found, size) for kind, found in kinds.items()]
    trained = [stretch for turn in itertools.zip_longest(*orders) for stretch in turn if stretch]
    made = [Stretch(kind, [*start, *tokens]) for kind, tokens in parts if tokens]
    return Stretches([Stretch(kind, [*start, *tokens]) for kind, tokens in trained], made)


def default_texts() -> list[Text]:
    """Return the texts that ship with the package.

    Returns
    -------
    list of Text
        Of all kinds.
    """
    return texts()


def _files(path: Path) -> Iterator[tuple[Path, str]]:
    """Yield the files that a path stands for, and their kinds."""
    if not path.is_dir():
        yield path, path.suffix.removeprefix(".") or "text"
        return
    for count, file in enumerate(sorted(path.rglob("[!.]*"))):
        if count > 20 * MAX_FILES:
            raise InputError(f"{path} has too many files: give a folder with fewer")
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if not hidden and file.suffix.lower() in SUFFIXES and file.is_file():
            yield file, str(file.parent.relative_to(path)) if file.parent != path else file.suffix.removeprefix(".")


def _read(file: Path, kind: str, share: int) -> Text:
    text = read_text(file, MAX_FILE)
    if "\0" in text:
        raise FormatError(f"{file} is no text: it has bytes that are 0")
    messages = _messages(text) if file.suffix.lower() == ".json" else None
    if messages:
        text = "\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in messages)
    return Text(file.name, kind, text[:share], messages if len(text) <= share else None)


def _messages(text: str) -> list[dict[str, str]] | None:
    """Return the turns of a conversation, or None for any other JSON."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None  # a text about JSON, then
    found = found.get("messages") if isinstance(found, dict) else found
    if not isinstance(found, list) or not found:
        return None
    whole = all(
        isinstance(turn, dict) and all(isinstance(turn.get(k), str) for k in ("role", "content")) for turn in found
    )
    return [{key: turn[key] for key in ("role", "content")} for turn in found] if whole else None


def _tokens(tokenizer: Any, text: Text, start: Sequence[int]) -> list[int]:
    """Return the tokens of a text without those that every text begins with."""
    tokens: list[int] | None = None
    if text.messages and getattr(tokenizer, "has_chat_template", False):
        try:
            tokens = list(tokenizer.apply_chat_template(text.messages, tokenize=True))
        except Exception:  # noqa: BLE001  # templates raise what they like, such as for a role that they do not know
            tokens = None
    if tokens is None:
        tokens = list(tokenizer.encode(text.text))
    return tokens[len(start) :] if tokens[: len(start)] == list(start) else tokens


def _add(found: list[list[int]], tokens: list[int], size: int) -> None:
    """Add a text to those of its kind; short ones are joined."""
    if found and min(len(found[-1]), len(tokens)) < size // 2:
        found[-1] = found[-1] + tokens
    elif tokens:
        found.append(tokens)


def _hold_out(found: list[list[int]], size: int) -> list[int]:
    """Take one stretch out of the texts of a kind: the shortest text that fills one, or the end of the only one."""
    enough = [tokens for tokens in found if len(tokens) >= size // 2]
    if len(found) > 2 and enough:
        shortest = min(enough, key=len)
        found.remove(shortest)
        return shortest[:size]
    longest = max(found, key=len, default=[])
    count = min(size, len(longest) // _HELD_OUT_DIVISOR)
    if count < _LEAST_HELD_OUT:
        return []
    found[found.index(longest)] = longest[:-count]
    return longest[-count:]


def _turns(kind: str, found: Sequence[list[int]], size: int) -> list[tuple[str, list[int]]]:
    """Return a kind's stretches: the first of each text, then the second of each."""
    parts = []
    for tokens in found:
        count = -(-len(tokens) // size)
        edges = [len(tokens) * i // count for i in range(count + 1)]
        parts.append([(kind, tokens[a:b]) for a, b in itertools.pairwise(edges)])
    return [part for turn in itertools.zip_longest(*parts) for part in turn if part and len(part[1]) >= 16]

"""Kinds of files, told by their first bytes: one of another kind is named, and not called damaged."""

from __future__ import annotations

import sys
from pathlib import Path

from mlxkv.errors import FormatError, InputError

DUMP, COMPRESSED, LIVE, PROMPT = "a dump (.npz)", "a compressed cache", "a saved live cache", "a .safetensors file"
_ADVICE = {
    DUMP: "mlxkv compress makes a compressed file of it, mlxkv generate goes on from it",
    COMPRESSED: "mlxkv decompress makes a dump of it, mlxkv generate goes on from it",
    LIVE: "mlxkv generate goes on from it",
    PROMPT: "mlxkv generate goes on from a prompt cache of mlx-lm",
}
_ENDINGS = {".npz": "npz", ".mlxkv": "mlxkv", ".cache": "live", ".safetensors": "prompt"}
_OURS = (".npz", ".mlxkv", ".safetensors")  # of a file with such a name, strange bytes are damage


def kind_of(path: Path) -> str:
    """Return what a file is.

    Raises InputError for a file of something else, FormatError for one that is damaged at its beginning.
    """
    from mlxkv.cli._sessions import session_names, session_path
    from mlxkv.io.container import MAGIC
    from mlxkv.io.inputs import open_input

    if path.is_dir():
        raise InputError(f"{path} is a folder, not a file", "mlxkv inspect describes a folder of artifacts")
    if not path.exists() and str(path) in session_names():
        raise InputError(f"there is no file {path}", f"the session of this name is {session_path(str(path))}")
    with open_input(path) as file:
        start = file.read(512)
    if start.startswith(MAGIC):
        return LIVE if _is_live(path) else COMPRESSED
    if start.startswith(b"PK\x03\x04"):
        return DUMP
    if start[8:9] == b"{" and not any(start[5:8]):  # a length of eight bytes, then JSON
        return PROMPT
    if not start or (path.suffix in _OURS and not _is_text(start)):
        what = "is empty" if not start else f"begins with {start[:8]!r}, as no {path.suffix} file does"
        raise FormatError(f"{path} {what}: it is damaged", "take another copy, or make it again")
    looks = "it looks like text" if _is_text(start) else f"it begins with {start[:8]!r}"
    raise InputError(
        f"{path} is no file of mlxkv: {looks}",
        "files of mlxkv are dumps (.npz), compressed caches, saved live caches and folders of artifacts",
    )


def check_kind(path: Path, expected: str) -> None:
    """Raise InputError for a file of another kind than a command takes."""
    if (found := kind_of(path)) != expected:
        raise InputError(f"{path} is {found}, and {expected} is needed here", _ADVICE[found])


def kind_by_ending(path: Path, otherwise: str = "") -> str:
    """Return which kind of `mlxkv.conversion` a file to write is; raise InputError where its ending does not tell."""
    if (found := _ENDINGS.get(path.suffix.lower())) is None:
        *most, last = _ENDINGS
        names = f"give it a name that ends in {', '.join(most)} or {last}"
        raise InputError(
            f"the ending of {path} does not tell what to write", names + (otherwise and f", or {otherwise}")
        )
    return found


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """Return the text of --prompt, or of --prompt-file, where - is the standard input.

    Raises InputError unless one of them is given and can be read, FormatError for what is no UTF-8.
    """
    from mlxkv.io.inputs import MAX_TEXT, read_text

    if (prompt is None) == (prompt_file is None):
        raise InputError("give either --prompt or --prompt-file")
    if prompt_file is None:
        try:
            str(prompt).encode()
        except UnicodeEncodeError:  # bytes that are no text come as lone surrogates
            raise InputError("--prompt is not UTF-8 text") from None
        return str(prompt)
    if prompt_file != Path("-"):
        return read_text(prompt_file)
    if sys.stdin is None:
        raise InputError("the standard input is closed")
    data = sys.stdin.buffer.read(MAX_TEXT + 1)
    if len(data) > MAX_TEXT:
        raise InputError(f"the standard input has more than {MAX_TEXT >> 20} MiB; give a part of it")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"the standard input is not UTF-8 text: {error}") from None


def _is_live(path: Path) -> bool:
    from mlxkv.io.container import Reader

    with Reader(path) as reader:
        return reader.header.get("kind") == "live cache"


def _is_text(start: bytes) -> bool:
    """Return whether bytes are UTF-8 without control characters; the last character may be cut."""
    text = start.decode("utf-8", "replace")
    odd = [char for char in text[:-1] if char == "\ufffd" or not (char.isprintable() or char.isspace())]
    return bool(text) and not odd

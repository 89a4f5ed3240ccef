"""Opening and parsing untrusted input: regular files only, of bounded size, and JSON objects only.

Nothing here or in a reader that uses it allocates more than the size of its input or a stated limit justifies.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import IO, Any

from mlxkv.errors import FormatError, InputError

MAX_TEXT = 64 * 2**20  # bytes of a text; HotpotQA's development set has 46 million
MAX_JSON = 16 * 2**20  # bytes of a header or a description: parsed, it can take 25 times as many
FREE_BYTES = 256 * 2**20  # what any file may decode to
MAX_RATIO = 200  # of what a larger one decodes to and its own bytes; caches of real text reach about 60


def open_input(path: str | Path) -> IO[bytes]:
    """Open a regular file for reading.

    Parameters
    ----------
    path
        File to read.

    Returns
    -------
    IO[bytes]
        The open file.

    Raises
    ------
    InputError
        When it is missing, unreadable or not a regular file, such as a pipe.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError(f"cannot read {path}: not a regular file")
        return open(path, "rb")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:  # a path that cannot be one
        raise InputError(f"cannot read {str(path)!r}: {error}") from error


def read_bytes(path: str | Path, limit: int | None = None) -> bytes:
    """Read a regular file.

    Parameters
    ----------
    path
        The file.
    limit
        Bytes that it may have at most; None for any number.

    Returns
    -------
    bytes
        Its content.

    Raises
    ------
    InputError
        When it cannot be read, is no regular file, or has more bytes.
    """
    with open_input(path) as file:
        try:
            data = file.read() if limit is None else file.read(limit + 1)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if limit is not None and len(data) > limit:
        raise InputError(f"{path} has more than {limit >> 20} MiB; give a part of it")
    return data


def read_text(path: str | Path, limit: int = MAX_TEXT) -> str:
    """Read a UTF-8 file.

    Parameters
    ----------
    path
        The file.
    limit
        Bytes that it may have at most.

    Returns
    -------
    str
        Its text, without a byte order mark.

    Raises
    ------
    InputError
        When the file cannot be read or is longer than `limit`.
    FormatError
        When it is not UTF-8.
    """
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8 text: {error}") from None


def check_decoded_size(name: str, decoded: int, stored: int, limit: int | None = None) -> None:
    """Refuse a file that would decode to far more bytes than it has, before anything is allocated.

    Parameters
    ----------
    name
        Name of the file for messages.
    decoded
        Bytes that it says it decodes to.
    stored
        Bytes that it has.
    limit
        Bytes that it may decode to; None for 256 MiB or 200 times its own, whichever is more.

    Raises
    ------
    InputError
        When it would be more.

    Examples
    --------
    >>> check_decoded_size("small.mlxkv", decoded=2**20, stored=100)
    """
    allowed = max(FREE_BYTES, MAX_RATIO * stored) if limit is None else limit
    if decoded > allowed:
        raise InputError(
            f"{name}, {stored} bytes, would decode to {decoded}, and {allowed} are allowed; if you trust it,"
            " allow more with --limit (in Python limit=)"
        )


def parse_json(text: str | bytes, name: str) -> dict[str, Any]:
    """Parse a JSON object out of untrusted text.

    Parameters
    ----------
    text
        The text, or its bytes in UTF-8, UTF-16 or UTF-32.
    name
        Name of its source for messages.

    Returns
    -------
    dict
        The object.

    Raises
    ------
    FormatError
        When the text is anything else.

    Examples
    --------
    >>> parse_json(b'{"version": 1}', "meta.json")
    {'version': 1}
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError, TypeError) as error:
        raise FormatError(f"{name} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise FormatError(f"{name} should be a JSON object, not {type(data).__name__}")
    return data

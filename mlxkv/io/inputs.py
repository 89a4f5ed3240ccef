"""Opening and parsing untrusted input: regular files only, JSON objects only."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import IO, Any

from mlxkv.errors import FormatError, InputError


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

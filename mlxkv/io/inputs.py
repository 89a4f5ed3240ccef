"""Opening and parsing what somebody else wrote: regular files only, JSON objects only."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import IO, Any

from mlxkv.errors import FormatError, InputError


def open_input(path: str | Path) -> IO[bytes]:
    """Open a regular file for reading; a missing, unreadable or other one is an InputError."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError(f"cannot read {path}: not a regular file")
        return open(path, "rb")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def parse_json(text: str | bytes, name: str) -> dict[str, Any]:
    """A JSON object from untrusted text. Raises FormatError when it is anything else."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError, TypeError) as error:
        raise FormatError(f"{name} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise FormatError(f"{name} should be a JSON object, not {type(data).__name__}")
    return data

"""Files that one process works on for as long as it lives, such as a conversation: others are told so."""

from __future__ import annotations

import os
import weakref
from contextlib import suppress
from pathlib import Path

from mlxkv.errors import InputError
from mlxkv.io.disk import is_at, lock, write_target


class Ownership:
    """A file that belongs to this process until `release`, or until nothing refers to this object.

    Who owns a file has the file `.NAME.lock` beside it locked. A process that is killed leaves that file, but no lock.

    Parameters
    ----------
    path
        The file, which may not exist yet; links are followed.

    Attributes
    ----------
    target
        The file, without links.

    Raises
    ------
    InputError
        When another process, or another object in this one, owns it, or when its folder cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.target = write_target(path)
        beside = self.target.with_name(f".{self.target.name}.lock")
        try:
            file = _locked(beside)
        except OSError as error:
            raise InputError(f"cannot work on {path}: {error.strerror or error}") from error
        if file is None:
            raise InputError(
                f"another process works on {path}: two at once would lose what one of them writes",
                "end it first, or work on a copy",
            )
        self._release = weakref.finalize(self, _release, file, beside)

    def release(self) -> None:
        """Let other processes have the file."""
        self._release()


def _locked(path: Path) -> int | None:
    """Return the descriptor of a locked file, which is made if there is none; None where another process has it locked."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        try:
            if not lock(file, exclusive=True):
                os.close(file)
                return None
        except OSError:
            return file  # no locks here
        if is_at(file, path):
            return file
        os.close(file)  # its owner has removed it meanwhile


def _release(file: int, path: Path) -> None:
    with suppress(OSError):
        if is_at(file, path):
            os.unlink(path)
    with suppress(OSError):
        os.close(file)

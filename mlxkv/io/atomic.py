"""Writes that leave the old file or the complete new one if they are interrupted."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import IO

from mlxkv.errors import FormatError, InputError
from mlxkv.io.inputs import open_input

_JOURNAL = struct.Struct("<8sQ16s16s")  # magic, bytes to keep, BLAKE2b-128 of their beginning and of the tail
_JOURNAL_MAGIC = b"MLXKVjnl"
_CHECKED_BYTES = 2**20


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a file that appears under its name only when it is complete: written aside, flushed to disk, renamed.

    An exception (Ctrl-C too) removes the unfinished file; a killed process leaves only a `.tmp` file behind. A symbolic link
    stays one: its target is replaced.

    Parameters
    ----------
    path
        File to write.

    Yields
    ------
    IO[bytes]
        The file, open for writing.

    Raises
    ------
    InputError
        When it cannot be written, or when the path leads to a device, pipe or folder.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "numbers")
    >>> with atomic_write(path) as file:
    ...     _ = file.write(b"1 2 3")
    >>> path.read_bytes()
    b'1 2 3'
    """
    path = _target(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def replace_tail(path: str | Path, keep: int, tail: bytes) -> None:
    """Replace everything after the first `keep` bytes of a file, without writing those again.

    The tail is first written to a journal beside the file. If the process is killed at any time, the file is the old one or,
    once `finish_interrupted_append` has run, the new one.

    Parameters
    ----------
    path
        An existing file.
    keep
        Bytes to keep at its beginning.
    tail
        Bytes to put after them.

    Raises
    ------
    InputError
        When the file cannot be read or written.
    """
    journal = _journal(path)
    with open_input(path) as file:
        start = _digest(file.read(min(keep, _CHECKED_BYTES)))
    with atomic_write(journal) as file:
        file.write(_JOURNAL.pack(_JOURNAL_MAGIC, keep, start, _digest(tail)))
        file.write(tail)
    finish_interrupted_append(path)


def finish_interrupted_append(path: str | Path) -> None:
    """Finish an interrupted `replace_tail` if it left a journal beside the file.

    Parameters
    ----------
    path
        The file, not the journal.

    Raises
    ------
    FormatError
        When the journal is damaged or of another file.
    InputError
        When the file cannot be written.
    """
    journal = _journal(path)
    if not os.path.isfile(journal):
        return
    with open_input(journal) as opened:
        head, tail = opened.read(_JOURNAL.size), opened.read()
    magic, keep, start, expected = _JOURNAL.unpack(head.ljust(_JOURNAL.size, b"\0"))
    try:
        with open(_target(path), "r+b") as file:
            fits = os.fstat(file.fileno()).st_size >= keep and _digest(file.read(min(keep, _CHECKED_BYTES))) == start
            if magic != _JOURNAL_MAGIC or _digest(tail) != expected or not fits:
                raise FormatError(f"{journal} does not fit {path}: it is damaged or of another file; remove it")
            file.seek(keep)
            file.write(tail)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        journal.unlink()
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def _journal(path: str | Path) -> Path:
    """Return the path of a file's journal."""
    folder, name = os.path.split(os.path.realpath(path))
    return Path(folder, f".{name}.rest")


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


def _target(path: str | Path) -> Path:
    """Return where a write to `path` goes: through symbolic links, and never in place of a device, pipe or folder."""
    target = Path(path).resolve()
    if not str(path) or (target.exists() and not target.is_file()):
        raise InputError(f"cannot write {str(path)!r}: not a file name, or something else than a file")
    return target

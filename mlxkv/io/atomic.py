"""Files that are the old one or the complete new one, whatever interrupts the write."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from mlxkv.errors import InputError
from mlxkv.io.disk import (
    NEW_FILE,
    is_at,
    journal_path,
    lock,
    lock_new,
    sweep,
    sync,
    sync_folder,
    temporary_path,
    write_target,
)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a file that appears under its name only when it is complete: written aside, flushed to disk, renamed.

    An exception (Ctrl-C too) removes the unfinished file. A killed process leaves a `.tmp` file, which the next write of this
    file removes. A symbolic link stays one: its target is replaced. An append that had not been finished is gone with the old
    file. The new file has the old one's permissions.

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
    target = write_target(path)
    sweep(target)
    temporary: Path | None = None
    try:
        temporary, descriptor = _new_file(target)
        with os.fdopen(descriptor, "wb") as file:
            with suppress(FileNotFoundError):
                os.fchmod(descriptor, stat.S_IMODE(os.stat(target).st_mode) & 0o777)
            yield file
            file.flush()
            sync(descriptor)
            os.replace(temporary, target)
            temporary = None
        sync_folder(target.parent)
        _discard_journal(target)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)


def _new_file(target: Path) -> tuple[Path, int]:
    """Create a temporary file beside a target, locked for as long as it is open where there are locks."""
    while True:
        path = temporary_path(target)
        file = os.open(path, NEW_FILE, 0o666)
        if lock_new(file, path):
            return path, file
        os.close(file)  # someone who sweeps was faster, and removes it


def _discard_journal(target: Path) -> None:
    """Remove a journal of the file that stood here before, unless an append is under way: that one looks for itself."""
    path = journal_path(target)
    try:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return  # there is none, mostly
    try:
        if lock(file, exclusive=True) and is_at(file, path):
            os.unlink(path)
            sync_folder(path.parent)
    except OSError:
        pass
    finally:
        os.close(file)

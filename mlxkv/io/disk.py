"""Parts that writers and readers of files share: locks, flushes that survive a power cut, and names beside a file."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import stat
import time
from contextlib import suppress
from pathlib import Path

from mlxkv.errors import InputError

NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_POLL_SECONDS = 0.005
_OLD_SECONDS = 3600


def lock(file: int, *, exclusive: bool, wait: float = 0.0) -> bool:
    """Lock an open file against other processes, and other openings in this one, until it is closed.

    Parameters
    ----------
    file
        Descriptor of the file.
    exclusive
        Whether no one else may have a lock; otherwise others may share it.
    wait
        Seconds to wait for others, 0 or more.

    Returns
    -------
    bool
        Whether it is locked now.

    Raises
    ------
    OSError
        Where the file system has no locks.
    """
    kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    deadline = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
        time.sleep(_POLL_SECONDS)


def lock_new(file: int, path: Path) -> bool:
    """Lock a new temporary file or folder, so that it is not taken for litter.

    Parameters
    ----------
    file
        Its descriptor.
    path
        The path that it was made by.

    Returns
    -------
    bool
        False where `sweep` was faster and removes it.
    """
    try:
        return lock(file, exclusive=True) and is_at(file, path)
    except OSError:
        return True  # no locks here: nothing is swept either


def is_at(file: int, path: str | Path) -> bool:
    """Return whether a path still leads to an open file or folder, and not to one that has taken its place.

    Parameters
    ----------
    file
        Descriptor of the file.
    path
        The path it was opened by.

    Returns
    -------
    bool
        Whether they are the same.
    """
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def sync(file: int) -> None:
    """Wait until a file, or the names in a folder, would survive a power cut.

    Parameters
    ----------
    file
        Descriptor of the file or folder.

    Raises
    ------
    OSError
        When it cannot be written.
    """
    if hasattr(fcntl, "F_FULLFSYNC"):  # on a Mac fsync leaves data in the drive's cache
        with suppress(OSError):  # not every file system has it
            fcntl.fcntl(file, fcntl.F_FULLFSYNC)
            return
    os.fsync(file)


def sync_folder(folder: str | Path) -> None:
    """Wait until the names in a folder would survive a power cut, where the file system can do that.

    Parameters
    ----------
    folder
        The folder.
    """
    with suppress(OSError):  # some file systems do not flush folders, and some folders cannot be read
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sync(opened)
        finally:
            os.close(opened)


def write_target(path: str | Path) -> Path:
    """Return where a write to `path` goes: through symbolic links, and never in place of a device, pipe or folder.

    Parameters
    ----------
    path
        A file to write, which may not exist yet.

    Returns
    -------
    Path
        Its path without links.

    Raises
    ------
    InputError
        When something else than a file is there, or can never be.
    """
    try:
        target = Path(path).resolve()
        is_other = target.exists() and not target.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, or links in a circle
        raise InputError(f"cannot write {str(path)[:200]!r}: {getattr(error, 'strerror', None) or error}") from None
    if not str(path) or is_other:
        raise InputError(f"cannot write {str(path)!r}: not a file name, or something else than a file")
    return target


def journal_path(path: str | Path) -> Path:
    """Return the path of a file's journal of appends.

    Parameters
    ----------
    path
        The file; links are followed.

    Returns
    -------
    Path
        A hidden name beside it.
    """
    folder, name = os.path.split(os.path.realpath(path))
    return Path(folder, f".{name}.rest")


def temporary_path(target: Path) -> Path:
    """Return a name beside a file or folder that no one can guess.

    Parameters
    ----------
    target
        The file or folder.

    Returns
    -------
    Path
        A hidden name that is not in use.
    """
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")


def sweep(target: Path) -> None:
    """Remove what writers of a file or folder left beside it when they were killed.

    A writer locks its temporary file or folder as long as it lives. Older versions of mlxkv did not, but named theirs by their
    process: one without its process that has not changed for an hour is of a dead one.

    Parameters
    ----------
    target
        The file or folder that they wrote.
    """
    name = re.compile(rf"\.{re.escape(target.name)}\.([0-9a-f]{{16}}|\d{{1,10}})\.tmp")
    with suppress(OSError):
        for found in filter(None, map(name.fullmatch, os.listdir(target.parent))):
            with suppress(OSError):
                path = target.parent / found[0]
                _remove_unlocked(path) if len(found[1]) == 16 else _remove_old(path, int(found[1]))


def _remove_unlocked(path: Path) -> None:
    """Remove a file or folder unless a process has a lock on it, and hold the lock meanwhile."""
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if lock(file, exclusive=True) and is_at(file, path):
            shutil.rmtree(path) if stat.S_ISDIR(os.fstat(file).st_mode) else os.unlink(path)
    finally:
        os.close(file)


def _remove_old(path: Path, process: int) -> None:
    """Remove a file named by a process if there is no such process and the file has not changed for an hour."""
    found = os.lstat(path)
    if stat.S_ISREG(found.st_mode) and time.time() - found.st_mtime > _OLD_SECONDS:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            os.unlink(path)

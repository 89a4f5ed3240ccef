"""Folders that are the old one or the complete new one, whatever interrupts the write."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from mlxkv.errors import InputError
from mlxkv.io.disk import NEW_FILE, lock_new, sweep, sync, sync_folder, temporary_path

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{16}\.tmp")  # as `temporary_path` names them
_AT_CWD, _SWAP = -100, 2  # AT_FDCWD; RENAME_EXCHANGE of Linux and RENAME_SWAP of a Mac are both 2


def check_folder(directory: str | Path, is_part: Callable[[str], bool], overwrite: bool) -> None:
    """Check that `write_folder` may write a folder, before the work for its content begins.

    Parameters
    ----------
    directory
        Folder to write.
    is_part
        Tells of a name in the folder whether such a folder has it.
    overwrite
        Whether a folder of this kind that is there may be replaced.

    Raises
    ------
    InputError
        When it is no folder, holds anything else, holds what may not be replaced, or cannot be replaced at once.
    """
    target = Path(directory).resolve()
    if not str(directory) or (target.exists() and not target.is_dir()):
        raise InputError(f"cannot make {str(directory)!r}: there is a file of that name, or it is no name")
    names = sorted(os.listdir(target)) if target.exists() else []
    if foreign := [name for name in names if not is_part(name)]:
        raise InputError(f"cannot write {directory}: it holds {foreign[0]!r}, something else; give a folder of its own")
    if target == Path.cwd():
        raise InputError(f"cannot write {directory}: it is the current folder, which cannot be replaced; give another")
    if names and not overwrite:
        raise InputError(
            f"{directory} holds artifacts, without which files made with them cannot be read: write to another folder, "
            "or replace them with --overwrite (overwrite=True)"
        )
    if names and not _can_exchange(target):
        raise InputError(
            f"the file system of {directory} cannot replace a folder at once: write to another folder, or remove it first"
        )


def write_folder(directory: str | Path, files: Mapping[str, bytes], overwrite: bool = False) -> None:
    """Write a folder of files that appears, or takes another one's place, all at once.

    Parameters
    ----------
    directory
        Folder to write; folders above it are made.
    files
        Contents by file name.
    overwrite
        Whether a folder that is there, and not empty, is replaced and removed: `check_folder` says whether it may be.

    Raises
    ------
    InputError
        When it cannot be written.
    """
    target = Path(directory).resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target)
        temporary, folder = _new_folder(target)
        try:
            if target.is_dir():
                os.chmod(temporary, stat.S_IMODE(os.stat(target).st_mode) & 0o777)
            for name, data in files.items():
                _write_new(temporary / name, data)
            sync(folder)
            if overwrite and target.is_dir() and os.listdir(target):
                exchange(temporary, target)
            else:
                os.rename(temporary, target)  # fails unless there is none, or an empty one
            sync_folder(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # the old folder, or an unfinished one
            os.close(folder)
    except OSError as error:
        raise InputError(f"cannot write {directory}: {error.strerror or error}") from error


def private_folder(directory: str | Path) -> None:
    """Make a folder that no other user can read, unless there is a folder already.

    Parameters
    ----------
    directory
        The folder; those above it are made as usual.

    Raises
    ------
    InputError
        When it cannot be made.
    """
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {directory}: {error.strerror or error}") from error


def remove_folder(directory: str | Path) -> None:
    """Remove a folder whose name is free at once: whoever reads it finds all of it, or nothing.

    Parameters
    ----------
    directory
        The folder.

    Raises
    ------
    InputError
        When it cannot be removed.
    """
    target = Path(directory)
    temporary = temporary_path(target)
    try:
        os.rename(target, temporary)
    except OSError as error:
        raise InputError(f"cannot remove {directory}: {error.strerror or error}") from error
    sync_folder(target.parent)
    shutil.rmtree(temporary, ignore_errors=True)  # `sweep_all` removes what a killed process leaves


def sweep_all(directory: str | Path) -> None:
    """Remove what writers of anything in a folder left there when they were killed.

    Parameters
    ----------
    directory
        The folder, which need not exist.
    """
    with suppress(OSError):
        for name in {found[1] for found in map(_TEMPORARY.fullmatch, os.listdir(directory)) if found}:
            sweep(Path(directory, name))


def exchange(first: Path, second: Path) -> None:
    """Let two files or folders change names, so that there is no moment at which one of the names is free.

    Parameters
    ----------
    first, second
        Their paths, on one file system.

    Raises
    ------
    OSError
        When they cannot, as on many network file systems.
    """
    a, b = os.fsencode(first), os.fsencode(second)
    library = ctypes.CDLL(None, use_errno=True)
    try:
        if sys.platform == "darwin":
            failed = library.renamex_np(a, b, _SWAP)
        else:
            failed = library.renameat2(_AT_CWD, a, _AT_CWD, b, _SWAP)
    except AttributeError:
        raise OSError("this system has no call to exchange two folders") from None
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def identity(folder: Path | int) -> tuple[int, int] | None:
    """Return what tells a folder from one that takes its place.

    Parameters
    ----------
    folder
        Its path, or the folder opened.

    Returns
    -------
    tuple of int or None
        Device and number; None where there is nothing.
    """
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return found.st_dev, found.st_ino


@contextmanager
def held(directory: Path) -> Iterator[tuple[int, int] | None]:
    """Keep a folder open, so that its number is given to no other one even if it is removed.

    Parameters
    ----------
    directory
        The folder, which need not exist.

    Yields
    ------
    tuple of int or None
        Its `identity`.
    """
    try:
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # none, or one whose files may be opened but not listed
        yield identity(directory)
        return
    try:
        yield identity(folder)
    finally:
        os.close(folder)


def _can_exchange(target: Path) -> bool:
    """Return whether folders beside a folder can be exchanged."""
    made: list[tuple[Path, int]] = []
    try:
        made += [_new_folder(target)]
        made += [_new_folder(target)]
        exchange(made[0][0], made[1][0])
        return True
    except OSError:
        return False
    finally:
        for path, folder in made:
            shutil.rmtree(path, ignore_errors=True)
            os.close(folder)


def _new_folder(target: Path) -> tuple[Path, int]:
    """Create a temporary folder beside a target, locked for as long as it is open where there are locks."""
    while True:
        path = temporary_path(target)
        os.mkdir(path)
        try:
            folder = os.open(path, _FOLDER)
        except FileNotFoundError:
            continue  # someone who sweeps was faster
        if lock_new(folder, path):
            return path, folder
        os.close(folder)


def _write_new(path: Path, data: bytes) -> None:
    """Write a new file and flush it to disk."""
    with os.fdopen(os.open(path, NEW_FILE, 0o666), "wb") as file:
        file.write(data)
        file.flush()
        sync(file.fileno())

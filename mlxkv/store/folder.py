"""The folder of a store: whose it is, where its files are, how they are opened, written aside and removed.

Whatever lies in it may have been put there by anyone: links are not followed, and only regular files are opened.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

from mlxkv.errors import FormatError, InputError
from mlxkv.io.disk import NEW_FILE, lock, lock_new, sync, temporary_path

INDEX, LOCK = "index.sqlite", "lock"
BLOCKS, STATES, QUARANTINE = "blocks", "states", "quarantine"
KINDS = (BLOCKS, STATES)
ENDING = ".mlxkv"
_PAGE = 4096  # bytes that file systems give out at once
_NAME_COST = 128  # bytes that a name takes in its folder, generously
FOLDER_COST = _PAGE + _NAME_COST
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Written(NamedTuple):
    """A file that is written aside, locked as long as its writer lives.

    Parameters
    ----------
    path
        Where it is.
    file
        The open file.
    """

    path: Path
    file: IO[bytes]


def default_folder() -> Path:
    """Return the folder of the store, which need not exist.

    Returns
    -------
    Path
        `$MLXKV_STORE`; or `store` in `$MLXKV_HOME`, or in mlxkv's folder of the user's data.
    """
    if own := os.environ.get("MLXKV_STORE"):
        return Path(own)
    if of_all := os.environ.get("MLXKV_HOME"):
        return Path(of_all) / "store"
    from platformdirs import user_data_path

    return user_data_path("mlxkv", appauthor=False) / "store"


def cost(size: int) -> int:
    """Return the bytes that a file takes of a disk, its name included.

    Parameters
    ----------
    size
        Bytes in it.

    Returns
    -------
    int
        At least as many.
    """
    return -(-size // _PAGE) * _PAGE + _NAME_COST


class Folder:
    """A folder of one store, which no other user can read.

    Parameters
    ----------
    path
        The folder, which is made if there is none.

    Attributes
    ----------
    path
        Its path without links.

    Raises
    ------
    InputError
        When it cannot be made, belongs to someone else, may be written by others, or holds anything else.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.path = path.expanduser().resolve()
            self.prepare()
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(
                f"cannot keep prompts in {str(path)[:200]}: {getattr(error, 'strerror', None) or error}",
                "give a folder that you can write, with --store or $MLXKV_STORE",
            ) from error

    def prepare(self) -> None:
        """Make what is missing of the folder, and check it.

        Raises
        ------
        OSError
            When it cannot be made.
        InputError
            When it belongs to someone else, may be written by others, or holds anything else.
        """
        os.makedirs(self.path, mode=0o700, exist_ok=True)
        self._check()
        for name in (BLOCKS, STATES, QUARANTINE):
            self._make(self.path / name)

    def _check(self) -> None:
        """Refuse a folder that is not this user's own, or is no store."""
        found = os.stat(self.path)
        if found.st_uid != os.geteuid():
            raise InputError(
                f"cannot keep prompts in {self.path}: it belongs to another user", "give a folder of your own"
            )
        if found.st_mode & 0o022:
            raise InputError(
                f"cannot keep prompts in {self.path}: other users may write it",
                f"chmod 700 {self.path}, or give another",
            )
        names = [name for name in os.listdir(self.path) if not name.startswith(".")]
        if names and not {INDEX, BLOCKS} & set(names):
            raise InputError(
                f"cannot keep prompts in {self.path}: it holds {sorted(names)[0]!r}, something else",
                "give a folder of its own",
            )
        if found.st_mode & 0o077:
            os.chmod(self.path, 0o700)

    @staticmethod
    def _make(path: Path) -> bool:
        """Make a folder unless there is one; whatever else has its name goes. Return whether it is new."""
        with suppress(FileNotFoundError):
            if stat.S_ISDIR(os.lstat(path).st_mode):
                return False
            os.unlink(path)
        with suppress(FileExistsError):  # another process was faster
            os.mkdir(path, 0o700)
        return True

    def file(self, kind: str, name: bytes) -> Path:
        """Return the path of a file.

        Parameters
        ----------
        kind
            `BLOCKS` or `STATES`.
        name
            Name of the place in a text.

        Returns
        -------
        Path
            Its path, whether there is one or not.
        """
        digits = name.hex()
        return self.path / kind / digits[:2] / f"{digits}{ENDING}"

    def make_room(self, path: Path) -> int:
        """Make the folder that a file is to be in.

        Parameters
        ----------
        path
            The file, as `file` returns it.

        Returns
        -------
        int
            Bytes that a new folder takes; 0 where there was one.

        Raises
        ------
        OSError
            When it cannot be made.
        """
        made = self._make(path.parent.parent) + self._make(path.parent)  # all may have been removed under this process
        return made * FOLDER_COST

    def open(self, path: Path) -> IO[bytes]:
        """Open a file of the store for reading.

        Parameters
        ----------
        path
            Its path.

        Returns
        -------
        IO[bytes]
            The open file.

        Raises
        ------
        OSError
            When it is missing, a link, or cannot be read.
        FormatError
            When it is no regular file.
        """
        descriptor = os.open(path, _READ)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise FormatError(f"{path} is no regular file")
            return os.fdopen(descriptor, "rb")
        except BaseException:
            os.close(descriptor)
            raise

    def begin(self, path: Path) -> Written:
        """Create an empty file beside the one that is to be written.

        Parameters
        ----------
        path
            The file to write; its folder exists.

        Returns
        -------
        Written
            The new file, locked.

        Raises
        ------
        OSError
            When it cannot be made.
        """
        while True:
            temporary = temporary_path(path)
            descriptor = os.open(temporary, NEW_FILE, 0o600)
            if lock_new(descriptor, temporary):
                return Written(temporary, os.fdopen(descriptor, "wb"))
            os.close(descriptor)

    @staticmethod
    def fill(written: Written, data: bytes) -> None:
        """Write the bytes of a new file, and wait until they are on the disk.

        Parameters
        ----------
        written
            The file, as `begin` returned it.
        data
            Its bytes.

        Raises
        ------
        OSError
            When the disk is full or fails.
        """
        written.file.write(data)
        written.file.flush()
        sync(written.file.fileno())

    @staticmethod
    def abandon(written: Written) -> None:
        """Close a file that was written aside, and remove it unless it has got its name.

        Parameters
        ----------
        written
            The file, as `begin` returned it.
        """
        remove(written.path)
        with suppress(OSError):
            written.file.close()

    def kept(self, kind: str) -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
        """List what is in the folders of blocks or states.

        Parameters
        ----------
        kind
            `BLOCKS` or `STATES`.

        Yields
        ------
        tuple of str and list of os.DirEntry
            The two digits that a folder is named by, and what is in it.
        """
        for number in range(256):
            with suppress(OSError), os.scandir(self.path / kind / f"{number:02x}") as found:
                yield f"{number:02x}", list(found)


def is_unused(path: Path) -> bool:
    """Return whether a file that was written aside has no writer any more.

    Parameters
    ----------
    path
        Its path.

    Returns
    -------
    bool
        True also where there is no such file.
    """
    try:
        descriptor = os.open(path, _READ)
    except OSError:
        return True
    try:
        return lock(descriptor, exclusive=True)
    except OSError:
        return False  # no locks here
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove whatever is at a path, if anything is.

    Parameters
    ----------
    path
        A path in the store's folder.
    """
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError:
        shutil.rmtree(path, ignore_errors=True)

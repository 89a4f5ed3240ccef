"""Containers that grow: an append leaves the old file or the new one, and two at once come one after the other.

The journal beside a file is also the lock of its writers: who has it locked appends, and whoever waited for it reads the file
again. A complete journal is never changed, only removed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from mlxkv.errors import InputError, MismatchError
from mlxkv.io.container import is_intact
from mlxkv.io.disk import is_at, journal_path, lock, sync_folder, write_target
from mlxkv.io.inputs import open_input
from mlxkv.io.journal import Journal, State, open_journal, read_journal, state_of, write_journal

WRITER_WAIT = 60.0  # seconds that a writer waits for another one
PENDING_WAIT = 10.0  # seconds that it waits for readers, to put an earlier append into the file
APPLY_WAIT = 2.0  # and its own: if they take longer, the next writer does that
_POLL_SECONDS = 0.002


class Append:
    """A container that no one else appends to; made by `appending`.

    Parameters
    ----------
    target
        The container, without links.
    journal
        Its journal: locked, empty, open for reading and writing.
    """

    def __init__(self, target: Path, journal: IO[bytes]) -> None:
        self.target, self._journal = target, journal
        self._path = journal_path(target)
        self._committed = False
        with open_input(target) as data:
            self._old: State = state_of(data)

    def replace_tail(self, keep: int, tail: bytes) -> None:
        """Replace everything after the first `keep` bytes of the container, without writing those again.

        Parameters
        ----------
        keep
            Bytes to keep at its beginning.
        tail
            Bytes to put after them.

        Raises
        ------
        InputError
            When it cannot be written. Where the disk is too full only for the file itself, the append is kept in the journal.
        MismatchError
            When another process has put another file in its place.
        """
        try:
            with open_input(self.target) as data:
                journal = write_journal(self._journal, data, self._old, keep, tail)
            sync_folder(self._path.parent)
            self._committed = True
        except OSError as error:
            raise InputError(f"cannot write {self._path}: {error.strerror or error}") from error
        applied = _apply(self.target, journal, APPLY_WAIT)
        if applied is None:
            self._committed = False
            raise MismatchError(f"another process has written {self.target} meanwhile: append to it again")
        self._committed = not applied

    def close(self) -> None:
        """Remove the journal, unless it holds what readers need, and let other writers in."""
        if not self._committed:
            with suppress(OSError):
                os.unlink(self._path)
            sync_folder(self._path.parent)
        self._journal.close()


@contextmanager
def appending(path: str | Path) -> Iterator[Append]:
    """Keep other processes from appending to a container, once appends that were interrupted are finished.

    Parameters
    ----------
    path
        An existing container; others may read it, and put another file in its place.

    Yields
    ------
    Append
        The way to replace its end.

    Raises
    ------
    InputError
        When it cannot be read or written, or another process writes it for a minute.
    """
    target = write_target(path)
    with open_input(path):
        pass  # a missing file gets no journal
    if not os.access(target, os.W_OK):
        raise InputError(f"cannot write {path}: it is read-only")
    try:
        journal = _locked_journal(target)
    except OSError as error:
        raise InputError(f"cannot append to {path}: {error.strerror or error}") from error
    try:
        append = Append(target, journal)
    except BaseException:
        with suppress(OSError):
            os.unlink(journal_path(target))
        journal.close()
        raise
    try:
        yield append
    finally:
        append.close()


def replace_tail(path: str | Path, keep: int, tail: bytes) -> None:
    """Replace everything after the first `keep` bytes of a container, without writing those again.

    Whatever happens on the way, readers find the old container or the new one.

    Parameters
    ----------
    path
        An existing container.
    keep
        Bytes to keep at its beginning.
    tail
        Bytes to put after them.

    Raises
    ------
    InputError
        When it cannot be read or written, or another process writes it for a minute.
    MismatchError
        When another process has put another file in its place meanwhile.
    """
    with appending(path) as append:
        append.replace_tail(keep, tail)


def finish_interrupted_append(path: str | Path) -> None:
    """Put an append into a container if its journal was left beside it. Readers need not: they read through the journal.

    Parameters
    ----------
    path
        The container, not the journal.

    Raises
    ------
    InputError
        When it cannot be read or written, or is in use by other processes.
    """
    if os.path.lexists(journal_path(path)):
        with appending(path):
            pass


def _locked_journal(target: Path) -> IO[bytes]:
    """Return a file's journal: locked, empty, and with nothing pending in the file."""
    path, deadline = journal_path(target), time.monotonic() + WRITER_WAIT
    while True:
        file = open_journal(path, write=True)
        assert file is not None
        try:
            try:
                locked = lock(file.fileno(), exclusive=True, wait=max(0.0, deadline - time.monotonic()))
            except OSError:
                os.unlink(path)  # no locks here, so nothing is appended
                raise
            if not locked:
                raise InputError(f"another process has been writing {target} for {WRITER_WAIT:g} s: try again later")
            if is_at(file.fileno(), path):
                journal = read_journal(file)
                if journal is None:
                    os.ftruncate(file.fileno(), 0)
                    return file
                if _apply(target, journal, PENDING_WAIT) is False:
                    raise InputError(
                        f"{target} has been read by other processes for {PENDING_WAIT:g} s: try again later"
                    )
                with suppress(FileNotFoundError):
                    os.unlink(path)
                sync_folder(path.parent)
        except BaseException:
            file.close()
            raise
        file.close()


def _apply(target: Path, journal: Journal, wait: float) -> bool | None:
    """Put a journal into its file. Return False where readers kept that from happening, None for one of another file."""
    deadline = time.monotonic() + wait
    while True:
        try:
            with open(target, "r+b", buffering=0) as data:
                locked = lock(data.fileno(), exclusive=True)
                if is_at(data.fileno(), target):
                    if not journal.fits(data, is_intact):
                        return None
                    if locked:
                        journal.apply(data)
                        return True
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InputError(
                f"cannot write {target}: {error.strerror or error}; what was appended is kept in {journal_path(target)},"
                " and read from there"
            ) from error
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_SECONDS)

"""The journal of an append: what a file's end is replaced by, written and flushed before the file itself is touched.

Once a journal is complete the append has happened: readers read the file's beginning and the journal's end as one file, and
the process that wrote it, or the next one that writes, puts that end into the file. Readers write nothing. docs/format.md says
what this promises.
"""

from __future__ import annotations

import io
import os
import stat
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import IO

from mlxkv.errors import InputError
from mlxkv.io.disk import is_at, journal_path, lock, sync
from mlxkv.io.inputs import open_input

READER_WAIT = 10.0  # seconds that a reader waits for a file's end to be rewritten
_ATTEMPTS = 1000  # to open a file before another takes its place
_CHECKED_BYTES, _END_BYTES, _PIECE = 2**20, 64, 2**20
_HEAD = struct.Struct("<8sQQ16s16s16s")  # magic, bytes kept, old size; BLAKE2b-128 of old end, bytes kept, new end
_MAGIC = b"MLXKVjn2"
_OLD_HEAD = struct.Struct("<8sQ16s16s")  # magic, bytes kept; BLAKE2b-128 of the bytes kept, new end
_OLD_MAGIC = b"MLXKVjnl"
State = tuple[int, bytes]  # of a file: its size, and a digest of its last bytes


@dataclass(frozen=True)
class Journal:
    """A complete journal: the append has happened, if it is one of this file.

    Parameters
    ----------
    file
        The open journal.
    start
        Where the file's new end begins in it.
    keep
        Bytes of the file that stay.
    size
        Bytes of the new end.
    kept
        Digest of the bytes that stay, of 1 MiB at most.
    old
        State of the file that it was made for; None in a journal of an older mlxkv.
    """

    file: IO[bytes]
    start: int
    keep: int
    size: int
    kept: bytes
    old: State | None

    def fits(self, data: IO[bytes], is_intact: Callable[[IO[bytes]], bool]) -> bool:
        """Return whether an open file is the one that the journal was made for, before or during the rewrite.

        Parameters
        ----------
        data
            The file.
        is_intact
            Tells of an open file whether it is complete by itself; unless it is the old one, no journal is needed then.

        Returns
        -------
        bool
            False where the journal is left over: the file has been rewritten, or another one is in its place.
        """
        found = state_of(data)
        if found[0] < self.keep or digest_start(data, self.keep) != self.kept:
            return False
        if self.old is not None:
            if found == self.old:
                return True
            if found[0] > max(self.old[0], self.keep + self.size):
                return False
        return not is_intact(data)

    def joined(self, data: IO[bytes]) -> IO[bytes]:
        """Return the file as it is after the append.

        Parameters
        ----------
        data
            The file.

        Returns
        -------
        IO[bytes]
            The bytes that stay and the new end, as one file to read.
        """
        return io.BufferedReader(_Joined(data, self))

    def apply(self, data: IO[bytes]) -> None:
        """Put the new end into the file, which the caller has locked.

        Parameters
        ----------
        data
            The file, open for reading and writing.

        Raises
        ------
        OSError
            When it cannot be written. Where there is no room for it the file stays as it is.
        """
        file, size = data.fileno(), os.fstat(data.fileno()).st_size
        inside = max(0, min(self.size, size - self.keep))
        try:
            self._copy(file, inside, self.size)  # what makes the file longer first: it is what may find no room
        except OSError:
            os.ftruncate(file, size)
            raise
        self._copy(file, 0, inside)
        os.ftruncate(file, self.keep + self.size)
        sync(file)

    def _copy(self, file: int, first: int, last: int) -> None:
        """Copy bytes `first` to `last` of the new end into the file."""
        for at in range(first, last, _PIECE):
            write_at(file, os.pread(self.file.fileno(), min(_PIECE, last - at), self.start + at), self.keep + at)


class _Joined(io.RawIOBase):
    """The beginning of a file and the end in its journal, as one file; closing it closes both."""

    def __init__(self, data: IO[bytes], journal: Journal) -> None:
        self._data, self._journal, self._position = data, journal, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        size = self._journal.keep + self._journal.size
        self._position = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: size}[whence])
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        at, journal = self._position, self._journal
        if at < journal.keep:
            found = os.pread(self._data.fileno(), min(len(buffer), journal.keep - at), at)
        else:
            found = os.pread(journal.file.fileno(), len(buffer), journal.start + at - journal.keep)
        buffer[: len(found)] = found
        self._position += len(found)
        return len(found)

    def close(self) -> None:
        if not self.closed:
            self._data.close()
            self._journal.file.close()
        super().close()


def open_through_journal(path: str | Path, is_intact: Callable[[IO[bytes]], bool]) -> IO[bytes]:
    """Open a file for reading as its last append left it, and as it stays until it is closed, whoever writes it meanwhile.

    Parameters
    ----------
    path
        The file.
    is_intact
        Tells of an open file whether it is complete by itself.

    Returns
    -------
    IO[bytes]
        The file, or its beginning joined with its journal.

    Raises
    ------
    InputError
        When it is missing, unreadable or not a regular file, or when a writer does not let go of it.
    """
    for _ in range(_ATTEMPTS):
        data = open_input(path)
        try:
            # What stays of a file is never written again, so who reads the rest from a journal needs no lock, and
            # readers one after the other do not keep a writer waiting.
            joined = _join(path, data, is_intact)
            if joined is None:
                with suppress(OSError):  # where there are no locks, no one appends either
                    if not lock(data.fileno(), exclusive=False, wait=READER_WAIT):
                        raise InputError(
                            f"cannot read {path}: another process has been writing it for {READER_WAIT:g} s"
                        )
                joined = _join(path, data, is_intact)
            if is_at(data.fileno(), path):
                data.seek(0)
                return joined or data
        except BaseException:
            data.close()
            raise
        (joined or data).close()
    raise InputError(f"cannot read {path}: other files keep taking its place")


def _join(path: str | Path, data: IO[bytes], is_intact: Callable[[IO[bytes]], bool]) -> IO[bytes] | None:
    """Return an open file joined with its journal, or None where none belongs to it."""
    opened = open_journal(journal_path(path))
    if opened is None:
        return None
    journal = read_journal(opened)
    if journal and journal.fits(data, is_intact):
        return journal.joined(data)
    opened.close()
    return None


def read_journal(file: IO[bytes]) -> Journal | None:
    """Read a journal.

    Parameters
    ----------
    file
        A file that may be one.

    Returns
    -------
    Journal | None
        None where it is empty, incomplete or no journal.
    """
    head = os.pread(file.fileno(), _HEAD.size, 0)
    start = _HEAD.size if head.startswith(_MAGIC) else _OLD_HEAD.size
    if len(head) < start or not head.startswith((_MAGIC, _OLD_MAGIC)):
        return None
    old: State | None = None
    if start == _HEAD.size:
        _, keep, size, end, kept, expected = _HEAD.unpack(head)
        old = size, end
    else:
        _, keep, kept, expected = _OLD_HEAD.unpack(head[:start])
    digest = blake2b(digest_size=16)
    file.seek(start)
    while piece := file.read(_PIECE):
        digest.update(piece)
    if digest.digest() != expected:
        return None
    return Journal(file, start, keep, file.tell() - start, kept, old)


def write_journal(file: IO[bytes], data: IO[bytes], old: State, keep: int, tail: bytes) -> Journal:
    """Write a journal and flush it to disk.

    Parameters
    ----------
    file
        The journal, empty, open for reading and writing without a buffer.
    data
        The file that it is for.
    old
        State of that file.
    keep
        Bytes of the file that stay.
    tail
        Its new end.

    Returns
    -------
    Journal
        The journal.

    Raises
    ------
    OSError
        When it cannot be written.
    """
    with suppress(OSError):  # who may read the file may read the journal
        os.fchmod(file.fileno(), stat.S_IMODE(os.fstat(data.fileno()).st_mode) & 0o777)
    kept = digest_start(data, keep)
    write_at(file.fileno(), tail, _HEAD.size)
    write_at(file.fileno(), _HEAD.pack(_MAGIC, keep, *old, kept, _digest(tail)), 0)
    sync(file.fileno())
    return Journal(file, _HEAD.size, keep, len(tail), kept, old)


def open_journal(path: Path, *, write: bool = False) -> IO[bytes] | None:
    """Open a journal without a buffer.

    Parameters
    ----------
    path
        Its path.
    write
        Open it for writing too, and make it where there is none.

    Returns
    -------
    IO[bytes] | None
        None where it cannot be read or is no regular file.

    Raises
    ------
    OSError
        When it cannot be opened for writing.
    """
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        file = os.open(path, flags | (os.O_RDWR | os.O_CREAT if write else os.O_RDONLY), 0o666)
    except OSError:
        if write:
            raise
        return None
    if stat.S_ISREG(os.fstat(file).st_mode):
        return os.fdopen(file, "r+b" if write else "rb", buffering=0)
    os.close(file)
    if write:
        raise InputError(f"cannot write {path}: it is not a regular file; remove it")
    return None


def state_of(file: IO[bytes]) -> State:
    """Return what tells states of a file apart: its size and a digest of its end, which holds a digest of its header.

    Parameters
    ----------
    file
        The file.

    Returns
    -------
    State
        Size and digest.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - _END_BYTES))
    return size, _digest(file.read(_END_BYTES))


def digest_start(file: IO[bytes], keep: int) -> bytes:
    """Return a digest of the bytes of a file that stay.

    Parameters
    ----------
    file
        The file.
    keep
        Number of bytes that stay; the first MiB of them counts.

    Returns
    -------
    bytes
        BLAKE2b-128.
    """
    return _digest(os.pread(file.fileno(), min(keep, _CHECKED_BYTES), 0))


def write_at(file: int, data: bytes, offset: int) -> None:
    """Write all of some bytes.

    Parameters
    ----------
    file
        Descriptor of a file.
    data
        The bytes.
    offset
        Where they go.

    Raises
    ------
    OSError
        When they cannot be written.
    """
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()

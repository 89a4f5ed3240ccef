"""SQLite as this store uses it: one connection that reads, one that writes, and the moment when a damaged index is found.

Only one process may make an index anew, and none has it open then: all that have it open hold a lock on the file `lock`.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import RLock

from mlxkv.errors import InputError
from mlxkv.io.disk import lock
from mlxkv.store.folder import INDEX, LOCK, remove

VERSION = 1
_BUSY_SECONDS, _LOCK_SECONDS, _READ_SECONDS = 10.0, 5.0, 1.0
_PAGE = 1024  # bytes: a small change writes a few pages
_LONGEST_VALUE = 2**16  # bytes of any value in a row; a forged one would allocate more
_FAILURES = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)
_DAMAGES = (
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_CONSTRAINT,
    sqlite3.SQLITE_TOOBIG,
    sqlite3.SQLITE_MISMATCH,
)
_SCHEMA = (
    "CREATE TABLE words (id INTEGER PRIMARY KEY, word TEXT NOT NULL UNIQUE)",
    "CREATE TABLE blocks (id INTEGER PRIMARY KEY AUTOINCREMENT, name BLOB NOT NULL UNIQUE, parent INTEGER NOT NULL, slot BLOB NOT NULL,"
    " start INTEGER NOT NULL, stop INTEGER NOT NULL, rows_from INTEGER NOT NULL, size INTEGER NOT NULL,"
    " coding INTEGER NOT NULL, artifacts INTEGER NOT NULL, model INTEGER NOT NULL, refs INTEGER NOT NULL)",
    "CREATE INDEX places ON blocks (slot, stop)",
    "CREATE TABLE entries (block INTEGER PRIMARY KEY, kind TEXT NOT NULL, turn INTEGER NOT NULL, used REAL NOT NULL,"
    " state INTEGER NOT NULL)",
    "CREATE INDEX turns ON entries (turn)",
    "CREATE TABLE pending (id INTEGER PRIMARY KEY, file TEXT NOT NULL, temporary TEXT NOT NULL, bytes INTEGER NOT NULL,"
    " pinned INTEGER NOT NULL)",
    "CREATE TABLE quarantined (file TEXT PRIMARY KEY, bytes INTEGER NOT NULL, reason TEXT NOT NULL, at REAL NOT NULL)",
    "CREATE TABLE totals (key TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID",
)
TOTALS = ("bytes", "blocks", "stored", "written", "evicted", "foreign", "limit")


class Unavailable(Exception):  # noqa: N818  # no error of a user: what is stored cannot be used just now
    """The index cannot be used at the moment: damaged, or another process works on it for long."""


class Damaged(Exception):  # noqa: N818
    """The index holds what no store wrote."""


class Database:
    """The index file, and what to do when it is none.

    Parameters
    ----------
    folder
        Folder of the store.
    prepare
        Called where the folder is gone, to make it again.
    fill
        Called with a new, empty index, in a transaction, to fill it from the files that there are.

    Raises
    ------
    InputError
        When it cannot be opened or made.
    """

    def __init__(self, folder: Path, prepare: Callable[[], None], fill: Callable[[sqlite3.Connection], None]) -> None:
        self.path = folder / INDEX
        self._folder, self._prepare, self._fill = folder, prepare, fill
        self._reading, self._writing = RLock(), RLock()
        self._lock: int | None = None
        self._reader: sqlite3.Connection | None = None
        self._writer: sqlite3.Connection | None = None
        self._place: tuple[int, int] | None = None
        self._is_damaged = self._closed = False
        with self._writing, self._reading:
            self._open()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Read one state of the index, whatever others write meanwhile.

        Yields
        ------
        sqlite3.Connection
            The connection, in a transaction.

        Raises
        ------
        Unavailable
            When the index is damaged: the next writer makes it anew.
        """
        if not self._reading.acquire(timeout=_READ_SECONDS):
            raise Unavailable("the index of the store is in use for long, or being made anew")
        try:
            if self._reader is None or self._is_damaged or self._is_elsewhere():
                self._is_damaged = True
                raise Unavailable("the index of the store is damaged")
            with self._damage_found():
                self._reader.execute("BEGIN")
                with self._ended(self._reader):
                    yield self._reader
        finally:
            self._reading.release()

    @contextmanager
    def writing(self, log_limit: int) -> Iterator[sqlite3.Connection]:
        """Change the index, as the only one who does; all that is done in the block becomes visible at once, or nothing.

        Parameters
        ----------
        log_limit
            Bytes that SQLite's log may have before.

        Yields
        ------
        sqlite3.Connection
            The connection, in a transaction.

        Raises
        ------
        Unavailable
            When another process is at it for long.
        InputError
            When the disk is full or fails.
        """
        with self._writing:
            if self._writer is None or self._is_damaged or self._is_elsewhere():
                self._repair()
            assert self._writer is not None
            with self._damage_found():
                self._begin(self._writer, log_limit)
                with self._ended(self._writer):
                    yield self._writer

    def repair(self) -> bool:
        """Make the index anew if it is damaged; return whether it was and can be used now.

        Returns
        -------
        bool
            False also where the store is closed.
        """
        with self._writing:
            if not self._is_damaged or self._closed:
                return False
            self._repair()
            return True

    def close(self) -> None:
        """Close the index; it cannot be used afterwards."""
        with self._writing, self._reading:
            self._closed = True
            self._close()

    def _log_bytes(self) -> int:
        """Return the bytes of SQLite's log of what has changed."""
        try:
            return os.lstat(f"{self.path}-wal").st_size
        except OSError:
            return 0

    def _begin(self, writer: sqlite3.Connection, log_limit: int) -> None:
        """Begin to write while the log is short enough: others may write while this process waits for its turn."""
        until = time.monotonic() + _BUSY_SECONDS
        while True:
            if self._log_bytes() > log_limit:
                writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            writer.execute("BEGIN IMMEDIATE")
            if self._log_bytes() <= log_limit:
                return
            writer.execute("ROLLBACK")
            if time.monotonic() > until:
                raise Unavailable("someone reads from the store for long, so that its log cannot be emptied")

    def _is_elsewhere(self) -> bool:
        """Return whether the file was removed or replaced under this process."""
        try:
            found = os.lstat(self.path)
        except OSError:
            return True
        return (found.st_dev, found.st_ino) != self._place

    @staticmethod
    @contextmanager
    def _ended(connection: sqlite3.Connection) -> Iterator[None]:
        """End a transaction: with all changes, or with none after an error."""
        try:
            yield
            connection.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise

    @contextmanager
    def _damage_found(self) -> Iterator[None]:
        """Turn errors of SQLite into those of this module, and remember damage."""
        try:
            yield
        except (Damaged, TypeError, ValueError, KeyError, OverflowError) as error:  # values that no store writes
            self._is_damaged = True
            raise Unavailable(f"the index of the store is damaged: {error}") from error
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
            if code in _FAILURES:
                raise InputError(
                    f"cannot write the index of the store in {self._folder}: {error}",
                    "free some disk, or give another folder",
                ) from error
            self._is_damaged |= code in _DAMAGES
            raise Unavailable(f"the index of the store cannot be used: {error}") from error

    def _repair(self) -> None:
        if self._closed:
            raise Unavailable("the store is closed")
        with self._reading:
            self._close()
            self._open()

    def _open(self) -> None:
        """Open the index; make it anew where there is none or a damaged one, and no one else has it open."""
        try:
            if not self._folder.exists():  # somebody has removed it under this process
                self._prepare()
            if self._is_usable(exclusive=False):
                self._is_damaged = False
                return
            if not self._is_usable(exclusive=True):  # another process may have made it meanwhile
                self._make()
                self._connect()
            self._is_damaged = False
            self._share_lock()
        except (sqlite3.Error, Damaged, OSError) as error:
            self._close()
            raise InputError(f"cannot open the index of the store in {self._folder}: {error}") from error
        except BaseException:
            self._close()
            raise

    def _is_usable(self, *, exclusive: bool) -> bool:
        """Lock and open the index; return whether it is open now, and none of which damage is known."""
        self._close()
        self._take_lock(exclusive=exclusive)
        before = self._place if self._is_damaged else None
        try:
            self._connect()
            if self._place != before:
                return True
        except (Damaged, FileNotFoundError):
            pass
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF in (*_FAILURES, sqlite3.SQLITE_BUSY):
                raise
        self._disconnect()
        return False

    def _connect(self) -> None:
        found = os.lstat(self.path)
        if not stat.S_ISREG(found.st_mode):
            raise Damaged("the index is no file")
        for ending in ("-wal", "-shm", "-journal"):
            with suppress(OSError):
                if not stat.S_ISREG(os.lstat(f"{self.path}{ending}").st_mode):
                    remove(Path(f"{self.path}{ending}"))
        self._place = found.st_dev, found.st_ino
        self._writer = self._connection()
        _check(self._writer)
        self._writer.execute("PRAGMA journal_mode = WAL").fetchall()
        self._reader = self._connection()
        self._reader.execute("PRAGMA query_only = ON")
        _check(self._reader)

    def _connection(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST_VALUE)
        for setting in (
            "trusted_schema = OFF",
            "cell_size_check = ON",
            "mmap_size = 0",
            "temp_store = MEMORY",
            "synchronous = NORMAL",
            "cache_size = -16384",
        ):
            connection.execute(f"PRAGMA {setting}").fetchall()
        return connection

    def _make(self) -> None:
        """Make a new index in place of whatever is there: no one else has it open."""
        for ending in ("-wal", "-shm", "-journal", ""):
            remove(Path(f"{self.path}{ending}"))
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        connection = self._connection()
        try:
            # Killed on the way it has no version, so that it is made again.
            for setting in (
                f"page_size = {_PAGE}",
                "auto_vacuum = INCREMENTAL",
                "journal_mode = OFF",
                "synchronous = OFF",
            ):
                connection.execute(f"PRAGMA {setting}").fetchall()
            connection.execute("BEGIN")
            for statement in _SCHEMA:
                connection.execute(statement)
            connection.executemany("INSERT INTO totals VALUES (?, 0)", [(key,) for key in TOTALS])
            self._fill(connection)
            connection.execute("COMMIT")
            connection.execute("PRAGMA synchronous = FULL").fetchall()
            connection.execute(f"PRAGMA user_version = {VERSION}").fetchall()
        finally:
            connection.close()

    def _take_lock(self, *, exclusive: bool) -> None:
        path = self._folder / LOCK
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(os.lstat(path).st_mode):
                remove(path)
        self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        with suppress(OSError):  # no locks here
            if lock(self._lock, exclusive=exclusive, wait=_LOCK_SECONDS):
                return
            self._close()
            raise Unavailable("another process works on the store")

    def _share_lock(self) -> None:
        assert self._lock is not None
        with suppress(OSError):
            lock(self._lock, exclusive=False)

    def _disconnect(self) -> None:
        for connection in (self._reader, self._writer):
            if connection is not None:
                with suppress(sqlite3.Error):
                    connection.close()
        self._reader = self._writer = None

    def _close(self) -> None:
        self._disconnect()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _check(connection: sqlite3.Connection) -> None:
    """Refuse an index of another version, or one whose tables are not those that a store makes."""
    version = connection.execute("PRAGMA user_version").fetchone()
    found = connection.execute(
        "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND name != 'sqlite_sequence' LIMIT 100"
    ).fetchall()
    if version != (VERSION,) or sorted(row[0] for row in found) != sorted(_SCHEMA):
        raise Damaged("the index has other tables")

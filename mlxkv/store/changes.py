"""Changes of a store, a transaction each: what was touched is written along, and what killed writers left is settled."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import NamedTuple, TypeVar

from mlxkv.errors import InputError, MlxkvError
from mlxkv.io.container import Reader
from mlxkv.store import rows
from mlxkv.store.chain import NAME_BYTES, Block, block_of
from mlxkv.store.counting import tidy_quarantine
from mlxkv.store.database import Database, Unavailable
from mlxkv.store.folder import BLOCKS, STATES, Folder, Written, cost, is_unused, remove
from mlxkv.store.rows import Db
from mlxkv.store.space import Space

T = TypeVar("T")
_TOUCHES = 64  # in one transaction


class Reservation(NamedTuple):
    """Bytes set apart for a file that is about to be written, and a block that stays until then.

    Parameters
    ----------
    id
        Number of the reservation.
    path
        The file.
    written
        The file beside it that is written first.
    bytes
        What was set apart.
    pinned
        Number of the block that stays; 0 for none.
    """

    id: int
    path: Path
    written: Written
    bytes: int
    pinned: int


class Changes:
    """All that changes a store.

    Parameters
    ----------
    database
        The index.
    space
        The bytes that there are.
    """

    def __init__(self, database: Database, space: Space) -> None:
        self.space = space
        self._database = database
        self._touched: dict[bytes, float] = {}
        self._touching = Lock()

    def begin(self, keep_limit: bool) -> None:
        """Settle what killed writers left, and come within the limit.

        Parameters
        ----------
        keep_limit
            Whether the limit is that of last time, if there is one.

        Raises
        ------
        Unavailable
            When the index cannot be used.
        InputError
            When it cannot be written.
        """

        def first(db: Db) -> None:
            known = rows.totals(db)["limit"]
            if keep_limit and known:
                self.space.set_limit(known)
            elif known != self.space.limit:
                db.execute("UPDATE totals SET value = ? WHERE key = 'limit'", (self.space.limit,))
            self.settle(db)
            tidy_quarantine(db, self.space.folder)

        self.make(first)
        while self.make(lambda db: self.space.make(db, 0)) is None:
            pass

    def make(self, step: Callable[[Db], T]) -> T:
        """Make one change: all of it becomes visible at once, or nothing.

        Parameters
        ----------
        step
            Makes the change, in a transaction.

        Returns
        -------
        Any
            What it returned.

        Raises
        ------
        Unavailable
            When the index cannot be used.
        InputError
            When it cannot be written.
        """
        with self._touching:
            touched = dict(list(self._touched.items())[:_TOUCHES])
        with self._database.writing(self.space.log_limit) as db:
            for name, used in touched.items():
                rows.touch(db, name, used)
            result = step(db)
        with self._touching:
            for name, used in touched.items():
                if self._touched.get(name) == used:
                    del self._touched[name]
        return result

    def touch(self, name: bytes) -> None:
        """Note that an entry was used; the next change writes it down.

        Parameters
        ----------
        name
            Name of the place.
        """
        with self._touching:
            self._touched.pop(name, None)
            self._touched[name] = time.time()

    def flush(self) -> None:
        """Write down all that was touched."""
        while self._touched:
            self.make(lambda db: self.space.make(db, 0))  # the index may have grown

    def reserve(self, db: Db, kind: str, name: bytes, size: int, pinned: int, spared: int | None) -> Reservation | bool:
        """Set bytes apart for a file, and create it aside.

        Parameters
        ----------
        db
            The connection, in a transaction that writes.
        kind, name
            Which file: `BLOCKS` or `STATES`, and the name of its place.
        size
            Bytes that it will have.
        pinned
            Number of a block that must not go until then; 0 for none.
        spared
            Number of a block whose entry must not go either.

        Returns
        -------
        Reservation or bool
            False where there is no room; True where another transaction must go on making some.
        """
        rows.refer(db, pinned, 1)
        fits = self.space.make(db, cost(size), spared)
        if not fits:
            self.space.release(db, pinned)
            return fits is None
        path = self.space.folder.file(kind, name)
        taken = cost(size) + self.space.folder.make_room(path)
        written = self.space.folder.begin(path)
        try:
            number = db.execute(
                "INSERT INTO pending (file, temporary, bytes, pinned) VALUES (?, ?, ?, ?)",
                (f"{kind}/{name.hex()}", written.path.name, cost(size), pinned),
            ).lastrowid
            rows.count(db, bytes=taken)
        except BaseException:
            Folder.abandon(written)
            raise
        return Reservation(number or 0, path, written, cost(size), pinned)

    def holds(self, db: Db, reserved: Reservation) -> bool:
        """End a reservation whose file gets its name in this transaction; return whether it still held.

        Parameters
        ----------
        db
            The connection, in a transaction that writes.
        reserved
            What was set apart.

        Returns
        -------
        bool
            False where another process has ended it, as that of a writer that is gone.
        """
        return bool(db.execute("DELETE FROM pending WHERE id = ?", (reserved.id,)).rowcount)

    def give_back(self, reserved: Reservation) -> None:
        """End a reservation whose file did not get its name.

        Parameters
        ----------
        reserved
            What was set apart.
        """
        with suppress(Unavailable, InputError):  # on a full disk the next one who opens the store does
            self.make(lambda db: self.settle(db, reserved.id))

    def settle(self, db: Db, own: int | None = None) -> None:
        """Remove what killed writers left, so that what they had reserved is free again.

        Parameters
        ----------
        db
            The connection, in a transaction that writes.
        own
            Number of a reservation that is over though its writer lives; all others are looked at where this is None.
        """
        for number, file, temporary, taken, pinned in db.execute(
            "SELECT id, file, temporary, bytes, pinned FROM pending WHERE ? IS NULL OR id = ?", (own, own)
        ).fetchall():
            kind, name = _parsed(file)
            path = self.space.folder.file(kind, name)
            beside = path.parent / os.path.basename(str(temporary))
            if own is None and not is_unused(beside):
                continue
            if beside.name.endswith(".tmp"):
                remove(beside)
            self._agree(db, kind, name, path)
            self.space.release(db, pinned)
            rows.count(db, bytes=-taken)
            db.execute("DELETE FROM pending WHERE id = ?", (number,))

    def _agree(self, db: Db, kind: str, name: bytes, path: Path) -> None:
        """Let a file that a writer may have put in place before it was killed, and its row, agree again."""
        row = rows.row_named(db, name)
        if kind == STATES:
            if row is None or not rows.state_bytes(db, row.id):
                remove(path)
        elif row is None:
            remove(path)
        elif (found := described(self.space.folder, path)) is not None and found != rows.with_parent(db, row):
            above = rows.row_named(db, found.parent) if found.start else None
            if found.name == name and (not found.start or (above is not None and above.block.stop == found.start)):
                rows.change_block(db, row, found, above.id if above else 0)
                rows.count(db, bytes=cost(found.size) - cost(row.block.size))
                self.space.release(db, row.parent, 0)


def described(folder: Folder, path: Path) -> Block | None:
    """Return the block that a file says it is; None where it says nothing, or cannot be read.

    Parameters
    ----------
    folder
        The store's folder.
    path
        The file.

    Returns
    -------
    Block or None
        None where it says nothing, or cannot be read.
    """
    try:
        with folder.open(path) as file:
            reader = Reader(file)
            return block_of(reader.header, reader.size)
    except (OSError, MlxkvError):
        return None


def _parsed(file: object) -> tuple[str, bytes]:
    """Return kind and name of a file that the index says is being written."""
    kind, _, digits = str(file).partition("/")
    try:
        name = bytes.fromhex(digits)
    except ValueError:
        name = b""
    return (kind if kind == STATES else BLOCKS), name.ljust(NAME_BYTES, b"\0")[:NAME_BYTES]

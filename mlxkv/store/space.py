"""The bytes of a store: what it takes of the disk, what a new file may take, and what goes to make room.

A file's bytes are reserved in the index before it is written, and given back in the transaction that removes it. So their sum
is never too small, whenever a process is killed. SQLite's own files are counted at their largest.
"""

from __future__ import annotations

import os
import stat
import time
from contextlib import suppress
from pathlib import Path

from mlxkv.errors import InputError
from mlxkv.store import rows
from mlxkv.store.folder import BLOCKS, QUARANTINE, STATES, Folder, cost, remove
from mlxkv.store.rows import Db, Row

DEFAULT_LIMIT = 20 * 10**9
LEAST_LIMIT = 4 * 2**20
EVICTIONS = 16  # at once: a transaction that changes more could take more of SQLite's log than is counted
_GROWTH = 2**16  # bytes that the index may grow by before room is made again: a change adds some pages
_FIXED = 2**17  # bytes of the folders, the lock and SQLite's map of its log
_REASON = 200


class Space:
    """What the files of a store may take.

    Parameters
    ----------
    folder
        The store's folder.
    limit
        Bytes for everything in it.

    Attributes
    ----------
    log_limit
        Bytes that SQLite's log may have before a transaction.

    Raises
    ------
    InputError
        When the limit leaves no room for anything.
    """

    def __init__(self, folder: Folder, limit: int) -> None:
        if limit < LEAST_LIMIT:
            raise InputError(
                f"a store of {limit} bytes has no room for prompts", f"give at least {LEAST_LIMIT >> 20} MiB"
            )
        self.folder = folder
        self.set_limit(limit)

    def set_limit(self, limit: int) -> None:
        """Let the store take so many bytes.

        Parameters
        ----------
        limit
            Bytes, at least 4 MiB.
        """
        self.limit = max(limit, LEAST_LIMIT)
        self.log_limit = min(max(limit // 64, 2**18), 2**22)

    def taken(self, db: Db) -> int:
        """Return the bytes that the folder takes of the disk at most, in a transaction.

        Parameters
        ----------
        db
            The connection, in a transaction.

        Returns
        -------
        int
            Bytes, SQLite's files at their largest included.
        """
        return rows.totals(db)["bytes"] + self._fixed(db)

    def _fixed(self, db: Db) -> int:
        """Return the bytes of what does not go when room is made."""
        pages, size = (db.execute(f"PRAGMA {word}").fetchone()[0] for word in ("page_count", "page_size"))
        return rows.totals(db)["foreign"] + pages * size + 2 * self.log_limit + _FIXED

    def free(self, db: Db) -> int:
        """Return the bytes that files may still take, in a transaction.

        Parameters
        ----------
        db
            The connection, in a transaction.

        Returns
        -------
        int
            Less than 0 where something must go. What the index may grow by is not among them.
        """
        return self.limit - self.taken(db) - _GROWTH

    def make(self, db: Db, needed: int, spared: int | None = None) -> bool | None:
        """Remove what was not used for longest until so many bytes are free, as far as one transaction may.

        Parameters
        ----------
        db
            The connection, in a transaction that writes.
        needed
            Bytes to be free.
        spared
            Number of a block whose entry stays.

        Returns
        -------
        bool or None
            Whether they are free; None where another transaction must go on.
        """
        if needed and self._fixed(db) + needed + _GROWTH > self.limit:
            return False  # nothing needs to go in vain
        for _ in range(EVICTIONS):
            if needed <= self.free(db):
                return True
            if not self.evict(db, spared):
                return False
        return None

    def evict(self, db: Db, spared: int | None = None) -> bool:
        """Remove the last block of the entry that was not used for longest, or the entry where others need its block.

        The entry moves to the block before, so that the beginning of its text is there as long as nothing else needs the room.

        Parameters
        ----------
        db
            The connection, in a transaction that writes.
        spared
            Number of a block whose entry stays.

        Returns
        -------
        bool
            False where nothing can go.
        """
        found = db.execute("SELECT block FROM entries WHERE block IS NOT ? ORDER BY turn LIMIT 1", (spared,)).fetchone()
        if found is None:
            return self.forget_quarantined(db)
        self.shorten(db, found[0])
        if rows.row_numbered(db, found[0]) is None:
            rows.count(db, evicted=1)
        return True

    def shorten(self, db: Db, number: int) -> int:
        """Remove an entry's state, and its last block if nothing else refers to it: the entry moves on to the block before.

        Parameters
        ----------
        db
            The connection, in a transaction that writes.
        number
            Number of the entry's block.

        Returns
        -------
        int
            Number of the block that the entry is at now; 0 where it is gone.
        """
        row = rows.row_numbered(db, number)
        kept = db.execute("SELECT kind, turn, used FROM entries WHERE block = ?", (number,)).fetchone()
        if kept is None:  # it has moved on since it was looked for
            return 0
        self.leave(db, number, row)
        if row is None or row.refs > 1:
            return 0
        self.remove_block(db, row)
        above = rows.row_numbered(db, row.parent) if row.parent else None
        if above is None or above.refs > 0:
            return 0
        db.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, 0)", (above.id, *kept))
        rows.refer(db, above.id, 1)
        return above.id

    def leave(self, db: Db, number: int, row: Row | None) -> None:
        """Remove an entry and its state file; its blocks stay.

        Parameters
        ----------
        db
            The connection, in a transaction that writes.
        number
            Number of the entry's block.
        row
            The block's row, if there is one.
        """
        if row is not None:
            self.remove_state(db, row)
        if db.execute("DELETE FROM entries WHERE block = ?", (number,)).rowcount:
            rows.refer(db, number, -1)

    def remove_state(self, db: Db, row: Row) -> None:
        """Remove the state file of the entry at a block, if it has one.

        Parameters
        ----------
        db
            The connection, in a transaction that writes.
        row
            The block's row.
        """
        if size := rows.state_bytes(db, row.id):
            remove(self.folder.file(STATES, row.block.name))
            rows.count(db, bytes=-cost(size), stored=-size)
            db.execute("UPDATE entries SET state = 0 WHERE block = ?", (row.id,))

    def remove_block(self, db: Db, row: Row) -> None:
        """Remove a block that nothing refers to, its file first, so that no file is without a row.

        Parameters
        ----------
        db
            The connection, in a transaction that writes.
        row
            The block's row.
        """
        remove(self.folder.file(BLOCKS, row.block.name))
        db.execute("DELETE FROM blocks WHERE id = ?", (row.id,))
        rows.refer(db, row.parent, -1)
        rows.count(db, bytes=-cost(row.block.size), blocks=-1, stored=-row.block.size)

    def release(self, db: Db, number: int, change: int = -1) -> None:
        """Give up a reference to a block; where it was the last one, the block becomes the entry that goes first.

        Parameters
        ----------
        db
            The connection, in a transaction that writes.
        number
            Number of the block; 0 for none.
        change
            -1; 0 where the reference is given up already.
        """
        rows.refer(db, number, change)
        if number and db.execute("SELECT 1 FROM blocks WHERE id = ? AND refs <= 0", (number,)).fetchone():
            db.execute("INSERT OR REPLACE INTO entries VALUES (?, 'assistant', 0, 0, 0)", (number,))
            db.execute("UPDATE blocks SET refs = 1 WHERE id = ?", (number,))

    def remove_below(self, db: Db, number: int) -> bool:
        """Remove a block with all that goes on from it, the last ones first, as far as one transaction may.

        Parameters
        ----------
        db
            The connection, in a transaction that writes.
        number
            Number of the block.

        Returns
        -------
        bool
            Whether all of it is gone.
        """
        way = [number]
        for _ in range(EVICTIONS):
            while way:
                row = rows.row_numbered(db, way[-1])
                below = rows.children(db, row) if row is not None else []
                if not below:
                    break
                way.append(below[0])
            if not way:
                return True
            if row is not None:
                self.leave(db, row.id, row)
                self.remove_block(db, row)
            way.pop()
        return not way

    def set_aside(self, db: Db, path: Path, reason: str) -> int:
        """Move a file into quarantine, where the oldest ones go when it is too full; anything else than a file is removed.

        Parameters
        ----------
        db
            The connection, in a transaction that writes.
        path
            The file.
        reason
            Why, for people.

        Returns
        -------
        int
            Bytes that it takes there; 0 where it was removed.
        """
        try:
            found = os.lstat(path)
        except OSError:
            return 0
        allowed = self.limit // 20
        taken = cost(found.st_size)
        if not stat.S_ISREG(found.st_mode) or taken > allowed:
            remove(path)
            return 0
        while self._quarantined(db) + taken > allowed and self.forget_quarantined(db):
            pass
        target = self.folder.path / QUARANTINE / f"{path.parent.parent.name}-{time.time_ns():x}-{path.name}"
        with suppress(OSError):
            os.rename(path, target)
            values = (target.name, taken, reason[:_REASON], time.time())
            db.execute("INSERT OR REPLACE INTO quarantined VALUES (?, ?, ?, ?)", values)
            rows.count(db, bytes=taken)
            return taken
        remove(path)
        return 0

    def forget_quarantined(self, db: Db) -> bool:
        """Remove the oldest file in quarantine; return whether there was one.

        Parameters
        ----------
        db
            The connection, in a transaction that writes.

        Returns
        -------
        bool
            False where quarantine is empty.
        """
        found = db.execute("SELECT file, bytes FROM quarantined ORDER BY at LIMIT 1").fetchone()
        if found is None:
            return False
        if isinstance(found[0], str) and os.path.basename(found[0]) == found[0]:
            remove(self.folder.path / QUARANTINE / found[0])
        db.execute("DELETE FROM quarantined WHERE file = ?", (found[0],))
        rows.count(db, bytes=-found[1])
        return True

    @staticmethod
    def _quarantined(db: Db) -> int:
        return db.execute("SELECT coalesce(sum(bytes), 0) FROM quarantined").fetchone()[0]

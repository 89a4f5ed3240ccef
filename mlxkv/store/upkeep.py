"""Looking after a store: what is on the disk and what the index says agree again, and what is to go is removed."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from mlxkv.store import rows
from mlxkv.store.changes import Changes
from mlxkv.store.counting import count_again, tidy_quarantine
from mlxkv.store.database import Database
from mlxkv.store.folder import (
    BLOCKS,
    ENDING,
    KINDS,
    STATES,
    is_unused,
    remove,
)
from mlxkv.store.rows import Db

_NAMED = re.compile(rf"([0-9a-f]{{32}}){re.escape(ENDING)}")
_BATCH = 64


class Swept(NamedTuple):
    """What a sweep has found.

    Parameters
    ----------
    files
        Files that no row knows, which are gone now.
    freed
        Their bytes.
    missing
        Blocks and states whose files were missing or of another size, which are forgotten.
    """

    files: int
    freed: int
    missing: int


class Upkeep:
    """Sweeps and removals on a store.

    Parameters
    ----------
    database
        Its index.
    changes
        All that changes it.
    quarantine
        Sets a file aside: `BlockStore.quarantine`.
    """

    def __init__(self, database: Database, changes: Changes, quarantine: Callable[..., bool]) -> None:
        self._database, self._changes, self._quarantine = database, changes, quarantine
        self._folder = changes.space.folder

    def sweep(self) -> Swept:
        """Remove files without rows and rows without files, and count everything again.

        Returns
        -------
        Swept
            What was removed and forgotten.
        """
        self._changes.make(self._changes.settle)
        files = freed = missing = 0
        for kind in KINDS:
            for digits, found in self._folder.kept(kind):
                on_disk = {}
                for item in found:
                    with suppress(OSError):  # it went meanwhile
                        on_disk[item.name] = item.stat(follow_symlinks=False)
                gone, lost = self._changes.make(partial(self._compare, kind=kind, digits=digits, on_disk=on_disk))
                files, freed, missing = files + len(gone), freed + sum(gone), missing + len(lost)
                for name in lost:
                    self._quarantine(name, "its file was missing or of another size", state=kind == STATES)
        missing += self._forget_unlisted()
        found_more = self._changes.make(lambda db: tidy_quarantine(db, self._folder))
        self._repair_references()
        self._changes.make(lambda db: count_again(db, self._folder))
        self._shrink()
        return Swept(files + len(found_more), freed + sum(found_more), missing)

    def _compare(
        self, db: Db, kind: str, digits: str, on_disk: dict[str, os.stat_result]
    ) -> tuple[list[int], list[bytes]]:
        """Remove the files of one folder that no row knows; return their bytes, and the names whose files are not as they should be."""
        known = self._known(db, kind, digits)
        writing = {row[0] for row in db.execute("SELECT temporary FROM pending")}
        gone = []
        for name, status in on_disk.items():
            named = _NAMED.fullmatch(name)
            path = self._folder.path / kind / digits / name
            if named and bytes.fromhex(named[1]) in known:
                continue
            if name not in writing and (named or not name.endswith(".tmp") or is_unused(path)):
                remove(path)
                gone.append(status.st_size)
        lost = []
        for place, size in known.items():
            found = on_disk.get(f"{place.hex()}{ENDING}")
            with suppress(OSError):  # it may have come since the folder was listed
                found = found or os.lstat(self._folder.file(kind, place))
            if found is None or not stat.S_ISREG(found.st_mode) or found.st_size != size:
                lost.append(place)
        with suppress(OSError):  # mostly it is not empty
            os.rmdir(self._folder.path / kind / digits)
        return gone, lost

    @staticmethod
    def _known(db: Db, kind: str, digits: str) -> dict[bytes, int]:
        """Return the bytes of the files that should be in one folder, by name."""
        first, last = bytes.fromhex(digits), bytes.fromhex(digits) + b"\xff" * 16
        if kind == BLOCKS:
            found = db.execute("SELECT name, size FROM blocks WHERE name BETWEEN ? AND ?", (first, last))
        else:
            found = db.execute(
                "SELECT name, state FROM blocks JOIN entries ON block = id WHERE name BETWEEN ? AND ? AND state > 0",
                (first, last),
            )
        return dict(found)

    def _forget_unlisted(self) -> int:
        """Forget blocks and states whose whole folder is missing; return how many."""
        missing = 0
        for kind in KINDS:
            for number in range(256):
                digits = f"{number:02x}"
                if not (self._folder.path / kind / digits).exists():
                    with self._database.reading() as db:
                        lost = self._known(db, kind, digits)
                    for name in lost:
                        self._quarantine(name, "its file was missing", state=kind == STATES)
                    missing += len(lost)
        return missing

    def _repair_references(self) -> None:
        """Count again what refers to each block, where the index was changed by others than a store."""
        with self._database.reading() as db:
            children = dict(db.execute("SELECT parent, count(*) FROM blocks GROUP BY parent"))
            entries = {row[0] for row in db.execute("SELECT block FROM entries")}
            pinned = {row[0] for row in db.execute("SELECT pinned FROM pending")}
            wrong = [
                number
                for number, refs in db.execute("SELECT id, refs FROM blocks")
                if (number not in pinned and refs != children.get(number, 0) + (number in entries)) or not refs
            ]
        for begin in range(0, len(wrong), _BATCH):
            self._changes.make(partial(self._recount, numbers=wrong[begin : begin + _BATCH]))

    def _recount(self, db: Db, numbers: list[int]) -> None:
        for number in numbers:
            if (row := rows.row_numbered(db, number)) is not None:
                refs = len(rows.children(db, row))
                for table, column in (("entries", "block"), ("pending", "pinned")):
                    refs += db.execute(f"SELECT count(*) FROM {table} WHERE {column} = ?", (number,)).fetchone()[0]
                db.execute("UPDATE blocks SET refs = ? WHERE id = ?", (refs, number))
                self._changes.space.release(db, number, 0)

    def _shrink(self) -> None:
        """Give pages of the index that are free back to the disk, where they are many."""

        def some(db: Db) -> bool:
            free, pages = (db.execute(f"PRAGMA {word}").fetchone()[0] for word in ("freelist_count", "page_count"))
            if free * 4 < pages:
                return False
            db.execute(f"PRAGMA incremental_vacuum({_BATCH})").fetchall()
            return True

        while self._changes.make(some):
            pass

    def remove(self, *, model: str | None = None, name: bytes | None = None) -> int:
        """Remove entries, and the blocks that nothing else needs: see `BlockStore.remove`.

        Parameters
        ----------
        model
            Name of the model; None for any.
        name
            Name of the place.

        Returns
        -------
        int
            Entries that were removed.
        """
        removed = 0
        while (found := self._changes.make(lambda db: self._next(db, model, name))) is not None:
            number: int | None = found
            while number:
                number = self._changes.make(partial(self._shorten, number=number))
            removed += 1
        return removed

    @staticmethod
    def _next(db: Db, model: str | None, name: bytes | None) -> int | None:
        """Return the number of the next block with an entry that is to go."""
        found = db.execute(
            "SELECT b.id FROM entries JOIN blocks b ON b.id = block LEFT JOIN words w ON w.id = b.model"
            " WHERE (?1 IS NULL OR word = ?1) AND (?2 IS NULL OR name = ?2) ORDER BY turn LIMIT 1",
            (model, name),
        ).fetchone()
        return found and found[0]

    def _shorten(self, db: Db, number: int) -> int:
        for _ in range(_BATCH // 4):
            number = self._changes.space.shorten(db, number)
            if not number:
                break
        return number

    def clear(self) -> None:
        """Remove everything."""
        self.remove()
        while self._changes.make(self._changes.space.forget_quarantined):
            pass
        self.sweep()

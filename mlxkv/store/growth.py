"""A text that is added to the store block by block, so that whatever interrupts it leaves a valid shorter one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress

from mlxkv.errors import InputError
from mlxkv.store import rows
from mlxkv.store.chain import Block
from mlxkv.store.changes import Changes, Reservation
from mlxkv.store.database import Unavailable
from mlxkv.store.folder import BLOCKS, STATES, Folder, cost
from mlxkv.store.rows import Db, Row


class Growth:
    """Takes the blocks of one text in order. `BlockStore.growing` makes one.

    An entry is at the last block that was taken, and moves on with each; `end_at` leaves one where it is.

    Parameters
    ----------
    changes
        All that changes the store.
    kind
        Of whom the text ends with.
    """

    def __init__(self, changes: Changes, kind: str) -> None:
        self._changes, self._kind = changes, kind
        self._moving: bytes | None = None  # the place of an entry that goes when the text goes on
        self._entered: bytes | None = None  # the place of the entry that was used last

    def put(self, block: Block, data: bytes) -> bool:
        """Store a block, unless it is there already with rows that are as complete.

        Parameters
        ----------
        block
            What it is; its size is that of the data.
        data
            A container whose header has `block.meta` as "store" of its "meta", by which a lost index is made again.

        Returns
        -------
        bool
            Whether it is stored. False where it does not fit, the block before it is gone, or the store cannot be used just now.

        Raises
        ------
        InputError
            When the block cannot be one, or the disk is full or fails.
        """
        block = block._replace(size=len(data))
        if not block.is_sound:
            raise InputError(f"no block reaches from {block.start} to {block.stop} with {len(data)} bytes")
        is_stored = self._write(
            lambda db: self._begin_block(db, block), data, lambda db, reserved: self._end_block(db, block, reserved)
        )
        self._entered = block.name if is_stored else None
        return is_stored

    def state(self, name: bytes, data: bytes) -> bool:
        """Store the states at a place that a block reaches to, unless they are there already.

        Parameters
        ----------
        name
            Name of the place, at which an entry is made if there is none.
        data
            A container.

        Returns
        -------
        bool
            Whether they are stored; False as for `put`.

        Raises
        ------
        InputError
            When there are no bytes, or the disk is full or fails.
        """
        if not data:
            raise InputError("states of 0 bytes cannot be stored")
        if name != self._entered:
            self._entered = None
        return self._write(
            lambda db: self._begin_state(db, name, len(data)),
            data,
            lambda db, reserved: self._end_state(db, name, len(data), reserved),
        )

    def end_at(self, name: bytes) -> bool:
        """Leave an entry at a place that a block reaches to, as the one used last.

        Parameters
        ----------
        name
            Name of the place.

        Returns
        -------
        bool
            Whether there is such a block.

        Raises
        ------
        InputError
            When the index cannot be written.
        """

        def end(db: Db) -> bool:
            row = rows.row_named(db, name)
            if row is not None:
                rows.enter(db, row.id, self._kind, time.time())
            return row is not None

        with suppress(Unavailable):
            if name == self._entered or self._changes.make(end):  # nothing is written twice
                if self._moving == name:
                    self._moving = None
                return True
        return False

    def _write(
        self,
        begin: Callable[[Db], Reservation | bool | None],
        data: bytes,
        end: Callable[[Db, Reservation], bool],
    ) -> bool:
        """Reserve room, write a file aside, and give it its name; `begin` returns None to be called once more."""
        reserved: Reservation | bool | None = None
        opened: list[Reservation] = []  # also one that the index could not take in, whose file goes all the same
        is_done = False

        def begun(db: Db) -> Reservation | bool | None:
            found = begin(db)
            if isinstance(found, Reservation):
                opened.append(found)
            return found

        try:
            while reserved is None:
                reserved = self._changes.make(begun)
            if isinstance(reserved, bool):
                return reserved
            place = reserved
            self._changes.space.folder.fill(place.written, data)
            is_stored = self._changes.make(lambda db: end(db, place))
            is_done = True
            return is_stored
        except Unavailable:
            return False
        except OSError as error:
            raise InputError(
                f"cannot write to the store in {self._changes.space.folder.path}: {error.strerror or error}",
                "free some disk, or give another folder",
            ) from error
        finally:
            for each in opened:
                Folder.abandon(each.written)
            if isinstance(reserved, Reservation) and not is_done:
                self._changes.give_back(reserved)

    def _begin_block(self, db: Db, block: Block) -> Reservation | bool | None:
        there = rows.row_named(db, block.name)
        if there is not None and there.block.rows_from <= block.rows_from:
            self._move(db, there)
            return True
        above = self._above(db, block)
        if above is None:
            return False
        return self._reserve(db, BLOCKS, block.name, block.size, above)

    def _end_block(self, db: Db, block: Block, reserved: Reservation) -> bool:
        if not self._changes.holds(db, reserved):
            return False
        above, there = self._above(db, block), rows.row_named(db, block.name)
        is_needed = there is None or there.block.rows_from > block.rows_from
        if is_needed and above is not None:
            self._place_block(db, block, above, there, reserved)
        else:  # another process was faster, or has found the block before to be damaged
            rows.count(db, bytes=-reserved.bytes)
        if (row := rows.row_named(db, block.name)) is not None:
            self._move(db, row)
        self._changes.space.release(db, reserved.pinned)
        return row is not None

    def _place_block(self, db: Db, block: Block, above: int, there: Row | None, reserved: Reservation) -> None:
        """Give a block's file its name, in place of one whose rows are less complete if there is one."""
        os.rename(reserved.written.path, reserved.path)
        rows.count(db, written=block.size)
        if there is None:
            rows.add_block(db, block, above)
        else:
            rows.change_block(db, there, block, above)
            rows.count(db, bytes=-cost(there.block.size))
            self._changes.space.release(db, there.parent, 0)

    def _begin_state(self, db: Db, name: bytes, size: int) -> Reservation | bool | None:
        row = rows.row_named(db, name)
        if row is None:
            return False
        if rows.state_bytes(db, row.id):
            return True
        return self._reserve(db, STATES, name, size, row.id)

    def _end_state(self, db: Db, name: bytes, size: int, reserved: Reservation) -> bool:
        if not self._changes.holds(db, reserved):
            return False
        row = rows.row_named(db, name)
        if row is None or rows.state_bytes(db, row.id):
            rows.count(db, bytes=-reserved.bytes)
        else:
            os.rename(reserved.written.path, reserved.path)
            rows.count(db, written=size, stored=size)
            rows.enter(db, row.id, self._kind, time.time())
            db.execute("UPDATE entries SET state = ? WHERE block = ?", (size, row.id))
        self._changes.space.release(db, reserved.pinned)
        return row is not None

    def _reserve(self, db: Db, kind: str, name: bytes, size: int, pinned: int) -> Reservation | bool | None:
        moving = rows.row_named(db, self._moving) if self._moving else None
        reserved = self._changes.reserve(db, kind, name, size, pinned, moving.id if moving else None)
        return None if reserved is True else reserved

    @staticmethod
    def _above(db: Db, block: Block) -> int | None:
        """Return the number of the block that one goes on from; 0 at the beginning of a text, None where it is gone."""
        if not block.start:
            return 0
        row = rows.row_named(db, block.parent)
        return row.id if row is not None and row.block.stop == block.start else None

    def _move(self, db: Db, row: Row) -> None:
        """Move the entry on to a block, or make one there; an entry that is there already stays when the text goes on."""
        new = rows.enter(db, row.id, self._kind, time.time())
        if self._moving is not None and self._moving != row.block.name:
            before = rows.row_named(db, self._moving)
            if before is not None:
                self._changes.space.leave(db, before.id, before)
                self._changes.space.release(db, before.id, 0)
        if new or self._moving != row.block.name:
            self._moving = row.block.name if new else None

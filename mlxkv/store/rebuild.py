"""An index made from the files that there are: each block's header says what it is."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from mlxkv.store import rows
from mlxkv.store.changes import described
from mlxkv.store.counting import count_again
from mlxkv.store.folder import BLOCKS, ENDING, QUARANTINE, STATES, cost, remove
from mlxkv.store.rows import Db
from mlxkv.store.space import Space

_NAMED = re.compile(rf"([0-9a-f]{{32}}){re.escape(ENDING)}")


def fill(db: Db, space: Space) -> None:
    """Fill an empty index from the files that there are. What cannot be used, or no longer fits, is removed.

    Parameters
    ----------
    db
        The connection, in a transaction that writes.
    space
        The bytes that there are.
    """
    _adopt_quarantine(db, space)
    count_again(db, space.folder)
    states = {name: (size, used) for name, size, used in _files(space, STATES)}
    blocks = []
    for name, size, used in _files(space, BLOCKS):
        path = space.folder.file(BLOCKS, name)
        block = described(space.folder, path)
        if block is None or block.name != name or block.size != size:
            remove(path)
        else:
            blocks.append((used, block))
    for used, block in sorted(blocks, key=lambda item: item[1].start):
        above = rows.row_named(db, block.parent) if block.start else None
        is_cut_off = bool(block.start) and (above is None or above.block.stop != block.start)
        size, _ = states.get(block.name, (0, 0))
        if is_cut_off or cost(block.size) + cost(size) > space.free(db):
            remove(space.folder.file(BLOCKS, block.name))
            continue
        number = rows.add_block(db, block, above.id if above else 0)
        rows.count(db, bytes=cost(block.size) + bool(size) * cost(size), stored=size)
        db.execute("INSERT INTO entries VALUES (?, 'assistant', 0, ?, ?)", (number, used, size))
        states.pop(block.name, None)
    for name in states:
        remove(space.folder.file(STATES, name))
    _set_entries(db)
    count_again(db, space.folder)


def _set_entries(db: Db) -> None:
    """Keep an entry where states are and where nothing goes on, used when its file was written."""
    db.execute("DELETE FROM entries WHERE state = 0 AND block IN (SELECT parent FROM blocks)")
    db.execute("UPDATE blocks SET refs = refs + 1 WHERE id IN (SELECT block FROM entries)")
    found = db.execute("SELECT block FROM entries ORDER BY used").fetchall()
    db.executemany(
        "UPDATE entries SET turn = ? WHERE block = ?", [(turn, number) for turn, (number,) in enumerate(found)]
    )


def _adopt_quarantine(db: Db, space: Space) -> None:
    """Note the files in quarantine, so that their bytes are counted and the oldest ones go."""
    folder = space.folder.path / QUARANTINE
    for name in os.listdir(folder):
        status = os.lstat(folder / name)
        if stat.S_ISREG(status.st_mode) and cost(status.st_size) <= space.limit // 20:
            db.execute("INSERT INTO quarantined VALUES (?, ?, '', ?)", (name, cost(status.st_size), status.st_mtime))
        else:
            remove(folder / name)


def _files(space: Space, kind: str) -> Iterator[tuple[bytes, int, float]]:
    """Yield name, bytes and time of each file of a kind; whatever else is there goes."""
    for digits, found in space.folder.kept(kind):
        for item in found:
            named = _NAMED.fullmatch(item.name)
            status = item.stat(follow_symlinks=False)
            if named and named[1].startswith(digits) and stat.S_ISREG(status.st_mode) and status.st_size:
                yield bytes.fromhex(named[1]), status.st_size, status.st_mtime
            else:
                remove(Path(item.path))

"""What the index says, row by row, within a transaction of `Database`: paths, entries, references, and what goes first.

Rows are read as hostile: values that no store writes end in `Damaged`, and no query goes round in a circle.
"""

from __future__ import annotations

import sqlite3
from itertools import pairwise
from typing import Any, NamedTuple

from mlxkv.store.chain import SLOT, Block
from mlxkv.store.database import TOTALS, Damaged

Db = sqlite3.Connection
_COLUMNS = (
    "b.id, b.parent, b.name, b.slot, b.start, b.stop, b.rows_from, b.size, c.word, a.word, m.word, b.refs FROM {}"
    " LEFT JOIN words c ON c.id = b.coding LEFT JOIN words a ON a.id = b.artifacts LEFT JOIN words m ON m.id = b.model"
)
_BY_NAME = f"SELECT {_COLUMNS.format('blocks b')} WHERE b.name = ?"
_BY_ID = f"SELECT {_COLUMNS.format('blocks b')} WHERE b.id = ?"
_AFTER = f"SELECT {_COLUMNS.format('blocks b')} WHERE b.id > ? ORDER BY b.id LIMIT ?"
# Starts become smaller with every step, so that it ends whatever the rows hold.
_PATH = (
    "WITH RECURSIVE path (id, parent, start) AS (SELECT id, parent, start FROM blocks WHERE id = ? AND start < stop"
    " UNION ALL SELECT above.id, above.parent, above.start FROM path JOIN blocks above"
    " ON above.id = path.parent AND above.stop = path.start AND above.start < above.stop)"
    f" SELECT {_COLUMNS.format('path CROSS JOIN blocks b ON b.id = path.id')} ORDER BY b.start DESC"
)


class Row(NamedTuple):
    """A block in the index.

    Parameters
    ----------
    id, parent
        Its number, and that of the block before it; 0 for none.
    refs
        Blocks that begin where it ends, entries there, and writers that are about to add a block.
    block
        The block; its `parent` is right only where it begins a slot, or after `with_parents`.
    """

    id: int
    parent: int
    refs: int
    block: Block


class Usage(NamedTuple):
    """Blocks of one model that are coded alike.

    Parameters
    ----------
    model, coding, artifacts
        Names of the model and of the coding, and the fingerprint of what it was coded with.
    blocks, tokens
        How many there are, and the tokens in them.
    nbytes
        Bytes of their files.
    """

    model: str
    coding: str
    artifacts: str
    blocks: int
    tokens: int
    nbytes: int


def _row(values: tuple[Any, ...]) -> Row:
    number, parent, name, slot, start, stop, rows_from, size, coding, artifacts, model, refs = values
    block = Block(name, slot, slot, start, stop, rows_from, size, coding, artifacts, model)
    if not block.is_sound or not all(type(value) is int for value in (number, parent, refs)):
        raise Damaged("the index holds a block that cannot be one")
    return Row(number, parent, refs, block)


def _one(cursor: sqlite3.Cursor) -> Row | None:
    values = cursor.fetchone()
    return _row(values) if values else None


def row_named(db: Db, name: bytes) -> Row | None:
    """Return the row of the block that reaches to a place, if there is one.

    Parameters
    ----------
    db
        The connection, in a transaction.
    name
        Name of the place.

    Returns
    -------
    Row or None
        The row; None where no block reaches there.
    """
    return _one(db.execute(_BY_NAME, (name,)))


def row_numbered(db: Db, number: int) -> Row | None:
    """Return the row of a number, if there is one.

    Parameters
    ----------
    db
        The connection, in a transaction.
    number
        Number of the block.

    Returns
    -------
    Row or None
        The row; None where the number is not in use, as after its block made room.
    """
    return _one(db.execute(_BY_ID, (number,)))


def rows_after(db: Db, number: int, count: int) -> list[Row]:
    """Return the next rows by number, with the names of their parents.

    Parameters
    ----------
    db
        The connection, in a transaction.
    number
        A number; 0 to begin with the first row.
    count
        How many at most.

    Returns
    -------
    list[Row]
        By number; empty behind the last one.
    """
    rows = [_row(values) for values in db.execute(_AFTER, (number, count))]
    return [row._replace(block=with_parent(db, row)) for row in rows]


def with_parent(db: Db, row: Row) -> Block:
    """Return the block of a row with the name of its parent.

    Parameters
    ----------
    db
        The connection, in a transaction.
    row
        A row as `row_named` or `row_numbered` returns it.

    Returns
    -------
    Block
        With a parent of no bytes where the row of the block before is gone.
    """
    if row.block.start % SLOT == 0:
        return row.block
    found = db.execute("SELECT name FROM blocks WHERE id = ?", (row.parent,)).fetchone()
    return row.block._replace(parent=found[0] if found and isinstance(found[0], bytes) else b"")


def path(db: Db, number: int) -> list[Row]:
    """Return the rows from the beginning of a text to a block, with the names of their parents.

    Parameters
    ----------
    db
        The connection, in a transaction.
    number
        Number of the last block.

    Returns
    -------
    list[Row]
        One at least, without gaps: the first one starts at 0.

    Raises
    ------
    Damaged
        When the way back does not reach the beginning.
    """
    rows = [_row(values) for values in db.execute(_PATH, (number,))][::-1]
    if not rows or rows[0].block.start or any(a.block.stop != b.block.start for a, b in pairwise(rows)):
        raise Damaged("the index holds a block without those before it")
    above = [rows[0].block.slot, *(row.block.name for row in rows)]
    return [row._replace(block=row.block._replace(parent=name)) for row, name in zip(rows, above)]


def add_block(db: Db, block: Block, parent: int) -> int:
    """Add a block after that of a number, and return its own number.

    Parameters
    ----------
    db
        The connection, in a transaction that writes.
    block
        All that its row says, words included.
    parent
        Number of the block before it; 0 for none.

    Returns
    -------
    int
        The number, which no block had before.
    """
    words = (_word(db, block.coding), _word(db, block.artifacts), _word(db, block.model))
    values = (block.name, parent, block.slot, block.start, block.stop, block.rows_from, block.size, *words)
    cursor = db.execute(
        "INSERT INTO blocks (name, parent, slot, start, stop, rows_from, size, coding, artifacts, model, refs)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 0)",
        values,
    )
    refer(db, parent, 1)
    count(db, blocks=1, stored=block.size)
    assert cursor.lastrowid is not None
    return cursor.lastrowid


def change_block(db: Db, row: Row, block: Block, parent: int) -> None:
    """Let a row say what a file says that has taken the place of the one before.

    Parameters
    ----------
    db
        The connection, in a transaction that writes.
    row
        The row, as it is now.
    block
        What the new file says, at the same place.
    parent
        Number of the block before it; 0 for none.
    """
    words = (_word(db, block.coding), _word(db, block.artifacts), _word(db, block.model))
    db.execute(
        "UPDATE blocks SET parent = ?, start = ?, rows_from = ?, size = ?, coding = ?, artifacts = ?, model = ? WHERE id = ?",
        (parent, block.start, block.rows_from, block.size, *words, row.id),
    )
    refer(db, parent, 1)
    refer(db, row.parent, -1)
    count(db, stored=block.size - row.block.size)


def _word(db: Db, word: str) -> int:
    """Return the number of a text that many rows share."""
    found = db.execute("SELECT id FROM words WHERE word = ?", (word,)).fetchone()
    if found:
        return found[0]
    return db.execute("INSERT INTO words (word) VALUES (?)", (word,)).lastrowid or 0


def refer(db: Db, number: int, change: int) -> None:
    """Change how many refer to a block.

    Parameters
    ----------
    db
        The connection, in a transaction that writes.
    number
        Number of the block; 0 for none, and nothing happens.
    change
        1 for each that refers to it from now on, -1 for each that does so no longer.
    """
    if number:
        db.execute("UPDATE blocks SET refs = refs + ? WHERE id = ?", (change, number))


def count(db: Db, **changes: int) -> None:
    """Change totals of the store: "bytes" of disk, "blocks", bytes "stored" and ever "written", blocks "evicted".

    Parameters
    ----------
    db
        The connection, in a transaction that writes.
    **changes
        What is added, by total.
    """
    db.executemany("UPDATE totals SET value = value + ? WHERE key = ?", [(n, key) for key, n in changes.items() if n])


def totals(db: Db) -> dict[str, int]:
    """Return the totals of the store.

    Parameters
    ----------
    db
        The connection, in a transaction.

    Returns
    -------
    dict[str, int]
        A value of 0 or more for each of `mlxkv.store.database.TOTALS`.

    Raises
    ------
    Damaged
        When the index holds what no store wrote.
    """
    found = dict(db.execute("SELECT key, value FROM totals LIMIT 100"))
    if found.keys() != set(TOTALS) or not all(type(value) is int and 0 <= value < 2**60 for value in found.values()):
        raise Damaged("the totals of the index cannot be right")
    return found


def usage(db: Db) -> list[Usage]:
    """Return what blocks of each model and coding take, the most first.

    Parameters
    ----------
    db
        The connection, in a transaction.

    Returns
    -------
    list[Usage]
        One for each.

    Raises
    ------
    Damaged
        When the index holds what no store wrote.
    """
    found = db.execute(
        "SELECT m.word, c.word, a.word, count(*), sum(stop - start), sum(size) FROM blocks LEFT JOIN words m ON m.id = model"
        " LEFT JOIN words c ON c.id = coding LEFT JOIN words a ON a.id = artifacts GROUP BY model, coding, artifacts"
        " ORDER BY sum(size) DESC LIMIT 10000"
    ).fetchall()
    if not all([type(value) for value in values] == [str, str, str, int, int, int] for values in found):
        raise Damaged("the index holds blocks that cannot be some")
    return [Usage(*values) for values in found]


def children(db: Db, row: Row) -> list[int]:
    """Return the numbers of the blocks that begin where one ends.

    Parameters
    ----------
    db
        The connection, in a transaction.
    row
        The row of the block before them.

    Returns
    -------
    list[int]
        Their numbers, also of those in the next slot.
    """
    block = row.block
    slot = block.name if block.stop % SLOT == 0 else block.slot
    found = db.execute("SELECT id FROM blocks WHERE slot = ? AND stop > ? AND parent = ?", (slot, block.stop, row.id))
    return [number for (number,) in found]


def enter(db: Db, number: int, kind: str, used: float) -> bool:
    """Make a block's end an entry, or the one used last if it is one already; return whether it is new.

    Parameters
    ----------
    db
        The connection, in a transaction that writes.
    number
        Number of the block, which is there.
    kind
        Of whom the text ends with: "system", "user" or "assistant".
    used
        Seconds since 1970.

    Returns
    -------
    bool
        False where there was an entry; it keeps its kind.
    """
    turn = next_turn(db)
    if db.execute("UPDATE entries SET turn = ?, used = ? WHERE block = ?", (turn, used, number)).rowcount:
        return False
    db.execute("INSERT INTO entries VALUES (?, ?, ?, ?, 0)", (number, kind, turn, used))
    refer(db, number, 1)
    return True


def touch(db: Db, name: bytes, used: float) -> None:
    """Make an entry the one used last; nothing where there is none.

    Parameters
    ----------
    db
        The connection, in a transaction that writes.
    name
        Name of the place.
    used
        Seconds since 1970.
    """
    db.execute(
        "UPDATE entries SET turn = ?, used = ? WHERE block = (SELECT id FROM blocks WHERE name = ?)",
        (next_turn(db), used, name),
    )


def next_turn(db: Db) -> int:
    """Return a number for the entry used last: higher than those of all others.

    Parameters
    ----------
    db
        The connection, in a transaction.

    Returns
    -------
    int
        At least 1.

    Raises
    ------
    Damaged
        When the index holds what no store wrote.
    """
    found = db.execute("SELECT max(turn) FROM entries").fetchone()[0]
    if found is not None and (type(found) is not int or found > 2**60):
        raise Damaged("the index holds an entry that cannot be one")
    return (found or 0) + 1


def state_bytes(db: Db, number: int) -> int:
    """Return the bytes of the states that are stored with the entry at a block; 0 for none.

    Parameters
    ----------
    db
        The connection, in a transaction.
    number
        Number of the block that the entry is at.

    Returns
    -------
    int
        Bytes of the file.

    Raises
    ------
    Damaged
        When the index holds what no store wrote.
    """
    found = db.execute("SELECT state FROM entries WHERE block = ?", (number,)).fetchone()
    if found and not (type(found[0]) is int and 0 <= found[0] < 2**48):
        raise Damaged("the index holds an entry that cannot be one")
    return found[0] if found else 0

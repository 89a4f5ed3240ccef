"""The longest stored beginning of a text, found in the index."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mlxkv.store.chain import SLOT, Block, Chain
from mlxkv.store.database import Damaged
from mlxkv.store.rows import Db, path

_STOPS = (
    "WITH RECURSIVE found (stop) AS (SELECT max(stop) FROM blocks WHERE slot = :slot AND stop <= :most"
    " UNION ALL SELECT (SELECT max(stop) FROM blocks WHERE slot = :slot AND stop < found.stop)"
    " FROM found WHERE found.stop IS NOT NULL) SELECT stop FROM found WHERE stop IS NOT NULL"
)


def longest(db: Db, chain: Chain, most: int, window: int, needs_state: bool) -> list[Block]:
    """Return the blocks up to the last place of a text from which a model can go on: see `BlockStore.longest`.

    Parameters
    ----------
    db
        The connection, in a transaction.
    chain
        The text.
    most
        Tokens at most.
    window
        Tokens that layers with a window look back at.
    needs_state
        Whether states must be there.

    Returns
    -------
    list[Block]
        From the text's first token on; empty where nothing can be gone on from.
    """
    most = min(most, len(chain))
    low, high = 0, most // SLOT
    while low < high:
        middle = (low + high + 1) // 2
        if db.execute("SELECT 1 FROM blocks WHERE name = ?", (chain.name(middle * SLOT),)).fetchone():
            low = middle
        else:
            high = middle - 1
    for number in range(low, -1, -1):
        begin = number * SLOT
        for stop in _stops(db, chain.name(begin), begin, min(most, begin + SLOT)):
            found = db.execute(
                "SELECT id, rows_from, state FROM blocks LEFT JOIN entries ON block = id WHERE name = ?",
                (chain.name(stop),),
            ).fetchone()
            if found and _can_go_on(found[1], found[2], stop, window, needs_state):
                return [row.block for row in path(db, found[0])]
    return []


def _can_go_on(rows_from: Any, state: Any, stop: int, window: int, needs_state: bool) -> bool:
    has_rows = not window or (type(rows_from) is int and rows_from <= max(0, stop - window))
    return has_rows and (not needs_state or (type(state) is int and state > 0))


def _stops(db: Db, slot: bytes, begin: int, most: int) -> Iterator[int]:
    """Yield the places in a slot that some text's blocks reach to, the last one first."""
    for (stop,) in db.execute(_STOPS, {"slot": slot, "most": most}):
        if type(stop) is not int or not begin < stop <= most:
            raise Damaged("the index holds a block outside its slot")
        yield stop

"""The totals of a store, counted again from its rows and its folder."""

from __future__ import annotations

import os
from pathlib import Path

from mlxkv.store.folder import FOLDER_COST, INDEX, KINDS, LOCK, QUARANTINE, Folder, cost, remove
from mlxkv.store.rows import Db, count

_COST = "((size + 4095) / 4096 * 4096 + 128)"  # `cost`


def count_again(db: Db, folder: Folder) -> None:
    """Set the totals to what the rows and the folder say.

    Parameters
    ----------
    db
        The connection, in a transaction that writes.
    folder
        The store's folder.
    """
    db.execute("DELETE FROM entries WHERE block NOT IN (SELECT id FROM blocks)")
    blocks, stored, taken = db.execute(f"SELECT count(*), total(size), total({_COST}) FROM blocks").fetchone()
    states, states_taken = db.execute(
        f"SELECT total(size), total({_COST}) FROM (SELECT state AS size FROM entries WHERE state > 0)"
    ).fetchone()
    for table in ("pending", "quarantined"):
        taken += db.execute(f"SELECT total(bytes) FROM {table}").fetchone()[0]
    folders = sum(1 for kind in KINDS for _ in folder.kept(kind))
    found = {
        "blocks": blocks,
        "stored": int(stored + states),
        "bytes": int(taken + states_taken) + folders * FOLDER_COST,
        "foreign": _foreign(folder),
    }
    db.executemany("UPDATE totals SET value = ? WHERE key = ?", [(value, key) for key, value in found.items()])


def _foreign(folder: Folder) -> int:
    """Return the bytes of what is no part of the store, but lies in its folder."""
    own = {INDEX, f"{INDEX}-wal", f"{INDEX}-shm", LOCK, QUARANTINE, *KINDS}
    size = 0
    for name in set(os.listdir(folder.path)) - own:
        path = folder.path / name
        inside = (Path(folder, file) for folder, _, files in os.walk(path) for file in files)
        size += sum(cost(os.lstat(file).st_size) for file in (path, *inside))
    return size


def tidy_quarantine(db: Db, folder: Folder) -> list[int]:
    """Let the files in quarantine and their rows agree: one that was moved there by a killed process has none.

    Parameters
    ----------
    db
        The connection, in a transaction that writes.
    folder
        The store's folder.

    Returns
    -------
    list[int]
        Bytes of the files that were removed.
    """
    known = dict(db.execute("SELECT file, bytes FROM quarantined"))
    there, gone = set(), []
    with os.scandir(folder.path / QUARANTINE) as found:
        for item in found:
            there.add(item.name)
            if item.name not in known:
                gone.append(item.stat(follow_symlinks=False).st_size)
                remove(Path(item.path))
    for name in known.keys() - there:
        db.execute("DELETE FROM quarantined WHERE file = ?", (name,))
        count(db, bytes=-known[name])
    return gone

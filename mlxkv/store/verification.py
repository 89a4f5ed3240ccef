"""Every byte of a store checked, and what is damaged set aside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from mlxkv.errors import ChecksumError, FormatError, MlxkvError
from mlxkv.io.container import Reader
from mlxkv.store import rows
from mlxkv.store.chain import Block, block_of
from mlxkv.store.database import Database
from mlxkv.store.folder import BLOCKS, STATES, Folder

_BATCH = 64
Deep = Callable[[Reader, Block], None]


class Verified(NamedTuple):
    """What a check of all files has found.

    Parameters
    ----------
    blocks, states
        Files that are right.
    nbytes
        Their bytes.
    damaged
        Name of the place, hexadecimal, and reason for each that was set aside.
    """

    blocks: int
    states: int
    nbytes: int
    damaged: list[tuple[str, str]]


class _File(NamedTuple):
    kind: str
    block: Block
    size: int


def verify(
    database: Database,
    folder: Folder,
    quarantine: Callable[..., bool],
    progress: Callable[[int, int], None] | None,
    deep: Deep | None,
) -> Verified:
    """Check every file: see `BlockStore.verify`.

    Parameters
    ----------
    database, folder
        The store's.
    quarantine
        `BlockStore.quarantine`.
    progress, deep
        See `BlockStore.verify`.

    Returns
    -------
    Verified
        What was found.
    """
    right = {BLOCKS: 0, STATES: 0}
    nbytes = 0
    damaged: list[tuple[str, str]] = []
    with database.reading() as db:
        total = db.execute("SELECT (SELECT count(*) FROM blocks) + count(*) FROM entries WHERE state > 0").fetchone()[0]
    for number, file in enumerate(_files(database), 1):
        try:
            _check(folder, file, deep)
        except (OSError, MlxkvError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            # A block that went meanwhile, such as one after a damaged one, is none that is damaged.
            if quarantine(file.block.name, reason, seen=file.block, state=file.kind == STATES):
                damaged.append((file.block.name.hex(), reason))
        else:
            right[file.kind] += 1
            nbytes += file.size
        if progress is not None:
            progress(min(number, total), total)
    return Verified(right[BLOCKS], right[STATES], nbytes, damaged)


def _files(database: Database) -> Iterator[_File]:
    """Yield each file that the index knows; what is added meanwhile may be left out."""
    number = 0
    while True:
        with database.reading() as db:
            found = rows.rows_after(db, number, _BATCH)
            states = {row.id: rows.state_bytes(db, row.id) for row in found}
        if not found:
            return
        for row in found:
            yield _File(BLOCKS, row.block, row.block.size)
            if states[row.id]:
                yield _File(STATES, row.block, states[row.id])
        number = found[-1].id


def _check(folder: Folder, file: _File, deep: Deep | None) -> None:
    with folder.open(folder.file(file.kind, file.block.name)) as opened:
        reader = Reader(opened)
        if reader.size != file.size:
            raise ChecksumError(f"it has {reader.size} bytes, and {file.size} were written")
        if file.kind == BLOCKS and block_of(reader.header, file.size) != file.block:
            raise FormatError("it is of another place or text than its name says")
        reader.verify()
        if file.kind == BLOCKS and deep is not None:
            deep(reader, file.block)

"""The store of blocks: compressed stretches of prompts on disk, found by the tokens before them, within a bound of bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

from mlxkv.errors import InputError
from mlxkv.store import rows
from mlxkv.store.chain import Block, Chain
from mlxkv.store.changes import Changes
from mlxkv.store.database import Damaged, Database, Unavailable
from mlxkv.store.finding import longest
from mlxkv.store.folder import BLOCKS, STATES, Folder, default_folder
from mlxkv.store.growth import Growth
from mlxkv.store.keeper import Keeper
from mlxkv.store.rebuild import fill
from mlxkv.store.rows import Db
from mlxkv.store.space import DEFAULT_LIMIT, Space
from mlxkv.store.upkeep import Swept, Upkeep
from mlxkv.store.verification import Deep, Verified, verify

T = TypeVar("T")
_AT_ONCE = 64  # entries that are described before others may read


class Entry(NamedTuple):
    """A place in a stored text from which a conversation can go on.

    Parameters
    ----------
    name
        Name of the place; 16 bytes.
    tokens
        Tokens before it.
    kind
        Of whom they end with: "system", "user" or "assistant".
    model
        Name of the model.
    used
        Seconds since 1970 when it was used last.
    own
        Bytes that would be free without it.
    shared
        Bytes of blocks that others need as well.
    """

    name: bytes
    tokens: int
    kind: str
    model: str
    used: float
    own: int
    shared: int


class Statistics(NamedTuple):
    """Sizes of a store.

    Parameters
    ----------
    folder
        Where it is.
    blocks, entries, quarantined
        How many there are: blocks, entries, and files that were set aside as damaged.
    stored
        Bytes of blocks and states.
    taken
        Bytes that the folder takes of the disk at most, which is what the limit holds for.
    limit
        Bytes that it may take.
    written
        Bytes of blocks and states that were ever written.
    evicted
        Blocks that were ever removed to make room for others.
    """

    folder: Path
    blocks: int
    entries: int
    quarantined: int
    stored: int
    taken: int
    limit: int
    written: int
    evicted: int


class BlockStore:
    """Blocks in a folder, which several processes may use at once; all methods may be called from any thread.

    Parameters
    ----------
    folder
        The folder; None for `$MLXKV_STORE`, or `store` in mlxkv's own folder.
    limit
        Bytes that everything in the folder may take; None for those of last time, at first 20 GB.

    Raises
    ------
    InputError
        When the folder cannot be used, or the limit is too small for anything.
    """

    def __init__(self, folder: Path | None = None, limit: int | None = None) -> None:
        self.folder = Folder(default_folder() if folder is None else Path(folder))
        space = Space(self.folder, DEFAULT_LIMIT if limit is None else limit)
        try:
            self._database = Database(self.folder.path, self.folder.prepare, lambda db: fill(db, space))
        except Unavailable as error:
            raise InputError(f"cannot use the store in {self.folder.path}: {error}", "try again later") from error
        self._changes = Changes(self._database, space)
        self._upkeep = Upkeep(self._database, self._changes, self.quarantine)
        self._keeper = Keeper(self._changes.flush, self._upkeep.sweep)
        try:
            self._surely(lambda: self._changes.begin(keep_limit=limit is None))
        except BaseException:
            self._database.close()
            raise

    def __enter__(self) -> BlockStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def limit(self) -> int:
        """Bytes that everything in the folder may take."""
        return self._changes.space.limit

    def longest(self, chain: Chain, most: int, *, window: int = 0, needs_state: bool = False) -> list[Block]:
        """Return the blocks of the longest beginning of a text from which a model can go on.

        Parameters
        ----------
        chain
            The text.
        most
            Tokens that the beginning may have.
        window
            Tokens that layers with a window look back at, for which rows must be there; 0 where there are none.
        needs_state
            Whether it must end where a state was stored.

        Returns
        -------
        list[Block]
            From the text's first token on, without gaps; empty where nothing is stored.
        """
        with suppress(Unavailable), self._database.reading() as db:
            return longest(db, chain, most, window, needs_state)
        return []

    def find(self, name: bytes) -> Block | None:
        """Return the block that reaches to a place.

        Parameters
        ----------
        name
            Name of the place.

        Returns
        -------
        Block or None
            None where there is none.
        """
        with suppress(Unavailable), self._database.reading() as db:
            row = rows.row_named(db, name)
            return None if row is None else rows.with_parent(db, row)
        return None

    def open_block(self, name: bytes) -> IO[bytes]:
        """Open the file of a block. Its content is as hostile as that of any file.

        Parameters
        ----------
        name
            Name of the place that it reaches to.

        Returns
        -------
        IO[bytes]
            The file, open for reading.

        Raises
        ------
        OSError
            When it is gone.
        FormatError
            When it is no regular file.
        """
        return self.folder.open(self.folder.file(BLOCKS, name))

    def open_state(self, name: bytes) -> IO[bytes]:
        """Open the file of the states at a place.

        Parameters
        ----------
        name
            Name of the place.

        Returns
        -------
        IO[bytes]
            The file, open for reading.

        Raises
        ------
        OSError
            When it is gone.
        FormatError
            When it is no regular file.
        """
        return self.folder.open(self.folder.file(STATES, name))

    def touch(self, name: bytes) -> None:
        """Note that an entry was used. Nothing is written now: a thread does some seconds later, or the next write, or `close`.

        Parameters
        ----------
        name
            Name of the place; nothing happens where no entry is.
        """
        self._changes.touch(name)
        self._keeper.wake()

    def flush(self) -> None:
        """Write down now which entries were used.

        Raises
        ------
        InputError
            When the disk is full or fails.
        """
        with suppress(Unavailable):
            self._changes.flush()

    @contextmanager
    def growing(self, kind: str = "assistant") -> Iterator[Growth]:
        """Add a text's blocks one after the other.

        Parameters
        ----------
        kind
            Of whom the text ends with: "system", "user" or "assistant".

        Yields
        ------
        Growth
            Takes the blocks.
        """
        self._keeper.wake()
        yield Growth(self._changes, kind)

    def quarantine(self, name: bytes, reason: str, *, seen: Block | None = None, state: bool = False) -> bool:
        """Set a file aside that does not check, and forget all blocks that go on from it.

        Parameters
        ----------
        name
            Name of its place.
        reason
            Why, for people.
        seen
            The block that was read by; nothing happens where another one has taken its place meanwhile.
        state
            Whether it is the file of states, without which no block is forgotten.

        Returns
        -------
        bool
            Whether there was such a block.
        """
        with suppress(Unavailable):
            number = self._changes.make(lambda db: self._set_aside(db, name, reason, seen, state))
            while (
                number and not state and not self._changes.make(lambda db: self._changes.space.remove_below(db, number))
            ):
                pass
            return bool(number)
        return False

    def _set_aside(self, db: Db, name: bytes, reason: str, seen: Block | None, state: bool) -> int:
        """Move a file away and return the number of its block; 0 where there is none."""
        row = rows.row_named(db, name)
        if row is None or (seen is not None and rows.with_parent(db, row) != seen):
            return 0
        self._changes.space.set_aside(db, self.folder.file(STATES if state else BLOCKS, name), reason)
        if state:
            self._changes.space.remove_state(db, row)
        return row.id

    def statistics(self) -> Statistics:
        """Return the sizes of the store.

        Returns
        -------
        Statistics
            As of now.

        Raises
        ------
        InputError
            When the index cannot be used just now.
        """
        return self._surely(self._statistics)

    def _statistics(self) -> Statistics:
        with self._database.reading() as db:
            totals = rows.totals(db)
            entries, quarantined = (
                db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("entries", "quarantined")
            )
            taken = self._changes.space.taken(db)
        counts = totals["blocks"], entries, quarantined, totals["stored"], taken
        return Statistics(self.folder.path, *counts, self.limit, totals["written"], totals["evicted"])

    def usage(self) -> list[rows.Usage]:
        """Return what blocks of each model and coding take, the most first.

        Returns
        -------
        list[mlxkv.store.rows.Usage]
            One for each.

        Raises
        ------
        InputError
            When the index cannot be used just now.
        """
        return self._surely(self._usage)

    def _usage(self) -> list[rows.Usage]:
        with self._database.reading() as db:
            return rows.usage(db)

    def entries(self) -> list[Entry]:
        """Return the places from which conversations can go on, the one used last first.

        Returns
        -------
        list[Entry]
            All of them.

        Raises
        ------
        InputError
            When the index cannot be used just now.
        """
        return self._surely(self._entries)

    def _entries(self) -> list[Entry]:
        with self._database.reading() as db:
            found = db.execute("SELECT block, kind, used FROM entries ORDER BY turn DESC").fetchall()
        told = []
        for begin in range(0, len(found), _AT_ONCE):  # others read in between
            with self._database.reading() as db:
                told += [_entry(db, *values) for values in found[begin : begin + _AT_ONCE]]
        return [entry for entry in told if entry is not None]

    def sweep(self) -> Swept:
        """Remove files that the index does not know, forget what has no file, and count everything again.

        A power cut can leave such files, a killed process cannot. A store that is in use does it once by itself.

        Returns
        -------
        Swept
            What was found.

        Raises
        ------
        InputError
            When the index cannot be used just now.
        """
        return self._surely(self._upkeep.sweep)

    def verify(self, progress: Callable[[int, int], None] | None = None, deep: Deep | None = None) -> Verified:
        """Check every byte of every file; those that are damaged are set aside, with all that goes on from them.

        Parameters
        ----------
        progress
            Called after each file with how many are done and how many there are.
        deep
            Called with the reader and the block of each file whose checksums are right; it raises FormatError where the content
            cannot be used.

        Returns
        -------
        Verified
            What was found.

        Raises
        ------
        InputError
            When the index cannot be used just now.
        """
        return self._surely(lambda: verify(self._database, self.folder, self.quarantine, progress, deep))

    def remove(self, *, model: str | None = None, name: bytes | None = None) -> int:
        """Remove entries, with the blocks that nothing else needs.

        Parameters
        ----------
        model
            Only those of a model of this name; None for any.
        name
            Only the one at the place of this name; None for all.

        Returns
        -------
        int
            How many were removed.

        Raises
        ------
        InputError
            When the index cannot be used just now.
        """
        return self._surely(lambda: self._upkeep.remove(model=model, name=name))

    def clear(self) -> None:
        """Remove all that is stored.

        Raises
        ------
        InputError
            When the index cannot be used just now.
        """
        self._surely(self._upkeep.clear)

    def close(self) -> None:
        """Write down which entries were used and close the index."""
        with suppress(InputError):
            self.flush()
        self._database.close()
        self._keeper.end()

    def _surely(self, action: Callable[[], T]) -> T:
        """Do what has no answer without an index: a damaged one is made anew first."""
        try:
            try:
                return action()
            except Unavailable:
                if not self._database.repair():
                    raise
                return action()
        except Unavailable as error:
            raise InputError(f"cannot use the store in {self.folder.path}: {error}", "try again later") from error


def _entry(db: Db, number: int, kind: object, used: object) -> Entry | None:
    """Return the entry at a block; None where it has gone meanwhile."""
    if not isinstance(kind, str) or not isinstance(used, float):
        raise Damaged("the index holds an entry that cannot be one")
    if not db.execute("SELECT 1 FROM entries JOIN blocks ON id = block WHERE block = ?", (number,)).fetchone():
        return None
    way = rows.path(db, number)
    own, last = rows.state_bytes(db, number), len(way)
    while last and way[last - 1].refs <= 1:
        last -= 1
        own += way[last].block.size
    block = way[-1].block
    return Entry(block.name, block.stop, kind, block.model, used, own, sum(row.block.size for row in way[:last]))

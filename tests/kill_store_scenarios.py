"""The write paths of the store of prompts, for `killing.py`: each statement that changes the index is an operation as well."""

import os
import shutil
import sqlite3
from contextlib import closing

from block_texts import ROOT, cut, data, disk_bytes, insert, text
from killing import Scenario

from mlxkv.store.chain import Chain
from mlxkv.store.index import BlockStore

LIMIT = 4 * 2**20
TWO, THREE = Chain(ROOT, text(1, 2)), Chain(ROOT, text(1, 2, 3))


class NewBlock(Scenario):
    """One more block after another."""

    names = ("blocks", "index.sqlite", "lock", "quarantine", "states")
    watched = TWO

    def __init__(self, folder):
        self.made = folder / "made"
        shutil.rmtree(self.made, ignore_errors=True)
        with BlockStore(self.made, LIMIT) as store:
            self.begin(store)

    def begin(self, store):
        insert(store, text(1))

    def prepare(self, folder):
        shutil.copytree(self.made, folder, dirs_exist_ok=True)

    def write(self, folder):
        with BlockStore(folder, LIMIT) as store:
            self.change(store)

    def change(self, store):
        insert(store, text(1, 2))

    def write_again(self, folder):
        self.write(folder)
        with BlockStore(folder, LIMIT) as store:
            swept = store.sweep()
            assert (swept.freed, swept.missing) == (0, 0), swept  # no more than an empty file that was to be written
            assert store.sweep() == (0, 0, 0)
            assert store.verify().damaged == []
            assert store.statistics().taken >= disk_bytes(folder)

    def read(self, folder):
        """The files along the watched text, as long as there are rows and files."""
        assert disk_bytes(folder) <= LIMIT
        how = "mode=ro" if (folder / "index.sqlite-wal").exists() else "immutable=1"  # or it would leave a log
        found = []
        for stop in range(512, len(self.watched) + 1, 512):
            name = self.watched.name(stop)
            try:
                with closing(sqlite3.connect(f"file:{folder}/index.sqlite?{how}", uri=True)) as db:
                    (states,) = db.execute(
                        "SELECT state FROM blocks LEFT JOIN entries ON block = id WHERE name = ?", (name,)
                    ).fetchone()
                kinds = ("blocks", "states") if states else ("blocks",)
                found += [(folder / kind / name.hex()[:2] / f"{name.hex()}.mlxkv").read_bytes() for kind in kinds]
            except (sqlite3.Error, TypeError, FileNotFoundError):
                break
        return found


class FirstBlock(NewBlock):
    """The first block in a folder that is not there."""

    watched = Chain(ROOT, text(1))

    def prepare(self, folder):
        pass

    def change(self, store):
        insert(store, text(1))


class FullStore(NewBlock):
    """A block that others must make room for."""

    watched = Chain(ROOT, text(99))

    def begin(self, store):
        for number in range(20):
            insert(store, text((number, 100), (50, 300)), 200_000, state=1000)

    def change(self, store):
        insert(store, text(99), 400_000)


class MoreRows(NewBlock):
    """A block whose rows are more complete, and which was cut otherwise."""

    def begin(self, store):
        insert(store, text(1, 2), rows_from=700, cuts=(800,))

    def change(self, store):
        with store.growing() as growth:
            block = cut(TWO, rows_from=600)[-1]
            growth.put(block, data(block, seed=1))


class States(NewBlock):
    def begin(self, store):
        insert(store, text(1, 2))

    def change(self, store):
        with store.growing() as growth:
            growth.state(TWO.name(1024), b"states" * 100)

    def write_again(self, folder):
        self.write(folder)


class Quarantine(NewBlock):
    """A block set aside with all that goes on from it."""

    watched = THREE

    def begin(self, store):
        insert(store, text(1, 2, 3), state=100)

    def change(self, store):
        store.quarantine(THREE.name(512), "damaged")

    def read(self, folder):
        """The whole text: what goes is as good as gone with the first of its files."""
        found = super().read(folder)
        return found if len(found) == 4 else []


class Remove(Quarantine):
    def change(self, store):
        store.remove(name=THREE.name(1536))


class LostIndex(Quarantine):
    """An index made again from the blocks."""

    def prepare(self, folder):
        super().prepare(folder)
        (folder / "index.sqlite").write_bytes(os.urandom(9000))

    def change(self, store):
        pass


STORE_SCENARIOS = {
    "store-block": NewBlock,
    "store-first-block": FirstBlock,
    "store-full": FullStore,
    "store-more-rows": MoreRows,
    "store-states": States,
    "store-quarantine": Quarantine,
    "store-remove": Remove,
    "store-lost-index": LostIndex,
}

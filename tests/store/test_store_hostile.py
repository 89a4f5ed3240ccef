"""An index that is damaged, forged or gone: every text is found whole, or not at all, and the store goes on."""

import os
import shutil
import sqlite3
import time
from contextlib import suppress

import pytest
from block_texts import filled, insert, one_block, stops, text, works

from mlxkv.store.index import BlockStore


def with_index(path, *statements):
    connection = sqlite3.connect(path / "index.sqlite")
    with connection, suppress(sqlite3.IntegrityError):
        for statement in statements:
            connection.execute(statement)
    connection.close()


def overwrite(path, begin, count, byte=0x5A):
    with open(path / "index.sqlite", "r+b") as file:
        file.seek(begin)
        file.write(bytes([byte]) * count)


def replaced(make):
    def change(path):
        (path / "index.sqlite").unlink()
        make(path / "index.sqlite")

    return change


def sparse(path):
    with open(path, "wb") as file:
        file.write(b"SQLite format 3\0")
        file.truncate(2**40)


REBUILT = {
    "missing": lambda path: (path / "index.sqlite").unlink(),
    "empty": replaced(lambda path: path.write_bytes(b"")),
    "garbage": replaced(lambda path: path.write_bytes(os.urandom(50_000))),
    "huge": replaced(sparse),
    "link": replaced(lambda path: path.symlink_to("/etc/passwd")),
    "pipe": replaced(os.mkfifo),
    "folder": replaced(os.mkdir),
    "header": lambda path: overwrite(path, 0, 100),
    "schema": lambda path: overwrite(path, 100, 400),
    "truncated": lambda path: os.truncate(path / "index.sqlite", 8192),
    "other version": lambda path: with_index(path, "PRAGMA user_version = 7"),
    "trigger": lambda path: with_index(path, "CREATE TRIGGER t AFTER INSERT ON blocks BEGIN DELETE FROM entries; END"),
    "view": lambda path: with_index(path, "ALTER TABLE blocks RENAME TO b", "CREATE VIEW blocks AS SELECT * FROM b"),
    "no table": lambda path: with_index(path, "DROP TABLE totals"),
}


@pytest.mark.parametrize("damage", REBUILT)
def test_an_index_that_is_none_is_made_again_from_the_blocks(tmp_path, damage):
    chains = filled(tmp_path)
    REBUILT[damage](tmp_path)
    begun = time.monotonic()
    with BlockStore(tmp_path) as store:
        assert [stops(store, chain) for chain in chains] == [[512, 900]] * 4
        assert [stops(store, chain, needs_state=True) for chain in chains] == [[512, 900]] * 4
        assert len(store.entries()) == 4
        assert store.statistics().blocks == 5
    assert time.monotonic() - begun < 30
    works(tmp_path, chains, 4)


@pytest.mark.parametrize("page", range(2, 16, 2))
def test_damage_anywhere_in_the_index_is_found_while_it_is_used(tmp_path, page):
    chains = filled(tmp_path)
    assert os.path.getsize(tmp_path / "index.sqlite") > page * 1024
    overwrite(tmp_path, page * 1024, 2048)
    with BlockStore(tmp_path) as store:
        for _ in range(3):
            for chain in chains:
                store.longest(chain, len(chain))
            insert(store, text(50, 51))
            store.flush()
    works(tmp_path, chains)


def test_an_index_removed_while_it_is_open_is_made_again(tmp_path):
    chains = filled(tmp_path)
    with BlockStore(tmp_path) as store:
        for path in tmp_path.glob("index.sqlite*"):
            path.unlink()
        assert stops(store, chains[0]) == []
        insert(store, text(50, 51))
        insert(store, text(50, 51))
        assert [stops(store, chain) for chain in chains] == [[512, 900]] * 4
    works(tmp_path, chains, 4)


def test_blocks_that_do_not_belong_to_their_names_are_no_part_of_a_new_index(tmp_path):
    first, second = filled(tmp_path, 2)
    shutil.copy(one_block(tmp_path, first, 900), one_block(tmp_path, second, 900))
    one_block(tmp_path, first, 512).with_name("notes.txt").write_text("x")
    (tmp_path / "index.sqlite").unlink()
    with BlockStore(tmp_path) as store:
        assert stops(store, first) == [512, 900]
        assert stops(store, second) == [512]
    one_block(tmp_path, first, 512).unlink()
    (tmp_path / "index.sqlite").unlink()
    with BlockStore(tmp_path) as store:
        assert store.statistics().blocks == 0
        assert list((tmp_path / "blocks").rglob("*.mlxkv")) == []


ABSURD = {
    "negative": "-1",
    "zero": "0",
    "large": "9223372036854775807",
    "text": "'text'",
    "bytes": "x'00ff'",
    "real": "1e300",
    "long": "zeroblob(1000000)",
}
COLUMNS = {
    "words": ["word"],
    "blocks": ["name", "parent", "slot", "start", "stop", "rows_from", "size", "coding", "artifacts", "model", "refs"],
    "entries": ["block", "kind", "turn", "used", "state"],
    "pending": ["file", "temporary", "bytes", "pinned"],
    "quarantined": ["file", "bytes", "reason", "at"],
    "totals": ["key", "value"],
}


CASES = [(table, column, value) for table in COLUMNS for column in COLUMNS[table] for value in ABSURD]
FEW = CASES[:: len(ABSURD) + 1]  # another value for each column
STRIDE = int(os.environ.get("KILL_STRIDE", "2"))  # `make storm` sets it to 1; values are an odd number


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (case not in FEW)) for case in sorted({*CASES[::STRIDE], *FEW})],
)
def test_absurd_values_in_the_index_are_misses_or_a_new_index(template, tmp_path, table, column, value):
    path = tmp_path / "store"
    shutil.copytree(template[0], path)
    key = {"totals": "key", "quarantined": "file"}.get(table, "rowid")
    with_index(
        path, f"UPDATE OR IGNORE {table} SET {column} = {ABSURD[value]} WHERE {key} = (SELECT max({key}) FROM {table})"
    )
    works(path, template[1])


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A store with something in every table."""
    path = tmp_path_factory.mktemp("template")
    chains = filled(path, 3)
    with BlockStore(path) as store:
        damaged = insert(store, text(40))
        store.quarantine(damaged.name(512), "damaged")
    with_index(
        path,
        "INSERT INTO pending VALUES (1, 'blocks/00', '.00.tmp', 4224, 1)",
        "UPDATE blocks SET refs = refs + 1 WHERE id = 1",
    )
    return path, chains


@pytest.mark.parametrize(("start", "where"), [("stop - 1", "1"), ("stop", "1"), ("stop", "stop = 512")])
def test_blocks_in_a_circle_do_not_hang(tmp_path, start, where):
    chains = filled(tmp_path, 1)
    with_index(tmp_path, f"UPDATE blocks SET parent = id, start = {start} WHERE {where}")
    steps = []
    with BlockStore(tmp_path) as store:
        store._database._reader.set_progress_handler(lambda: steps.append(1) or len(steps) > 50, 10_000)
        assert stops(store, chains[0]) == []
        assert len(steps) <= 50
    works(tmp_path, chains)

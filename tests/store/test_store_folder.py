"""The folder of a store: whose it may be, and what of it survives damage, full disks and whatever lies in it."""

import errno
import os
import shutil
import sqlite3
import stat
import threading
import time

import pytest
from block_texts import LIMIT, ROOT, cut, data, disk_bytes, filled, insert, one_block, stops, text, works

from mlxkv.errors import FormatError, InputError
from mlxkv.store import database, keeper
from mlxkv.store import folder as folders
from mlxkv.store.chain import Chain
from mlxkv.store.folder import default_folder
from mlxkv.store.index import BlockStore


def modes(path):
    return {stat.S_IMODE(os.lstat(p).st_mode) for p in path.rglob("*") if p.is_dir() or p == path}, {
        stat.S_IMODE(os.lstat(p).st_mode) for p in path.rglob("*") if p.is_file()
    }


def test_no_other_user_can_read_it(tmp_path):
    path = tmp_path / "store"
    before = os.umask(0)
    try:
        with BlockStore(path, LIMIT) as store:
            insert(store, text(1, 2), state=100)
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o700
            assert modes(path) == ({0o700}, {0o600})
    finally:
        os.umask(before)


def test_a_folder_that_others_could_read_is_closed_to_them(tmp_path):
    tmp_path.chmod(0o755)
    BlockStore(tmp_path).close()
    assert stat.S_IMODE(os.stat(tmp_path).st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o722, 0o777])
def test_a_folder_that_others_may_write_is_refused(tmp_path, mode):
    filled(tmp_path, 1)
    tmp_path.chmod(mode)
    with pytest.raises(InputError, match="other users may write it; chmod 700"):
        BlockStore(tmp_path)


def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(InputError, match="belongs to another user"):
        BlockStore(tmp_path)


def test_a_folder_that_holds_anything_else_is_refused(tmp_path):
    (tmp_path / "letters").write_text("dear")
    with pytest.raises(InputError, match="holds 'letters', something else"):
        BlockStore(tmp_path)
    assert os.listdir(tmp_path) == ["letters"]


@pytest.mark.parametrize("name", ["file/store", "nul\0", "file"])
def test_a_folder_that_cannot_be_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot keep prompts in"):
        BlockStore(tmp_path / name)


def test_the_folder_is_that_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXKV_HOME", str(tmp_path / "home"))
    assert default_folder() == tmp_path / "home" / "store"
    monkeypatch.setenv("MLXKV_STORE", str(tmp_path / "own"))
    with BlockStore() as store:
        assert store.folder.path == tmp_path / "own"
    monkeypatch.delenv("MLXKV_HOME")
    monkeypatch.delenv("MLXKV_STORE")
    assert default_folder().name == "store"


def test_a_link_to_a_folder_is_followed_and_links_inside_are_not(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    chains = filled(tmp_path / "link", 1)
    assert (tmp_path / "disk" / "blocks").is_dir()
    works(tmp_path / "link", chains, 1)


@pytest.mark.parametrize("replacement", ["link", "pipe", "folder", "nothing"])
def test_what_is_no_file_is_not_opened(tmp_path, replacement):
    (chain,) = filled(tmp_path, 1)
    path = one_block(tmp_path, chain)
    path.unlink()
    if replacement == "link":
        path.symlink_to("/etc/passwd")
    elif replacement == "pipe":
        os.mkfifo(path)
    elif replacement == "folder":
        path.mkdir()
    with BlockStore(tmp_path) as store:
        with pytest.raises((OSError, FormatError)):
            store.open_block(chain.name(512))
        assert store.quarantine(chain.name(512), "no file")
        assert not store.quarantine(chain.name(512), "no file")
        assert stops(store, chain) == []
        assert not os.path.lexists(path)
    works(tmp_path, [chain], 0)


def test_a_damaged_block_is_set_aside_with_all_that_goes_on_from_it(tmp_path):
    first, second = filled(tmp_path, 2)
    path = one_block(tmp_path, second, 900)
    content = path.read_bytes()
    path.write_bytes(content[:100] + b"?" + content[101:])
    with BlockStore(tmp_path) as store:
        reason = "checksum does not match"
        ((name, found),) = store.verify().damaged
        assert name == second.name(900).hex()
        assert reason in found
        assert stops(store, second) == [512]
        assert stops(store, first) == [512, 900]
        assert store.statistics().quarantined == 1
        assert [file.read_bytes() for file in (tmp_path / "quarantine").iterdir()] == [
            path.parent and content[:100] + b"?" + content[101:]
        ]
        one_block(tmp_path, first).write_bytes(b"garbage")
        assert len(store.verify().damaged) == 1
        assert store.statistics()[1:3] == (0, 0)
    works(tmp_path, [first, second], 0)


def test_a_block_that_was_replaced_meanwhile_is_not_set_aside(tmp_path):
    (chain,) = filled(tmp_path, 1)
    with BlockStore(tmp_path) as store:
        seen = store.find(chain.name(900))
        assert not store.quarantine(chain.name(900), "damaged", seen=seen._replace(rows_from=5))
        assert stops(store, chain) == [512, 900]
        assert store.quarantine(chain.name(900), "damaged", seen=seen)
        assert stops(store, chain) == [512]


def test_quarantine_is_bounded_and_its_oldest_goes_first(tmp_path):
    with BlockStore(tmp_path, LIMIT) as store:
        for number in range(30):
            chain = insert(store, text((number, 100)), 60_000)
            store.quarantine(chain.name(100), f"damaged {number}")
        kept = sorted(path.name.split("-")[1] for path in (tmp_path / "quarantine").iterdir())
        assert 5 < len(kept) == store.statistics().quarantined < 20
        assert sum(path.stat().st_size for path in (tmp_path / "quarantine").iterdir()) < LIMIT / 20
        big = insert(store, text((99, 100)), 900_000)
        assert store.quarantine(big.name(100), "too large to keep")
        assert store.statistics().quarantined == len(kept)


def test_states_that_are_damaged_cost_only_themselves(tmp_path):
    (chain,) = filled(tmp_path, 1)
    (path,) = (tmp_path / "states").rglob("*.mlxkv")
    path.write_bytes(path.read_bytes()[:-1])
    with BlockStore(tmp_path) as store:
        assert len(store.verify().damaged) == 1
        assert stops(store, chain) == [512, 900]
        assert stops(store, chain, needs_state=True) == []


def test_verify_tells_how_far_it_is_and_hands_every_block_on(tmp_path):
    filled(tmp_path, 3)
    seen, steps = [], []

    def deep(reader, block):
        seen.append(block.stop)
        if block.stop == 900:
            raise FormatError("it decodes to nothing")

    with BlockStore(tmp_path) as store:
        found = store.verify(lambda done, total: steps.append((done, total)), deep)
        assert found.blocks == 1
        assert found.states == 0
        assert sorted(seen) == [512, 900, 900, 900]
        assert [reason for _, reason in found.damaged] == ["it decodes to nothing"] * 3
        assert steps == [(number, 7) for number in range(1, 8)]


def test_a_sweep_removes_what_no_row_knows_and_forgets_what_has_no_file(tmp_path):
    first, second = filled(tmp_path, 2)
    block = one_block(tmp_path, first)
    shutil.copy(block, block.with_name("00" * 16 + ".mlxkv"))
    block.with_name("." + "00" * 16 + ".mlxkv.0123456789abcdef.tmp").write_bytes(bytes(5000))
    (tmp_path / "quarantine" / "old").write_bytes(bytes(3000))
    (tmp_path / "states" / "zz").mkdir()
    one_block(tmp_path, second, 900).unlink()
    with BlockStore(tmp_path) as store:
        found = store.sweep()
        assert (found.files, found.missing) == (2, 1)
        assert found.freed > 7000
        assert stops(store, first) == [512, 900]
        assert stops(store, second) == [512]
        assert list((tmp_path / "quarantine").iterdir()) == []
        assert store.sweep() == (0, 0, 0)


def test_what_others_put_into_the_folder_is_counted(tmp_path):
    filled(tmp_path, 1)
    (tmp_path / "video").write_bytes(bytes(3 * 2**20))
    with BlockStore(tmp_path) as store:
        before = store.statistics().taken
        store.sweep()
        assert store.statistics().taken - before >= 3 * 2**20
        for number in range(60):
            insert(store, text((number, 100)), 300_000)
        assert disk_bytes(tmp_path) <= LIMIT


@pytest.mark.parametrize("call", ["fill", "rename", "begin"])
def test_a_full_disk_is_an_error_that_says_so_and_leaves_nothing_half_written(tmp_path, monkeypatch, call):
    chains = filled(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with BlockStore(tmp_path) as store:
        before = store.statistics()
        with monkeypatch.context() as patch:
            if call == "rename":
                patch.setattr(os, "rename", full)
            elif call == "fill":
                patch.setattr(folders, "sync", full)
            else:
                patch.setattr(folders.Folder, "begin", full)
            with pytest.raises(InputError, match="No space left on device; free some disk"):
                insert(store, text(60, 61))
        store.sweep()
        assert store.statistics()._replace(taken=0) == before._replace(taken=0)
        assert store.sweep() == (0, 0, 0)
        assert list(tmp_path.rglob("*.tmp")) == []
    works(tmp_path, chains, 4)


@pytest.mark.parametrize("what", ["block", "state", "replacement"])
def test_a_file_that_got_its_name_without_a_row_goes_or_gets_one(tmp_path, monkeypatch, what):
    """As when a process is killed between the two."""
    rename = os.rename

    def failing(*paths):
        rename(*paths)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    chain = Chain(ROOT, text(1))
    (new,) = cut(chain)
    with BlockStore(tmp_path, LIMIT) as store:
        if what != "block":
            insert(store, text(1), rows_from=300 if what == "replacement" else 0)
        with store.growing() as growth, monkeypatch.context() as patch:
            patch.setattr(os, "rename", failing)
            with pytest.raises(InputError, match="Input/output error"):
                growth.state(new.name, b"states") if what == "state" else growth.put(new, data(new, 5000))
        found = store.find(new.name)
        assert (found is None) == (what == "block")
        assert found is None or found._replace(size=0) == new
        assert store.statistics().stored == (found.size if found else 0)
        assert found is None or one_block(tmp_path, chain).stat().st_size == found.size
        assert store.sweep() == (0, 0, 0)
        assert store.verify().damaged == []
        assert not stops(store, chain, needs_state=True)


def insert_many(store, count):
    for number in range(count):
        insert(store, text((number, 100)))


def test_an_index_on_a_full_disk_is_an_error_that_says_so(tmp_path):
    chains = filled(tmp_path)
    with BlockStore(tmp_path) as store:
        pages = store._database._writer.execute("PRAGMA page_count").fetchone()[0]
        store._database._writer.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(InputError, match="full; free some disk"):
            insert_many(store, 200)
        assert [stops(store, chain) for chain in chains] == [[512, 900]] * 4
        store._database._writer.execute("PRAGMA max_page_count = 1000000")
        insert(store, text(70, 71))
    works(tmp_path, chains, 4)


def test_who_reads_for_long_keeps_no_one_from_the_bound(tmp_path, monkeypatch):
    """SQLite's log grows as long as someone reads an old state: a store rather stores nothing then."""
    monkeypatch.setattr(database, "_BUSY_SECONDS", 0.01)
    chains = filled(tmp_path)
    reader = sqlite3.connect(tmp_path / "index.sqlite")
    with BlockStore(tmp_path, LIMIT) as store:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM blocks").fetchone()
        for number in range(40):
            insert(store, text((number, 100)), 1000)
            assert disk_bytes(tmp_path) <= store.statistics().taken <= LIMIT
        assert not stops(store, Chain(ROOT, text((39, 100))))
        reader.close()
        insert(store, text(80, 81))
        assert stops(store, Chain(ROOT, text(80, 81))) == [512, 1024]
    works(tmp_path, chains)


def test_a_store_in_use_writes_down_what_was_used_and_sweeps_by_itself(tmp_path, monkeypatch):
    first, second = filled(tmp_path, 2)
    orphan = one_block(tmp_path, first).with_name("00" * 16 + ".mlxkv")
    orphan.write_bytes(bytes(5000))
    monkeypatch.setattr(keeper, "DELAY", 0.01)
    before = {*threading.enumerate()}  # stores of other tests may have theirs
    with BlockStore(tmp_path) as store, BlockStore(tmp_path) as other:
        assert other.entries()[0].name == second.name(900)
        store.touch(first.name(900))
        until = time.monotonic() + 30
        while orphan.exists() or other.entries()[0].name != first.name(900):
            assert time.monotonic() < until
            time.sleep(0.01)
    assert not {*threading.enumerate()} - before

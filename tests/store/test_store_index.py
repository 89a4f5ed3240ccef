"""Stored texts: what shares blocks, what is found again, what goes first."""

import time
from itertools import pairwise

import numpy as np
import pytest
from block_texts import ROOT, cut, data, disk_bytes, insert, stops, text

from mlxkv.errors import InputError
from mlxkv.store import index
from mlxkv.store.chain import SLOT, Chain, block_of, root_name
from mlxkv.store.index import BlockStore

LIMIT = 50 * 2**20


@pytest.fixture(autouse=True)
def _one_index(monkeypatch):
    """What a store says of its own is never taken for damage, for which it would make another index."""
    made = []
    monkeypatch.setattr(index, "fill", lambda *_: made.append(1))
    yield
    assert len(made) <= 1


@pytest.fixture
def store(tmp_path):
    with BlockStore(tmp_path / "store", LIMIT) as store:
        yield store


def written(store):
    return store.statistics().written


def test_places_of_equal_beginnings_have_equal_names_and_no_others():
    one, other = Chain(ROOT, text(1, 2, 3)), Chain(ROOT, text(1, 2, 4))
    assert [one.name(p) == other.name(p) for p in (0, 1, 511, 512, 1024)] == [True] * 5
    assert [one.name(p) == other.name(p) for p in (1025, 1026, 1536)] == [False] * 3
    assert len({one.name(p) for p in range(len(one) + 1)}) == len(one) + 1
    assert one.slot(512) == one.name(0) == ROOT
    assert one.slot(513) == one.slot(1024) == one.name(512)


@pytest.mark.parametrize("other", [("x", "{}", "38"), ("f00d.cafe", "[]", "38"), ("f00d.cafe", "{}", "exact")])
def test_another_model_cache_or_grade_shares_no_name(other):
    assert root_name(*other) != ROOT
    assert Chain(root_name(*other), [1, 2]).name(2) != Chain(ROOT, [1, 2]).name(2)


@pytest.mark.parametrize("tokens", [[2**31], [-(2**31) - 1], ["one"], [[1], [2, 3]]])
def test_what_is_no_token_has_no_name(tokens):
    with pytest.raises(InputError, match="32 bits"):
        Chain(ROOT, tokens)


@pytest.mark.parametrize("length", [1, 63, 511, 512, 513, 1500])
def test_a_text_is_found_again_up_to_its_last_token(store, length):
    chain = insert(store, text(1, 2, 3, length=length))
    found = store.longest(chain, length)
    assert [block.stop for block in found] == [*range(SLOT, length, SLOT), length]
    assert found[0].start == 0
    assert all(a.stop == b.start and a.name == b.parent for a, b in pairwise(found))
    longer = Chain(ROOT, text(1, 2, 3, length=length) + [5] * 2000)
    assert stops(store, longer)[-1] == length
    assert store.longest(longer, 2 * length + 9)[-1] == found[-1]


def test_no_more_is_found_than_asked_for(store):
    chain = insert(store, text(1, 2, 3), cuts=(700, 900))
    assert [stops(store, chain, most)[-1:] for most in (2000, 1500, 1000, 800, 600, 511)] == [
        [1536],
        [1024],
        [900],
        [700],
        [512],
        [],
    ]


def test_what_is_stored_is_read_back_byte_by_byte(store):
    chain = insert(store, text(1, 2), size=5000, state=300)
    for block in store.longest(chain, len(chain)):
        with store.open_block(block.name) as file:
            assert file.read() == data(block, 5000)
        assert store.find(block.name) == block
        assert block.size == len(data(block, 5000))
    with store.open_state(chain.name(len(chain))) as file:
        assert file.read() == data(block, 300)


def test_a_header_says_what_its_block_is(store):
    (block, *_) = cut(Chain(ROOT, text(1)))
    assert block_of({"meta": {"store": block.meta}}, 7) == block._replace(size=7)


@pytest.mark.parametrize(
    "change",
    [
        {"start": -1},
        {"start": 512},
        {"stop": 513},
        {"stop": 1.0},
        {"rows_from": 600},
        {"name": "00"},
        {"name": "zz" * 16},
        {"name": 5},
        {"model": "m" * 9999},
        {"coding": None},
        {"more": 1},
        {"parent": "00" * 16},
    ],
    ids=str,
)
def test_a_header_that_says_what_no_block_is_says_nothing(change):
    (block, *_) = cut(Chain(ROOT, text(1)))
    assert block_of({"meta": {"store": {**block.meta, **change}}}, 7) is None


def test_a_branch_costs_its_own_blocks_alone(store):
    insert(store, text(1, 2, 3, 4, 5))
    before = written(store)
    branch = insert(store, text(1, 2, 3, (9, 100)))
    new = store.longest(branch, len(branch))[-1]
    assert written(store) - before == new.size
    assert (new.start, new.stop) == (1536, 1636)


def test_a_conversation_that_grows_writes_no_token_twice(store):
    turns = [(7, 100), (8, 30), (9, 500), (10, 200), (11, 700)]
    for turn in range(1, len(turns) + 1):
        insert(store, text(*turns[:turn]))
    chain = Chain(ROOT, text(*turns))
    found = store.longest(chain, len(chain))
    assert [block.stop for block in found] == [100, 130, 512, 630, 830, 1024, 1530]
    assert written(store) == sum(block.size for block in found) == store.statistics().stored


def test_a_place_has_one_block_whatever_it_was_cut_into(store):
    whole = insert(store, text(1, 2))
    assert stops(store, whole) == [512, 1024]
    before = written(store)
    with store.growing() as growth:
        for block in cut(whole, cuts=(300,)):
            assert growth.put(block, data(block))
    found = store.longest(whole, 1024)
    assert [block.stop for block in found] == [512, 1024]
    assert store.find(whole.name(300)).size == written(store) - before
    assert stops(store, whole, 400) == [300]


def test_a_block_whose_rows_are_more_complete_takes_the_place_of_another(store):
    chain = insert(store, text(1, 2), rows_from=950)
    assert stops(store, chain, window=100) == []
    with store.growing() as growth:
        for block in cut(chain, cuts=(700,), rows_from=600):
            assert growth.put(block, data(block, seed=1))
    assert stops(store, chain, window=100) == [512, 700, 1024]
    assert stops(store, chain, 1023, window=100) == [512, 700]
    with store.open_block(chain.name(1024)) as file:
        assert file.read() == data(store.find(chain.name(1024)), seed=1)
    with store.growing() as growth:
        assert growth.put(cut(chain, rows_from=700)[-1], b"less complete")
    assert store.find(chain.name(1024)).rows_from == 600
    assert store.sweep() == (0, 0, 0)


@pytest.mark.parametrize(("window", "found"), [(0, 1800), (64, 1800), (300, 1536), (600, 1536), (2000, 300), (1, 1800)])
def test_a_window_is_gone_on_from_only_where_its_rows_are_there(store, window, found):
    tokens = text(1, 2, 3, 4, length=1800)
    chain = Chain(ROOT, tokens)
    with store.growing() as growth:
        for block in cut(chain, cuts=(300,)):
            rows_from = {300: 0, 512: 450, 1024: 1000, 1536: 900, 1800: 1600}[block.stop]
            assert growth.put(block._replace(rows_from=rows_from), data(block))
    assert stops(store, chain, window=window)[-1] == found


def test_a_model_with_states_goes_on_only_where_they_were_stored(store):
    tokens = text(1, 2, 3, length=1300)
    insert(store, tokens[:300], state=100)
    insert(store, tokens[:900], state=100)
    chain = insert(store, tokens)
    assert stops(store, chain) == [300, 512, 900, 1024, 1300]
    assert stops(store, chain, needs_state=True) == [300, 512, 900]
    assert stops(store, chain, 899, needs_state=True) == [300]
    assert stops(store, chain, 299, needs_state=True) == []
    store.quarantine(chain.name(900), "damaged", state=True)
    assert stops(store, chain, needs_state=True) == [300]
    assert stops(store, chain)[-1] == 1300


def test_states_beside_the_way_are_found(store):
    """A slot that was stored whole does not lead past a place inside it that another text was cut at."""
    chain = insert(store, text(1, 2))
    with store.growing() as growth:
        (block, *_) = cut(chain, cuts=(300,))
        assert growth.put(block, data(block))
        assert growth.state(block.name, b"states")
    assert stops(store, chain) == [512, 1024]
    assert stops(store, chain, needs_state=True) == [300]


def test_a_block_after_one_that_is_not_there_is_refused(store):
    first, second = cut(Chain(ROOT, text(1, 2)))
    with store.growing() as growth:
        assert not growth.put(second, data(second))
        assert not growth.state(first.name, b"states")
        assert not growth.end_at(first.name)
    assert store.statistics().blocks == 0
    with store.growing() as growth, pytest.raises(InputError, match="no block reaches from"):
        growth.put(first._replace(stop=513), b"x")
    with store.growing() as growth, pytest.raises(InputError, match="0 bytes"):
        growth.put(first, b"")


def entries(store):
    return [(entry.tokens, entry.kind) for entry in store.entries()]


def test_the_entry_moves_on_with_each_block_and_stays_where_one_is_wanted(store):
    chain = Chain(ROOT, text(1, 2, 3))
    first, second, third = cut(chain)
    with store.growing("user") as growth:
        growth.put(first, data(first))
        assert entries(store) == [(512, "user")]
        growth.put(second, data(second))
        assert entries(store) == [(1024, "user")]
        growth.end_at(second.name)
        growth.put(third, data(third))
        assert entries(store) == [(1536, "user"), (1024, "user")]
    with store.growing("assistant") as growth:
        growth.end_at(second.name)
        assert entries(store) == [(1024, "user"), (1536, "user")]
        growth.put(first, data(first))
        assert entries(store) == [(512, "assistant"), (1024, "user"), (1536, "user")]


def test_entries_say_what_they_take_alone_and_with_others(store):
    insert(store, text(1, 2, 3), kind="system", model="a/model")
    insert(store, text(1, 2, 4, 5), kind="user", state=700, model="a/model")
    sizes = {p: store.find(Chain(ROOT, text(1, 2, 4, 5)).name(p)).size for p in (512, 1024, 1536, 2048)}
    newest, oldest = store.entries()
    state = store.statistics().stored - sum(block.size for block in [store.find(Chain(ROOT, text(1, 2, 3)).name(1536))])
    assert (newest.tokens, newest.kind, newest.model) == (2048, "user", "a/model")
    assert newest.own == sizes[1536] + sizes[2048] + state - sum(sizes.values())
    assert newest.shared == oldest.shared == sizes[512] + sizes[1024]
    assert newest.used >= oldest.used > time.time() - 100


def fill(store, count=6, size=200_000):
    """Texts of one block after one that they share, as many as fit without any going."""
    for number in range(count):
        insert(store, text(1, 100 + number), size)


def kept(store, count=6):
    return [number for number in range(count) if stops(store, Chain(ROOT, text(1, 100 + number))) == [512, 1024]]


@pytest.fixture
def small(tmp_path):
    with BlockStore(tmp_path / "store", 4 * 2**20) as store:
        yield store


def test_the_text_that_was_not_used_for_longest_goes_first(small):
    fill(small, 20)
    assert 5 < len(kept(small, 20)) < 18
    assert kept(small, 20) == list(range(20 - len(kept(small, 20)), 20))
    assert small.statistics().evicted == 20 - len(kept(small, 20)) == 21 - small.statistics().blocks


@pytest.mark.parametrize("flushed", [False, True])
def test_a_text_that_was_used_stays_also_after_a_restart(small, flushed):
    fill(small, 12)
    oldest = kept(small, 12)[0]
    small.touch(Chain(ROOT, text(1, 100 + oldest)).name(1024))
    if flushed:
        small.flush()
    else:
        small.close()
    with BlockStore(small.folder.path, small.limit) as again:
        for number in range(20, 25):
            insert(again, text(1, number), 200_000)
        assert oldest in kept(again, 12)
        assert oldest + 1 not in kept(again, 12)


def test_blocks_that_others_need_stay(small):
    insert(small, text(1), 100_000, kind="system")
    fill(small, 20, 200_000)
    assert small.statistics().evicted > 3
    assert [entry.kind for entry in small.entries()] == ["assistant"] * len(kept(small, 20))
    assert small.statistics().written < 21 * 201_000  # nothing was stored again
    assert all(stops(small, Chain(ROOT, text(1, 100 + number)))[0] == 512 for number in range(20))


def test_a_text_goes_from_its_end(small):
    long = insert(small, text(*range(10)), 100_000)
    fill(small, 25, 100_000)
    left = stops(small, long)
    assert 0 < len(left) < 10
    assert left == [SLOT * (number + 1) for number in range(len(left))]
    assert small.entries()[-1].tokens == left[-1]


def test_a_text_that_has_no_room_is_stored_as_far_as_it_fits(small):
    with small.growing() as growth:
        blocks = cut(Chain(ROOT, text(*range(40))))
        taken = [growth.put(block, data(block, 200_000)) for block in blocks]
    assert 10 < sum(taken) < 20
    assert taken == sorted(taken, reverse=True)
    assert stops(small, Chain(ROOT, text(*range(40))))[-1] == SLOT * sum(taken)
    assert disk_bytes(small.folder.path) <= small.limit


def test_a_block_larger_than_the_store_moves_nothing_out(small):
    fill(small)
    (block,) = cut(Chain(ROOT, text(5)))
    with small.growing() as growth:
        assert not growth.put(block, bytes(5 * 2**20))
    assert kept(small) == list(range(6))


def test_a_store_opened_with_less_room_comes_within_it(tmp_path):
    with BlockStore(tmp_path, LIMIT) as store:
        fill(store, 30)
    with BlockStore(tmp_path) as store:
        assert store.limit == LIMIT
        assert kept(store, 30) == list(range(30))
    with BlockStore(tmp_path, 5 * 2**20) as store:
        assert kept(store, 30)[0] == store.statistics().evicted > 5
        assert disk_bytes(tmp_path) <= 5 * 2**20


def test_entries_are_removed_one_by_one_or_by_model(store):
    insert(store, text(1, 2), model="a/one")
    chain = insert(store, text(1, 3), model="a/one")
    insert(store, text(4, 5), model="another", state=50)
    assert store.remove(name=chain.name(1024)) == 1
    assert store.remove(name=chain.name(1024)) == 0
    assert stops(store, chain) == [512]
    assert store.remove(model="none") == 0
    assert store.remove(model="a/one") == 1
    assert [entry.model for entry in store.entries()] == ["another"]
    store.clear()
    assert store.statistics()[1:5] == (0, 0, 0, 0)
    assert store.sweep() == (0, 0, 0)


class Model:
    """A store in plain Python: it knows no bytes, and is told how many blocks are left."""

    def __init__(self):
        self.blocks, self.entries = {}, []  # names and parents; names, the one used last at the end
        self.moving = self.pinned = None  # the entry that moves on; the block that one is being written after

    def enter(self, name):
        new = name not in self.entries
        self.entries = [entry for entry in self.entries if entry != name] + [name]
        return new

    def put(self, block):
        self.blocks.setdefault(block.name, block.parent)
        new = self.enter(block.name)
        if self.moving not in (None, block.name) and self.moving in self.entries:
            self.entries.remove(self.moving)
        if new or self.moving != block.name:
            self.moving = block.name if new else None

    def needed(self, name):
        return name in (self.pinned, *self.entries, *self.blocks.values())

    def evict(self, spared):
        name = next(entry for entry in self.entries if entry != spared)
        at = self.entries.index(name)
        self.entries.remove(name)
        if not self.needed(name):
            above = self.blocks.pop(name)
            if above in self.blocks and not self.needed(above):
                self.entries.insert(at, above)

    def evict_to(self, count, spared):
        while len(self.blocks) > count:
            self.evict(spared)


@pytest.mark.parametrize("seed", range(4))
def test_a_store_holds_what_a_plain_model_of_it_holds_and_never_more_bytes_than_its_limit(tmp_path, seed):
    random, model = np.random.default_rng(seed), Model()
    store = BlockStore(tmp_path, 4 * 2**20)
    texts = [text(1)]
    for _ in range(40):
        tokens = list(texts[random.integers(len(texts))])
        chain = Chain(ROOT, tokens)
        action = random.integers(10)
        if action < 7:
            is_longer = random.integers(2) and len(tokens) < 3000  # the text goes on, or another one from inside it
            tokens = tokens[: len(tokens) if is_longer else random.integers(len(tokens) + 1)] + text(
                (int(random.integers(99)), int(random.integers(1, 900)))
            )
            texts.append(tokens)
            grow(store, model, Chain(ROOT, tokens), random)
        elif action == 7:
            used = [block.name for block in store.longest(chain, len(chain))]
            if used and used[-1] in model.entries:
                model.enter(used[-1])
            if used:
                store.touch(used[-1])
        elif action == 8:
            store.close()
            store = BlockStore(tmp_path)
        elif model.entries:
            name = model.entries[random.integers(len(model.entries))]
            store.remove(name=name)
            gone = name
            model.entries.remove(name)
            while gone in model.blocks and not model.needed(gone):
                gone = model.blocks.pop(gone)
        assert disk_bytes(tmp_path) <= store.statistics().taken <= store.limit
    assert [entry.name for entry in store.entries()] == model.entries[::-1]
    assert store.statistics().blocks == len(model.blocks)
    assert all(store.find(name).parent == parent for name, parent in model.blocks.items())
    assert store.verify().damaged == []
    assert store.sweep() == (0, 0, 0)
    store.close()


def grow(store, model, chain, random):
    """Put a text into both; whatever the store gives up for it, the model gives up as well."""
    known = store.longest(chain, len(chain))
    model.moving = None
    with store.growing() as growth:
        for block in cut(chain, known[-1].stop if known else 0):
            is_stored = growth.put(block, data(block, int(random.integers(1, 300_000))))
            spared = model.moving
            model.pinned = block.parent
            model.evict_to(store.statistics().blocks - is_stored, spared)
            model.pinned = None
            assert is_stored == (store.find(block.name) is not None)
            if not is_stored:
                if block.parent in model.blocks and not model.needed(block.parent):
                    model.entries.insert(0, block.parent)
                return
            model.put(block)


def test_the_end_of_an_entry_that_was_just_made_writes_nothing(store):
    chain = Chain(ROOT, text(1, 2))
    first, second = cut(chain)
    with store.growing() as growth:
        growth.put(first, data(first))
        before = store._database._writer.total_changes
        assert growth.end_at(first.name)
        assert store._database._writer.total_changes == before
        growth.put(second, data(second))
        assert growth.end_at(first.name)  # the one used last now
    assert entries(store) == [(512, "assistant"), (1024, "assistant")]


def test_the_limit_must_leave_room_for_something(tmp_path):
    with pytest.raises(InputError, match="has no room for prompts; give at least 4 MiB"):
        BlockStore(tmp_path, 2**20)

"""Whatever lies in a store, a request gets a cache of its own tokens or none: damaged files are misses that heal."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_model, tiny_tokens
from stored import assert_same, computed, stored

from mlxkv import Store
from mlxkv.codec import calibrate
from mlxkv.codec.parts import PartCodec
from mlxkv.store.chain import Chain
from mlxkv.store.codings import AGAIN_TOKENS
from mlxkv.store.snapshot import Snapshot

IDS = tiny_tokens(950)


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store", limit=10**9) as made:
        yield made


def path_of(store, prompts, stop, kind="blocks"):
    name = Chain(prompts._root, IDS).name(stop).hex()
    return store.blocks.folder.path / kind / name[:2] / f"{name}.mlxkv"


def _flip(path: Path, store, prompts):
    data = bytearray(path.read_bytes())
    data[200] ^= 1  # of a section that only decoding reads
    path.write_bytes(data)


def _remove(path: Path, store, prompts):
    path.unlink()


def _forge(path: Path, store, prompts, *, tokens=None, spec=None):
    """Write an intact block with another content."""
    snapshot = Snapshot(computed(MODEL, IDS), prompts.form, np.array(IDS, np.int32))
    part = snapshot.part(512, 900)
    part = part._replace(tokens=part.tokens if tokens is None else np.array(tokens, np.int32))
    other = spec or prompts.form.spec
    streams = {
        f"{'' if not i else f'{i}.'}{name}": [
            np.zeros((1, group.stream(name).heads, 388, group.stream(name).dim), np.float32)
            for _ in range(group.stream(name).layers)
        ]
        for i, group in enumerate(other.groups)
        for name in ("k", "v")
    }
    codec = PartCodec(calibrate.uncalibrated(other), quality=70)
    path.write_bytes(codec.encode(part._replace(streams=streams) if spec else part, {}))


def _other_tokens(path, store, prompts):
    _forge(path, store, prompts, tokens=IDS[:388])


def _other_shape(path, store, prompts):
    from mlxkv.models import cache_spec

    _forge(path, store, prompts, spec=cache_spec(tiny_model("llama", num_hidden_layers=1)))


MODEL = tiny_model("llama")
DAMAGE = [_flip, _remove, _other_tokens, _other_shape]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda each: each.__name__.strip("_"))
def test_what_stands_before_a_bad_block_is_used_and_the_next_insertion_heals_it(store, damage):
    prompts = store.for_model(MODEL, quality=70)
    stored(prompts, MODEL, IDS[:900])
    short, long = prompts.fetch(IDS[:600]), prompts.fetch(IDS)
    assert (short.length, long.length) == (512, min(900, 950 - AGAIN_TOKENS))
    damage(path_of(store, prompts, 900), store, prompts)
    fetched = prompts.fetch(IDS)
    assert fetched.length == 512
    assert_same(fetched.cache, short.cache)
    assert prompts.statistics()["errors"] == 1
    assert prompts.match(IDS) == 512  # it is looked at once
    stored(prompts, MODEL, IDS[:900])
    assert_same(prompts.fetch(IDS).cache, long.cache)


@pytest.mark.parametrize("damage", [_flip, _remove], ids=lambda each: each.__name__.strip("_"))
def test_a_bad_state_is_a_miss_and_an_earlier_turn_is_used(store, damage):
    model = tiny_model("lfm2")
    prompts = store.for_model(model)
    stored(prompts, model, IDS[:100])
    expected = prompts.fetch(IDS[:150]).cache
    stored(prompts, model, IDS[:200])
    damage(path_of(store, prompts, 200, "states"), store, prompts)
    fetched = prompts.fetch(IDS[:300])
    assert fetched.length == 100
    assert_same(fetched.cache, expected)
    stored(prompts, model, IDS[:200])
    assert prompts.fetch(IDS[:300]).length == 200


def test_a_state_of_another_text_is_a_miss(store):
    model = tiny_model("lfm2")
    prompts = store.for_model(model)
    stored(prompts, model, IDS[:100])
    stored(prompts, model, IDS[:200])
    shutil.copy(path_of(store, prompts, 100, "states"), path_of(store, prompts, 200, "states"))
    assert prompts.fetch(IDS[:300]).length == 100


def test_what_makes_room_for_others_while_it_is_read_is_no_error(store, monkeypatch, caplog):
    prompts = store.for_model(MODEL)
    stored(prompts, MODEL, IDS[:100])
    opened = store.blocks.open_block
    monkeypatch.setattr(store.blocks, "open_block", lambda name: (store.blocks.clear(), opened(name))[1])
    assert prompts.fetch(IDS) is None
    assert (prompts.statistics()["errors"], caplog.records) == (0, [])


@pytest.mark.parametrize("gone", ["blocks", "."])
def test_a_lost_folder_is_a_miss_and_made_again(store, gone):
    prompts = store.for_model(MODEL)
    stored(prompts, MODEL, IDS[:600])
    shutil.rmtree(store.blocks.folder.path / gone)
    assert prompts.fetch(IDS) is None
    assert prompts.statistics()["misses"] == 1
    stored(prompts, MODEL, IDS[:600])
    assert prompts.match(IDS) > 0


@pytest.fixture
def artifacts(tmp_path):
    """Artifacts of the tiny model in the library."""
    from mlxkv import KVTCRDConfig, lm, write_dump
    from mlxkv.codec import library
    from mlxkv.codec.calibrate import calibrate as learn
    from mlxkv.sensitivity import sensitivity

    dumps = []
    for seed in range(2):
        ids = tiny_tokens(140, seed=10 + seed)
        dump = lm.dump(MODEL, ids)
        dump.sensitivity = sensitivity(MODEL, ids)
        dumps.append(tmp_path / f"{seed}.npz")
        write_dump(dumps[-1], dump)
    return library.add(learn(dumps, KVTCRDConfig()))


def test_new_artifacts_code_new_blocks_and_old_ones_stay_readable(store, artifacts):
    away = artifacts.rename(artifacts.parent.with_name("away"))
    prompts = store.for_model(MODEL)
    assert prompts.codings.current.name == "direct 49.5"
    stored(prompts, MODEL, IDS[:600])
    assert not prompts.codings.refresh()
    away.rename(artifacts)
    assert prompts.codings.refresh()
    assert not prompts.codings.refresh()
    stored(prompts, MODEL, IDS[:900])
    assert [block.coding for block in store.blocks.longest(Chain(prompts._root, IDS), 900)] == [
        "direct 49.5",
        "direct 49.5",
        "kvtc-rd 39.5",
    ]
    assert prompts.fetch(IDS).length == min(900, 950 - AGAIN_TOKENS)
    assert store.for_model(MODEL).codings.current.name == "kvtc-rd 39.5"


def test_artifacts_that_are_gone_are_misses_until_their_blocks_are_made_again(store, artifacts):
    prompts = store.for_model(MODEL)
    stored(prompts, MODEL, IDS[:600])
    again = artifacts.rename(artifacts.parent.with_name("away"))
    other = store.for_model(MODEL)
    assert other.fetch(IDS) is None
    again.rename(artifacts)
    assert other.fetch(IDS).length == 600
    shutil.rmtree(artifacts)
    last = store.for_model(MODEL)
    stored(last, MODEL, IDS[:600])
    assert last.fetch(IDS).length == 600


def test_after_warming_up_a_block_waits_for_nothing_that_artifacts_derive(store, artifacts):
    prompts = store.for_model(MODEL)
    prompts.codings.warm(prompts.form.dtype)
    coder = prompts.codings.current.artifacts.coder(0)
    assert all("unweighted_basis" in vars(part) for part in coder._parts.values())

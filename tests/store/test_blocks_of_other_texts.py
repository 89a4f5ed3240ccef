"""A block lies where its own text, model and grade put it: one that was moved there from elsewhere is a miss."""

import shutil

import pytest
from conftest import tiny_model, tiny_tokens
from stored import assert_same, stored

from mlxkv import Store
from mlxkv.store.chain import Chain

BEGINNINGS = tiny_tokens(512, seed=1), tiny_tokens(512, seed=2)
END = tiny_tokens(100, seed=3)


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store", limit=10**9) as made:
        yield made


def path_of(store, prompts, ids):
    return store.blocks.folder.file("blocks", Chain(prompts._root, ids).name(len(ids)))


def test_equal_tokens_after_another_beginning_are_not_taken_for_each_other(store):
    model = tiny_model("llama")
    prompts = store.for_model(model, exact=True)
    one, other = (begin + END for begin in BEGINNINGS)
    cache = stored(prompts, model, one)
    stored(prompts, model, other)
    shutil.copy(path_of(store, prompts, other), path_of(store, prompts, one))
    assert prompts.fetch([*one, 1]).length == 512
    stored(prompts, model, one)
    assert_same(prompts.fetch([*one, 1]).cache, cache)


def test_the_same_text_of_another_model_of_the_same_form_is_not_taken_for_ones_own(store):
    models = tiny_model("llama"), tiny_model("llama", seed=5)
    one, other = (store.for_model(model) for model in models)
    for prompts, model in zip((one, other), models):
        stored(prompts, model, BEGINNINGS[0])
    shutil.copy(path_of(store, other, BEGINNINGS[0]), path_of(store, one, BEGINNINGS[0]))
    assert one.fetch([*BEGINNINGS[0], 1]) is None


def test_a_block_whose_entry_has_moved_on_before_it_is_removed_stays(store):
    model = tiny_model("llama")
    prompts = store.for_model(model, exact=True)
    ids = BEGINNINGS[0] + END
    stored(prompts, model, ids)
    store.blocks._changes.make(
        lambda db: store.blocks._changes.space.shorten(db, 1)
    )  # as `remove` does, a moment too late
    assert prompts.match([*ids, 1]) == len(ids)

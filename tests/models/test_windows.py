"""Dumps of caches with windows, lists and states of every kind come back as they were."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import ChunkedKVCache, KVCache, RotatingKVCache, make_prompt_cache
from zoo.build import build, tokens

from mlxkv import lm, stock
from mlxkv.dump import read_dump, write_dump
from mlxkv.errors import MismatchError, UnsupportedError
from mlxkv.models import cache_spec

WINDOW = 12  # of every tiny model here
NAMES = [
    "gemma3_text",
    "mimo_v2_flash",
    "gemma4",
    "recurrent_gemma",
    "baichuan_m1",
    "deepseek_v32",
    "llama4",
    "longcat_flash",
]


def run(model, cache, ids, step):
    logits = [model(mx.array([ids[i : i + step]]), cache=cache)[0] for i in range(0, len(ids), step)]
    mx.eval(logits, [entry.state for entry in cache])
    return mx.concatenate(logits)


@pytest.mark.parametrize(
    ("length", "step"), [(3, 1), (31, 5), *((n, step) for n in (WINDOW, WINDOW + 1, 31) for step in (1, 100))]
)
@pytest.mark.parametrize("name", NAMES)
def test_a_cache_that_was_restored_goes_on_bit_for_bit(name, length, step, tmp_path):
    model, ids = build(name), tokens(name, length + 4)
    cache = make_prompt_cache(model)
    run(model, cache, ids[:length], step)
    taken = lm.extract_cache(cache, cache_spec(model), [ids[:length]], dtype="float32")
    write_dump(tmp_path / "cache.npz", taken)
    again = lm.restore(model, read_dump(tmp_path / "cache.npz"))
    for step_after in (1, 2):
        expected = run(model, copy.deepcopy(cache), ids[length:], step_after)
        assert mx.array_equal(run(model, copy.deepcopy(again), ids[length:], step_after), expected)


def test_a_window_holds_its_newest_tokens_in_the_order_of_the_text():
    model, ids = build("gemma3_text"), tokens("gemma3_text", 30)
    by_one, at_once = (make_prompt_cache(model) for _ in range(2))
    run(model, by_one, ids, 1)
    run(model, at_once, ids, 100)
    found = [lm.extract_cache(cache, cache_spec(model), [ids], dtype="float32") for cache in (by_one, at_once)]
    assert found[0].rings == {1: 30 - 2 * WINDOW}
    assert found[1].rings == {1: WINDOW}
    for key in ("1.k", "1.v"):
        np.testing.assert_allclose(found[0].others[key], found[1].others[key], atol=1e-4)


def test_windows_are_part_of_the_bytes():
    taken = lm.dump(build("gemma3_text"), tokens("gemma3_text", 30))
    assert taken.fp16_bytes == 2 * 2 * 2 * 16 * (2 * 30 + 4 * WINDOW)


def test_a_dump_without_its_windows_is_not_restored():
    model = build("gemma3_text")
    taken = lm.dump(model, tokens("gemma3_text", 30))
    taken.others, taken.rings = {}, {}
    with pytest.raises(MismatchError, match="no windows"):
        lm.restore(model, taken)


@pytest.mark.parametrize("other", [RotatingKVCache(8), RotatingKVCache(WINDOW, keep=2), KVCache(), ChunkedKVCache(4)])
def test_a_cache_of_another_kind_than_the_models_is_refused(other):
    model, ids = build("gemma3_text"), tokens("gemma3_text", 5)
    cache = make_prompt_cache(model)
    run(model, cache, ids, 5)
    cache[0] = other
    with pytest.raises(UnsupportedError, match=rf"layer 0 keeps a {type(other).__name__}"):
        lm.extract_cache(cache, cache_spec(model), [ids])


@pytest.mark.parametrize("given", [[], [[]], [1, 2, 3], [[1, 2]]], ids=str)
@pytest.mark.parametrize("held", [0, 3])
def test_tokens_that_did_not_make_a_cache_are_refused(given, held):
    model = build("gemma3_text")
    cache = make_prompt_cache(model)
    if held:
        run(model, cache, [1, 2, 3], 3)
    with pytest.raises(MismatchError, match="tokens"):
        lm.extract_cache(cache, cache_spec(model), given)


def test_entries_within_lists_are_counted_one_by_one():
    model = build("deepseek_v32")
    cache = make_prompt_cache(model)
    assert len(stock.entries(cache)) == len(cache_spec(model).layers) == 2 * len(cache)
    new = stock.with_entries(cache, {1: "indexer"})
    assert (new[0][0], new[0][1]) == (cache[0][0], "indexer")
    assert cache[0][1] != "indexer"


def test_an_indexers_keys_are_states_and_come_back_exactly():
    taken = lm.dump(build("deepseek_v32"), tokens("deepseek_v32", 9))
    assert {key.split(".")[0] for key in taken.states} == {"1", "3", "5"}
    assert taken.states["1.0"].shape[2] == 9
    assert taken.states["1.1"].size == 1, "the zeros in the place of its values take no room"

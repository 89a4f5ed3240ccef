"""The newest tokens of packing caches are written in place, and nothing that was taken from a cache changes with it."""

import copy
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import pytest
from conftest import tiny_model, tiny_tokens
from live_checks import METHODS, feed, lone_cache, small

from mlxkv.live import live_config, make_cache
from mlxkv.live.arrays import KeysValues, iter_arrays
from mlxkv.live.base import cache_class_of
from mlxkv.live.packing import PackingCache
from mlxkv.live.tail import STEP, Tail
from mlxkv.spec import CacheSpec, Slot

TOY = CacheSpec("toy", ((Slot("keys", 2, 16), Slot("values", 2, 8)),))
PACKING = [method for method in METHODS if issubclass(cache_class_of(live_config(method)), PackingCache)]
WRITING = [*PACKING, "full"]


def numbers(seed, length, dim=16, dtype=mx.float16):
    return mx.random.normal((1, 2, length, dim), key=mx.random.key(seed)).astype(dtype)


def fed(cache, seed, count):
    """Outputs of so many single tokens."""
    return [feed(cache, numbers(seed + i, 1), numbers(seed - i, 1, 8), numbers(i, 1)) for i in range(count)]


def values_of(arrays):
    return [array.astype(mx.float32).tolist() for array in arrays]


def test_a_tail_is_its_chunks_one_after_the_other_with_fewer_than_16_rows_more():
    chunks = [
        KeysValues(numbers(i, size), numbers(i + 50, size, 8)) for i, size in enumerate((3, 1, 20, 8, 1, 1, 15, 16))
    ]
    tail, seen = Tail(*chunks[0]), chunks[0]
    for chunk in chunks[1:]:
        tail.append(*chunk)
        seen = seen.append(chunk)
        assert all(mx.array_equal(*pair) for pair in zip(tail.tokens(), seen, strict=True))
        assert seen.tokens == tail.rows <= tail.allocated == tail.keys.shape[2] == tail.values.shape[2] < tail.rows + 16


def test_arrays_that_a_tail_was_made_of_keep_their_values():
    given = KeysValues(numbers(1, 16), numbers(2, 16, 8))
    mx.eval(given)
    before, tail = values_of(given), Tail(*given)
    tail.rows = 10
    tail.append(numbers(3, 2), numbers(4, 2, 8))
    mx.eval(*tail.tokens())
    assert values_of(given) == before


def test_a_copied_tail_does_not_hold_the_array_that_its_tokens_are_of():
    whole = KeysValues(numbers(1, 2**14), numbers(2, 2**14, 8))
    mx.eval(whole)
    before = mx.get_active_memory()
    tail = Tail.copy_of(whole.slice_tokens(0, 8))
    mx.eval(*tail.tokens())
    whole = None
    assert mx.get_active_memory() < before - 2**14 * 2 * 16  # of 2 heads, keys alone in 2 bytes


def test_rows_that_were_taken_back_are_written_again():
    tail = Tail.copy_of(KeysValues(numbers(1, 9), numbers(2, 9, 8)))
    assert tail.allocated == 9
    tail.append(numbers(1, 10)[:, :, 9:], numbers(2, 10, 8)[:, :, 9:])
    tail.rows = 7
    tail.append(numbers(3, 2), numbers(4, 2, 8))
    assert mx.array_equal(tail.tokens().keys, mx.concatenate([numbers(1, 9)[:, :, :7], numbers(3, 2)], axis=2))
    assert tail.allocated == STEP


@pytest.mark.parametrize("method", WRITING)
def test_what_was_taken_from_a_cache_keeps_its_values(method):
    cache = lone_cache(method, TOY)
    mx.eval(fed(cache, 100, 37))
    taken = [*iter_arrays(cache.state), *iter_arrays(cache.buckets()), *cache.keys_and_values()]
    before = values_of(x for x in taken if x.dtype != mx.uint32) if method != "full" else values_of(taken[-2:])
    mx.eval(fed(cache, 300, 40))
    assert before == (
        values_of(x for x in taken if x.dtype != mx.uint32) if method != "full" else values_of(taken[-2:])
    )


def go_on(cache, seed):
    """Outputs of thirty tokens, which fill a block; a generator, so that caches can go on in turn."""
    for i in range(30):
        (output,) = fed(cache, seed + 7 * i, 1)
        mx.eval(output)
        yield output


def same(outputs, expected):
    return all(mx.array_equal(*each) for each in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("method", WRITING)
def test_copies_go_on_alone_in_two_threads(method):
    cache, twins = lone_cache(method, TOY), [lone_cache(method, TOY) for _ in range(2)]
    count = 37 if method == "full" else cache.sinks + cache.recent + cache.block  # the last token packs a block
    for each in (cache, *twins):
        mx.eval(fed(each, 100, count))
    copies, seeds = [copy.deepcopy(cache) for _ in range(2)], (300, 600)
    expected = [list(go_on(each, seed)) for each, seed in zip(twins, seeds)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda pair: list(go_on(*pair)), zip(copies, seeds)))
    assert all(same(*pair) for pair in zip(found, expected))
    assert cache.offset == count
    assert same(fed(cache, 300, 1), expected[0][:1])


@pytest.mark.parametrize("method", WRITING)
def test_a_cache_made_of_a_state_and_the_one_that_had_it_go_on_in_turn(method):
    cache, twins = lone_cache(method, TOY), [lone_cache(method, TOY) for _ in range(2)]
    for each in (cache, *twins):
        fed(each, 100, 37)
    made = type(cache).from_state(cache.state)
    outputs = zip(go_on(cache, 300), go_on(made, 600))
    assert all(map(same, outputs, zip(*map(go_on, twins, (300, 600)))))


@pytest.mark.parametrize("method", WRITING)
def test_a_copied_prompt_cache_continues_while_the_first_is_being_computed(method):
    model, prompt = tiny_model("llama"), mx.array([tiny_tokens(75)])
    caches = make_cache(model, method, **small(method))
    mx.eval(model(prompt, cache=caches))
    twin = copy.deepcopy(caches)
    outputs = [[], []]
    for token in range(12):  # nothing is computed until the end
        for kept, each in zip(outputs, (caches, twin)):
            kept.append(model(mx.array([[token]]), cache=each))
    mx.eval(outputs)
    assert all(mx.array_equal(*pair) for pair in zip(*outputs))


@pytest.mark.parametrize("kept", [1, 3, 5])
@pytest.mark.parametrize("method", PACKING)
def test_a_draft_that_packs_a_block_is_taken_back_exactly(method, kept):
    block = lone_cache(method, TOY)
    before = block.sinks + block.recent + block.block - 3  # the third token of the draft fills a block
    cache, fresh = lone_cache(method, TOY), lone_cache(method, TOY)
    for each in (cache, fresh):
        mx.eval(fed(each, 100, before))
    feed(cache, numbers(1, 6), numbers(2, 6, 8))
    assert cache.trim(6 - kept) == 6 - kept
    for i in range(kept):
        feed(fresh, numbers(1, 6)[:, :, i : i + 1], numbers(2, 6, 8)[:, :, i : i + 1])
    for outputs in zip(fed(cache, 900, 20), fed(fresh, 900, 20)):
        assert mx.array_equal(*outputs)
    assert all(mx.array_equal(*pair) for pair in zip(iter_arrays(cache.state), iter_arrays(fresh.state), strict=True))


def test_five_hundred_tokens_hold_nothing_but_what_is_stored():
    cache, held = lone_cache("int4", TOY), []
    key, value = numbers(1, 1), numbers(2, 1, 8)
    for i in range(501):
        mx.eval(feed(cache, key, value))  # as generation does, and not the state
        if i in (100, 500):
            held.append(mx.get_active_memory() - cache.nbytes)
    assert held[1] - held[0] < 10_000

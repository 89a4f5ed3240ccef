"""Methods that decode into arrays written in place: against the same method that takes each token in as a chunk."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from live_checks import METHODS, feed, lone_cache

from mlxkv.errors import FormatError
from mlxkv.live import live_methods
from mlxkv.live.arrays import iter_arrays
from mlxkv.live.counting import counted_attention
from mlxkv.live.in_place import InPlaceCache
from mlxkv.spec import CacheSpec, Slot

TOY = CacheSpec("toy", ((Slot("keys", 2, 16), Slot("values", 2, 8)),))
B, HQ, LONG = 2, 6, 220
IN_PLACE = [method for method in METHODS if issubclass(live_methods.get(method), InPlaceCache)]
VARIANTS = {
    **{method: (method, {}) for method in IN_PLACE},
    "h2o without recent tokens": ("h2o", {"heavy": 9, "recent": 0}),
    "h2o with room for all": ("h2o", {"heavy": 200, "recent": 100}),
    "streaming-llm without sinks": ("streaming-llm", {"sinks": 0, "recent": 1}),
    "mp-kvm by counts": ("mp-kvm", {"centroids": 12, "recent": 20, "flush": 8, "weights": "count"}),
    "mp-kvm of all heads": ("mp-kvm", {"centroids": 12, "recent": 9, "flush": 8, "partition": "shared", "decay": 1}),
    "a sketch of vectors": ("sketch-topk", {"heavy": 12, "recent": 8, "sketch": "race", "width": 64}),
    "a sketch of all heads": ("sketch-aggregate", {"heavy": 12, "recent": 8, "per": "layer"}),
    "a sketch with a target": ("sketch-topk", {"heavy": 12, "recent": 8, "target": 0.9}),
}


def numbers(seed, heads, dim, wide=1.0):
    """Exact in float16: storing them changes nothing."""
    x = np.random.default_rng(seed).normal(size=(B, heads, LONG, dim)) * wide
    return mx.array(x.astype(np.float16).astype(np.float32))


KEYS, VALUES, QUERIES = numbers(0, 2, 16, 1.5), numbers(1, 2, 8), numbers(2, HQ, 16, 1.5)


def go_on(cache, start, stop):
    return feed(cache, *(x[:, :, start:stop] for x in (KEYS, VALUES, QUERIES)))


def new_cache(variant):
    method, settings = VARIANTS[variant]
    return lone_cache(method, TOY, **settings)


def entries(cache):
    """What is stored, in an order that does not depend on rows."""
    parts = [np.array(mx.concatenate([pair[slot].words.view(mx.float16) for pair in cache.buckets()], axis=2))
             for slot in (0, 1)]  # fmt: skip
    rows = np.concatenate(parts, axis=-1).astype(np.float32)
    order = np.lexsort(np.moveaxis(rows, -1, 0), axis=-1)
    return np.take_along_axis(rows, order[..., None], axis=2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_in_place_keeps_and_answers_what_chunks_of_one_token_do(variant):
    random = np.random.default_rng(len(variant))
    cache, plain = new_cache(variant), new_cache(variant)
    plain._open_rows = lambda: None
    start, decoded = 0, 0
    while start < LONG:
        stop = min(LONG, start + int(random.choice([5, 30, *[1] * 20])))
        np.testing.assert_allclose(go_on(cache, start, stop), go_on(plain, start, stop), atol=2e-3)
        decoded, start = decoded + (cache._rows is not None), stop
        assert cache.kept == plain.kept
        if start % 40 < 2:
            np.testing.assert_allclose(entries(cache), entries(plain), atol=2e-3)
    assert decoded > 20
    np.testing.assert_allclose(entries(cache), entries(plain), atol=2e-3)


@pytest.mark.parametrize("method", IN_PLACE)
def test_neither_a_copy_nor_an_array_of_the_state_sees_what_is_written_later(method):
    cache = lone_cache(method, TOY)
    go_on(cache, 0, 70)
    for start in range(70, 90):
        go_on(cache, start, start + 1)
    twin, held = copy.deepcopy(cache), [x for x in cache.state if isinstance(x, mx.array)]
    before = [np.array(x) for x in held]
    for start in range(90, 130):
        assert mx.array_equal(go_on(cache, start, start + 1), go_on(twin, start, start + 1))
    assert all(np.array_equal(*pair) for pair in zip(before, held))
    third = type(cache).from_state(cache.state)
    outputs = [go_on(each, 130, 160) for each in (cache, twin, third)]
    assert mx.array_equal(outputs[0], outputs[1])
    np.testing.assert_allclose(outputs[0], outputs[2], atol=1e-5)


@pytest.mark.parametrize("method", IN_PLACE)
def test_rows_hold_what_their_bytes_say_and_no_row_twice(method):
    cache = lone_cache(method, TOY)
    go_on(cache, 0, 100)
    settled = cache.nbytes
    for start in (100, 101, 102):
        go_on(cache, start, start + 1)
    assert cache._rows is not None
    assert cache.nbytes == sum(array.nbytes for array in cache._rows.arrays())
    assert not [x for x in iter_arrays([vars(cache).get(name) for name in cache.state_fields]) if x.ndim == 4]
    assert settled < cache.nbytes < 2 * settled + 12_000


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_float16_keys_of_any_size_are_widened_exactly(scale):
    """Subnormal numbers, zeros and the largest: bits in place are the same numbers 2**112 smaller."""
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)][: 2**16 // 32 * 32 - 2048].reshape(1, 1, -1, 32)
    query = np.random.default_rng(0).normal(size=(1, 3, 1, 32)).astype(np.float32) * 1e-4
    output, mass = counted_attention(mx.array(query), mx.array(every), mx.array(every), scale, None, None)
    wide = every.astype(np.float64)
    scores = query.astype(np.float64) @ wide.swapaxes(-1, -2) * scale
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(output, weights @ wide, rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(mass, weights.sum(axis=1), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("change", ["free", "twice", "later", "not the newest"])
def test_h2o_refuses_a_state_whose_rows_cannot_be(change):
    cache = lone_cache("h2o", TOY)
    go_on(cache, 0, 100)
    for start in range(100, 120):
        go_on(cache, start, start + 1)
    cache.check_state()
    tokens = cache.tokens
    newest = tokens.came == 119
    replaced = {
        "free": {"free": tokens.free + 100},
        "twice": {"came": mx.where(newest, 118, tokens.came)},
        "later": {"came": mx.where(newest, 120, tokens.came)},
        "not the newest": {"came": mx.where(newest, 50, tokens.came)},
    }[change]
    cache.tokens = tokens._replace(**replaced)
    with pytest.raises(FormatError, match=r"tokens\.(free|came)"):
        cache.check_state()

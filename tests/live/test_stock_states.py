"""Saved states of mlx-lm's own caches: only what they still use, and a cache with it goes on exactly as before."""

import copy

import mlx.core as mx
import pytest
from mlx_lm.models.cache import ArraysCache, CacheList, ChunkedKVCache, KVCache, RotatingKVCache

from mlxkv.errors import FormatError
from mlxkv.live.arrays import iter_arrays, map_arrays
from mlxkv.stock import restore, used_state

WINDOW = 8
BEFORE = {  # chunk sizes; negative ones are tokens taken back
    "nothing": [],
    "before the window is full": [3, 1, 1],
    "one short of it": [1] * 7,
    "just full": [1] * 8,
    "just full by a chunk": [8],
    "wrapped by one": [1] * 9,
    "wrapped in the middle": [5, *[1] * 7],
    "wrapped twice": [1] * 21,
    "a chunk longer than the window": [20],
    "a chunk longer, then one": [20, 1],
    "chunks that leave more rows": [6, 5],
    "a chunk after wrapping": [*[1] * 13, 5],
    "chunk after chunk": [5, 4, 3, 9],
    "taken back": [5, -2],
    "taken back one by one": [*[1] * 6, -3, 1],
    "all taken back": [1, 3, -4],
}
AFTER = [[1] * 20, [3, 1, 1, 12, 1], [9, 1], [2, 2, 2]]
CLASSES = {
    "window": lambda: RotatingKVCache(WINDOW),
    "window that keeps 4": lambda: RotatingKVCache(WINDOW, keep=4),
    "all": KVCache,
    "chunked": lambda: ChunkedKVCache(WINDOW),
}


class Tokens:
    """Numbered tokens, fed to caches in chunks."""

    def __init__(self):
        self.next = 1

    def chunk(self, size):
        numbers = mx.arange(self.next, self.next + size, dtype=mx.float32)
        self.next += size
        keys = mx.broadcast_to(numbers[None, None, :, None], (1, 2, size, 4))
        return keys, -keys[..., :3]


def run(cache, sizes, tokens):
    outputs = []
    for size in sizes:
        if size < 0:
            assert cache.trim(-size) == -size
        else:
            if isinstance(cache, ChunkedKVCache):
                cache.maybe_trim_front()
            # Later tokens are written into the arrays that mlx-lm returns.
            outputs += [x + 0 for x in cache.update_and_fetch(*tokens.chunk(size))]
    return outputs


def filled(make, before):
    """A cache, the same class after one token, and its numbered tokens."""
    cache, example, tokens = make(), make(), Tokens()
    run(example, [1], Tokens())
    run(cache, BEFORE[before], tokens)
    return cache, example, tokens


def numbers_in(state):
    return {abs(x) for array in iter_arrays(state) for x in array.reshape(-1).tolist()}


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("kind", CLASSES)
def test_a_restored_cache_goes_on_as_the_saved_one(kind, before):
    cache, example, tokens = filled(CLASSES[kind], before)
    state = used_state(type(cache).__name__, cache.state, example)
    for after in AFTER:
        original, restored = CLASSES[kind](), CLASSES[kind]()
        original.state = map_arrays(cache.state, copy.copy)
        restore(restored, used_state(type(cache).__name__, map_arrays(state, copy.copy), example))
        same = Tokens()
        same.next = tokens.next
        expected = run(original, after, same)
        same.next = tokens.next
        for old, new in zip(expected, run(restored, after, same), strict=True):
            assert mx.array_equal(old, new)
        assert (restored.offset, restored.size()) == (original.offset, original.size())


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("kind", CLASSES)
def test_a_state_has_the_tokens_of_the_window_and_no_other(kind, before):
    cache, example, tokens = filled(CLASSES[kind], before)
    found = numbers_in(used_state(type(cache).__name__, cache.state, example))
    seen = []
    for size in BEFORE[before]:  # the numbers of the text's tokens
        seen = seen[:size] if size < 0 else [*seen, *range(start := max(seen, default=0) + 1, start + size)]
    if before == "taken back one by one":
        seen = [1, 2, 3, 7]
    keep = getattr(cache, "keep", 0)
    limit = {"all": len(seen), "chunked": 2**30}.get(kind, WINDOW)
    expected = set(seen[: min(keep, limit)]) | set(seen[keep:][-(limit - keep) or len(seen) :])
    assert found <= set(seen)
    if kind != "chunked":
        assert found == expected
    assert tokens.next > max(seen, default=0)


def test_a_list_of_caches_keeps_its_classes_and_what_each_uses():
    def make():
        return CacheList(ArraysCache(2), KVCache())

    cache, example = make(), make()
    for each, size in ((cache, 6), (example, 1)):
        each[0][0], each[0][1] = mx.ones((1, 3, 5)), mx.ones((1, 2))
        each[1].update_and_fetch(*Tokens().chunk(size))
    cache[1].trim(2)
    state = used_state("CacheList", cache.state, example)
    restored = make()
    restore(restored, state)
    assert [type(each) for each in restored.caches] == [ArraysCache, KVCache]
    assert restored[1].keys.shape == (1, 2, 4, 4)
    assert mx.array_equal(restored[0][0], cache[0][0])


def changed(entry, **parts):
    """The state of a cache with some parts replaced, by the names of attributes."""
    names = {RotatingKVCache: "keys values offset keep max_size _idx", KVCache: "keys values offset",
             ChunkedKVCache: "keys values offset chunk_size start_position", ArraysCache: "cache left_padding lengths"}  # fmt: skip
    return tuple(parts.get(name, getattr(entry, name)) for name in names[type(entry)].split())


ROWS = mx.zeros((1, 2, 8, 4)), mx.zeros((1, 2, 8, 3))
FORGED = {
    "a negative offset": ("window", {"offset": -1}),
    "an offset that is no number": ("window", {"offset": "5"}),
    "an offset that is true": ("all", {"offset": True}),
    "an offset beyond int32": ("window", {"offset": 2**40}),
    "an offset beyond the rows": ("all", {"offset": 257}),
    "a row beyond the rows": ("window", {"_idx": 9, "offset": 9}),
    "a row before the kept ones": ("window that keeps 4", {"_idx": 3, "offset": 30}),
    "more rows used than tokens": ("window", {"_idx": 5, "offset": 4}),
    "wrapped before it was full": ("window", {"keys": ROWS[0][:, :, :6], "values": ROWS[1][:, :, :6], "_idx": 3}),
    "another window": ("window", {"max_size": 9}),
    "another number of kept tokens": ("window", {"keep": 1}),
    "a window of another type": ("window", {"max_size": 8.0}),
    "keys without values": ("all", {"values": None}),
    "tokens without rows": ("all", {"keys": None, "values": None}),
    "fewer values than keys": ("all", {"values": ROWS[1][:, :, :7]}),
    "another number of heads": ("all", {"keys": ROWS[0][:, :1]}),
    "other dims": ("window", {"keys": mx.zeros((1, 2, 8, 5))}),
    "whole numbers": ("all", {"keys": ROWS[0].astype(mx.int32)}),
    "text": ("all", {"keys": "rows"}),
    "another chunk size": ("chunked", {"chunk_size": 9}),
    "a start after the end": ("chunked", {"start_position": 9}),
}


@pytest.mark.parametrize("name", FORGED)
def test_an_impossible_state_is_a_typed_error(name):
    kind, parts = FORGED[name]
    cache, example, _ = filled(CLASSES[kind], "just full")
    used_state(type(cache).__name__, changed(cache), example)
    with pytest.raises(FormatError):
        used_state(type(cache).__name__, changed(cache, **parts), example)


def convolutions(shape=(1, 3, 5)):
    cache = ArraysCache(2)
    cache[0] = mx.ones(shape)
    return cache


@pytest.mark.parametrize(
    "parts",
    [{"cache": [None]}, {"cache": [mx.ones((1, 3, 6)), None]}, {"cache": [mx.ones((1, 3, 5)), mx.ones((1, 2))]},
     {"cache": [mx.ones((0, 3, 5)), None]}, {"cache": [7, None]}, {"cache": 7}, {"lengths": mx.ones((1, 1))},
     {"left_padding": mx.zeros((2,), mx.int32)}],
)  # fmt: skip
def test_impossible_states_of_convolutions_are_typed_errors(parts):
    used_state("ArraysCache", changed(convolutions()), convolutions())
    with pytest.raises(FormatError):
        used_state("ArraysCache", changed(convolutions(), **parts), convolutions())

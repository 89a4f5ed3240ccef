"""Each method against a plain NumPy model of itself, over long random runs of append, trim, save and load.

MLXKV_STEPS sets the number of steps of all runs together; a method without a model here keeps the general invariants.
"""

import os

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_model
from live_checks import METHODS, feed, lone_cache, small, stored

from mlxkv.kernels._rotation import rotation
from mlxkv.live.arrays import iter_arrays
from mlxkv.live.packing import BLOCK
from mlxkv.live.seam import make_cache
from mlxkv.live.serialization import load_cache, save_cache
from mlxkv.spec import CacheSpec, Slot

pytestmark = pytest.mark.slow

STEPS = int(os.environ.get("MLXKV_STEPS", "5000")) // len(METHODS)
TOY = CacheSpec("toy", ((Slot("keys", 2, 16), Slot("values", 2, 16)),))


def coded(x, bits, tokens, dims):
    """x `[H, T, D]` through codes of so many bits, tiles of tokens x dims: minimum and step in float16."""
    H, T, D = x.shape
    tiles = x.astype(np.float32).reshape(H, T // tokens, tokens, D // dims, dims)
    low, high = tiles.min(axis=(2, 4), keepdims=True), tiles.max(axis=(2, 4), keepdims=True)
    step = ((high - low) / np.float32(2**bits - 1)).astype(np.float16).astype(np.float32)
    low = low.astype(np.float16).astype(np.float32)
    codes = np.clip(np.rint((tiles - low) / np.where(step == 0, 1, step)), 0, 2**bits - 1)
    return (step * codes + low).reshape(H, T, D)


class PlainPacking:
    """All tokens `[H, T, D]`; `packed` of them, after the sinks, went through codes, rotated or not."""

    def __init__(self, recent, key_tile, value_tile, *, sinks=0, block=BLOCK, rotated=(False, False)):
        self.recent, self.tiles, self.packed, self.sinks, self.block = recent, (key_tile, value_tile), 0, sinks, block
        self.rotations = [np.array(rotation(16)) if turn else np.eye(16, dtype=np.float32) for turn in rotated]
        self.slots = [np.zeros((2, 0, 16), np.float32)] * 2

    def append(self, keys, values, offset):
        self.slots = [np.concatenate(pair, axis=1) for pair in zip(self.slots, (keys, values))]
        while self.slots[0].shape[1] - self.sinks - self.packed >= self.recent + self.block:
            rows = slice(self.sinks + self.packed, self.sinks + self.packed + self.block)
            for x, tile, turn in zip(self.slots, self.tiles, self.rotations):
                x[:, rows] = coded(x[:, rows] @ turn, *tile) @ turn.T
            self.packed += self.block

    def trim(self, count):
        left = self.slots[0].shape[1] - count
        self.slots = [x[:, :left].astype(np.float16).astype(np.float32) for x in self.slots]
        self.packed = min(self.packed, max(0, left - self.sinks) // self.block * self.block)


class PlainSelection:
    """The kept tokens, and a rule which of them to give up."""

    def __init__(self, victims):
        self.victims, self.packed = victims, 0
        self.slots = [np.zeros((2, 0, 16), np.float32)] * 2

    def append(self, keys, values, offset):
        both = [np.concatenate(pair, axis=1) for pair in zip(self.slots, (keys, values))]
        self.slots = [np.delete(x, self.victims(x.shape[1], offset), axis=1) for x in both]

    def trim(self, count):
        self.slots = [x[:, :-count] for x in self.slots]


def window_victims(sinks, recent):
    return lambda count, offset: range(sinks, max(sinks, count - recent))


def random_victims(tokens, sinks, recent, layer):
    def victims(count, offset):
        middle = np.arange(sinks, max(sinks, count - recent))
        return np.random.default_rng([0, layer, offset]).choice(middle, max(0, count - tokens), replace=False)

    return victims


PLAIN = {
    "full": lambda: PlainSelection(lambda count, offset: []),
    "int8": lambda: PlainPacking(0, (8, 64, 1), (8, 1, 16)),
    "int4": lambda: PlainPacking(0, (4, 60, 1), (4, 2, 16), sinks=2, block=60, rotated=(True, True)),
    "kivi": lambda: PlainPacking(8, (2, 32, 1), (2, 1, 16), sinks=2, rotated=(False, True)),
    "streaming-llm": lambda: PlainSelection(window_victims(2, 20)),
    "sliding-window": lambda: PlainSelection(window_victims(0, 20)),
    "random": lambda: PlainSelection(random_victims(24, 2, 8, 0)),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_long_random_run_equals_the_plain_model(method):
    random = np.random.default_rng(METHODS.index(method))
    cache = lone_cache(method, TOY)
    plain = PLAIN.get(method, lambda: None)()
    trimmed = 0
    for step in range(STEPS):
        if cache.offset > 400:
            cache = lone_cache(method, TOY)
            plain = PLAIN.get(method, lambda: None)()
        if random.random() < 0.2 and cache.can_take_back(cache.offset):
            count = cache.trim(int(random.integers(1, 40)))
            trimmed += count
            if plain and count:
                plain.trim(count)
        else:
            append(cache, plain, random)
        if step % 20 == 0:
            compare(cache, plain)
    compare(cache, plain)
    assert trimmed or not cache.is_trimmable()


def append(cache, plain, random):
    length = int(random.choice([1, 1, 1, 2, 7, 33]))
    keys, values = (random.standard_normal((2, length, 16)).astype(np.float16) for _ in range(2))
    feed(cache, *(mx.array(x.astype(np.float32))[None] for x in (keys, values)))
    if plain:
        plain.append(keys.astype(np.float32), values.astype(np.float32), cache.offset)


def compare(cache, plain):
    assert cache.nbytes >= sum(array.nbytes for array in iter_arrays(cache.state))
    assert 0 <= cache.kept <= cache.offset
    for keys, values in cache.buckets():
        assert keys.shape == values.shape == (1, 2, keys.shape[2], 16)
    if plain and cache.kept:
        for slot in (0, 1):
            np.testing.assert_allclose(stored(cache, slot)[0], plain.slots[slot], atol=2e-3)
        assert plain.packed == sum(keys.shape[2] for keys, _ in cache.buckets() if not keys.is_unquantized)


@pytest.mark.parametrize("method", METHODS)
def test_saving_and_loading_at_random_times_changes_nothing(method, tmp_path):
    """Two caches get the same tokens; one of them is written and read back now and then."""
    model = tiny_model("llama", num_hidden_layers=1, head_dim=16)
    random = np.random.default_rng(7)
    stays, moves = (make_cache(model, method, **small(method)) for _ in range(2))
    for _ in range(max(5, STEPS // 50)):
        length = int(random.choice([1, 1, 7, 33]))
        tokens = mx.array(random.integers(0, 97, (1, length)))
        if stays[0].is_trimmable() and random.random() < 0.3:
            count = int(random.integers(1, 70))
            assert stays[0].trim(count) == moves[0].trim(count)
        if random.random() < 0.5:
            save_cache(tmp_path / "cache", model, moves)
            moves = load_cache(tmp_path / "cache", model)
            assert moves[0].offset == stays[0].offset
            assert moves[0].nbytes <= stays[0].nbytes  # no rows are saved that are only allocated
        assert mx.array_equal(model(tokens, cache=stays), model(tokens, cache=moves))
        if stays[0].offset > 400:
            stays, moves = (make_cache(model, method, **small(method)) for _ in range(2))


@pytest.mark.parametrize("method", ["int8", "int4", "kivi"])
def test_what_is_packed_does_not_depend_on_the_chunks(method):
    one, many = lone_cache(method, TOY), lone_cache(method, TOY)
    keys, values = (mx.random.normal((1, 2, 300, 16), key=mx.random.key(i)) for i in range(2))
    feed(one, keys, values)
    for start in range(0, 300, 7):
        feed(many, keys[:, :, start : start + 7], values[:, :, start : start + 7])
    assert [a.tolist() for a in iter_arrays(one.state)] == [a.tolist() for a in iter_arrays(many.state)]


def test_every_plain_model_is_of_a_method():
    assert set(PLAIN) <= set(METHODS)

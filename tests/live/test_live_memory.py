"""Bytes are real: `nbytes` is what the allocator holds, and a decoding step needs little more, however long the text."""

import gc

import mlx.core as mx
import pytest
from conftest import tiny_model
from live_checks import METHODS, feed, lone_cache
from mlx_lm.generate import generate_step, generation_stream

from mlxkv.kernels import metal
from mlxkv.kernels._products import TILE_FLOATS
from mlxkv.kernels._rotation import rotation
from mlxkv.live import live_config, make_cache
from mlxkv.live.base import cache_class_of
from mlxkv.live.packing import PackingCache
from mlxkv.spec import CacheSpec, Slot

pytestmark = pytest.mark.slow

TOY = CacheSpec("toy", ((Slot("keys", 4, 64), Slot("values", 4, 64)),))
SLACK = 32 * 1024  # a few small arrays, each in whole pages
PACKING = [method for method in METHODS if issubclass(cache_class_of(live_config(method)), PackingCache)]


def step(cache, length, dtype=mx.float32):
    """One chunk, cut from one projection as GPT-2 does it: keys and values are views of something larger."""
    both = mx.random.normal((1, length, 12, 64), key=mx.random.key(cache.offset)).astype(dtype).swapaxes(1, 2)
    mx.eval(feed(cache, both[:, 4:8], both[:, 8:], both[:, :4]), cache.state)


def default_cache(method):
    return cache_class_of(live_config(method))(live_config(method), TOY, 0)


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """`active` collects garbage often, and need not go through every library's objects."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_recycled_buffers():
    """A buffer that MLX recycles may be two pages larger than what is put into it."""
    limit = mx.set_cache_limit(0)
    yield
    mx.set_cache_limit(limit)


def active():
    gc.collect()
    return mx.get_active_memory()


@pytest.mark.parametrize("method", METHODS)
def test_bytes_at_2048_tokens_are_those_the_allocator_holds(method):
    rotation(64)  # which all caches share
    before = active()
    cache = default_cache(method)
    for _ in range(4):
        step(cache, 512)
    for _ in range(70):
        step(cache, 1)
    assert cache.offset == 2118
    assert active() - before == pytest.approx(cache.nbytes, rel=0.02)
    if cache.is_trimmable():
        cache.trim(1100)
        mx.eval(cache.state)
        assert active() - before == pytest.approx(cache.nbytes, rel=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_generation_holds_no_attention_that_has_been_counted(method):
    """mlx-lm evaluates nothing but outputs, which do not need what a method counts until it acts on it."""
    model, held = tiny_model("llama", num_hidden_layers=1), []
    cache = make_cache(model, method)
    for i, _ in enumerate(generate_step(mx.array([1, 2, 3]), model, prompt_cache=cache, max_tokens=121)):
        if i in (60, 120):
            mx.synchronize(generation_stream)  # the next step runs already, and holds what it has not yet finished with
            held.append(active() - cache[0].nbytes)
    assert held[1] - held[0] < 20_000  # 60 steps' attention of 4 heads and 60 to 120 tokens would be 86,400


@pytest.mark.parametrize("method", METHODS)
def test_chunks_of_two_hold_no_attention_either(method):
    model, held = tiny_model("llama", num_hidden_layers=1), []
    cache = make_cache(model, method)
    for i in range(61):
        mx.eval(model(mx.array([[1, 2]]), cache=cache))
        if i in (30, 60):
            held.append(active() - cache[0].nbytes)
    assert held[1] - held[0] < 20_000


@pytest.mark.parametrize("method", METHODS)
def test_no_view_keeps_a_larger_array_alive(method):
    before = active()
    cache = lone_cache(method, TOY)
    for length in (64, 1, 1, 63, 1, 130, 5):
        step(cache, length, mx.bfloat16)
        if cache.takes_tokens_back:
            cache.trim(0)  # forgets the states that a small chunk can be taken back to
        assert active() - before < cache.nbytes + SLACK, length


@pytest.mark.skipif(metal.available(), reason="the kernel unpacks nothing; these are the tiles of the reference")
@pytest.mark.parametrize("method", PACKING)
def test_a_decoding_step_needs_a_few_tiles_however_long_the_text(method):
    tokens = 65536
    cache = default_cache(method)
    cache.offset = tokens
    cache.absorb(*mx.random.normal((2, 1, 4, tokens, 64), key=mx.random.key(0)).astype(mx.float16), None)
    mx.eval(cache.state)
    before = active()
    mx.reset_peak_memory()
    step(cache, 1)
    scores = 4 * 4 * tokens * 12  # of 4 query heads: scores, weights, what is made of them on the way, scales of values
    unpacked = tokens * 4 * 128 * 4
    # MLX makes room for up to a hundred operations ahead of those that run.
    assert mx.get_peak_memory() - before < 12 * 4 * TILE_FLOATS + scores < unpacked / 2

"""The live method klt: its budget, its errors, what it makes of strange values, and states that it refuses."""

import copy
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_model, tiny_tokens
from live_checks import feed, lone_cache, plain_attention, stored

from mlxkv.errors import FormatError
from mlxkv.kernels.bits import unpack
from mlxkv.live import make_cache
from mlxkv.live.klt import coding
from mlxkv.live.methods.klt import SHORTEST, KLTCache, KLTConfig
from mlxkv.spec import CacheSpec, Layer, Rope, Slot

LEARN = 64


def spec_of(dim=64, heads=2, layers=1, rope=None):
    layer = Layer(Slot("k", heads, dim, rope), Slot("v", heads, dim))
    return CacheSpec("toy", (layer,) * layers)


def klt(dim=64, heads=2, rope=None, **settings):
    return lone_cache("klt", spec_of(dim, heads, rope=rope), **{"learn": LEARN, **settings})


def decaying(tokens, dim=64, heads=2, seed=0):
    """Tokens in a random basis a head, with deviations that halve every dim / 8 directions, about a mean."""
    random = np.random.default_rng(seed)
    basis = np.linalg.qr(np.random.default_rng(dim).normal(size=(heads, dim, dim)))[0]
    x = random.normal(size=(1, heads, tokens, dim)) * 2.0 ** (-np.arange(dim) * 8 / dim)
    return mx.array((x @ basis + 0.3).astype(np.float32))


def error(cache, slot, tokens):
    """Mean square error of all stored tokens but the exact ones, beside that of the tokens' variance; any order within a bucket."""
    found = [np.array(unpack(bucket[slot], mx.float32)) for bucket in cache.buckets()]
    middle, exact = found[len(found) // 2], np.array(tokens)
    products = middle.astype(np.float64) @ exact.swapaxes(-1, -2)
    squares = [np.square(x.astype(np.float64)).sum(axis=-1) for x in (middle, exact)]
    nearest = (squares[0][..., None] + squares[1][..., None, :] - 2 * products).min(axis=-1) / exact.shape[-1]
    return nearest.mean() / exact.var(axis=2).mean()


@pytest.mark.parametrize(
    ("dim", "heads", "budget"), [(64, 3, 0.11), (64, 3, 0.2), (64, 3, 0.3), (128, 2, 0.2), (80, 1, 0.25)]
)
@pytest.mark.parametrize("prompt", [SHORTEST, 1030, 1500])
def test_all_layers_together_keep_within_the_budget_after_the_prompt_and_after_every_token(dim, heads, budget, prompt):
    spec = spec_of(dim, heads, layers=2)
    caches = [KLTCache(KLTConfig(budget=budget), spec, layer) for layer in range(2)]
    for cache in caches:
        cache._take_shapes(prompt)
    token = mx.zeros((1, heads, 1, dim), mx.bfloat16)
    for tokens in range(prompt, prompt + 80):
        held = sum(cache.nbytes for cache in caches)
        assert held <= budget * tokens * 2 * 2 * heads * dim * 2, tokens
        for cache in caches:  # nothing is computed
            cache.attend(token, *cache.update_and_fetch(token, token), 1.0)
    assert held > 0.8 * budget * tokens * 2 * 2 * heads * dim * 2


@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 3])
def test_a_token_attends_to_what_buckets_say(dim, group):
    cache = klt(dim, recent=8, budget=0.4)
    prompt, later = decaying(200, dim), decaying(40, dim, seed=1)
    feed(cache, prompt, prompt)
    for i in range(40):
        token, queries = later[:, :, i : i + 1], mx.random.normal((1, 2 * group, 1, dim), key=mx.random.key(i))
        output = cache.attend(queries, *cache.update_and_fetch(token, token), 0.3)
    # A block was packed with the last token at most: those that were not are in the tail.
    seen = [stored(cache, slot) for slot in (0, 1)]
    assert seen[0].shape[2] == 240
    if cache.tail.tokens > 8:
        np.testing.assert_allclose(output, plain_attention(np.array(queries), *seen, 0.3, None), atol=4e-3, rtol=4e-3)


def test_errors_are_below_those_of_int4_in_fewer_bytes():
    tokens = decaying(1500)
    caches = [klt(budget=0.25, learn=256), lone_cache("int4", spec_of(), sinks=4)]
    for cache in caches:
        feed(cache, tokens, tokens)
    ours, uniform = caches
    assert ours.nbytes < uniform.nbytes
    for slot in (0, 1):
        assert error(ours, slot, tokens) < 0.7 * error(uniform, slot, tokens)


def test_errors_fall_with_the_budget():
    tokens, found = decaying(1200), []
    for budget in (0.11, 0.15, 0.2, 0.3, 0.5):
        cache = klt(budget=budget, learn=256)
        feed(cache, tokens, tokens)
        found.append(error(cache, 0, tokens))
    assert all(more < 0.8 * less for less, more in pairwise(found)), found


def test_tokens_that_get_attention_have_the_smallest_errors():
    tokens = decaying(400)
    cache = klt(budget=0.2, learn=256)
    liked = np.zeros(400, bool)
    liked[50:370:16] = True  # 20 of 352 that are packed: all fit the first bucket
    mass = mx.array(np.where(liked, 1.0, 1e-3).astype(np.float32))[None, None] * mx.ones((1, 2, 1))
    chunk = cache.update_and_fetch(tokens, tokens)
    cache.absorb(*(part.astype(mx.float16) for part in chunk), mass)
    keys = np.array(coding.decoded(cache.packed_keys))[0, 0]
    exact = np.array(tokens)[0, 0]
    rows = cache.packed_keys.rows[0]
    first = np.sort([((exact - row) ** 2).mean(axis=-1).argmin() for row in keys[:rows]])
    assert set(np.flatnonzero(liked)) <= set(first.tolist())
    errors = [min(((exact - row) ** 2).mean(axis=-1)) for row in keys]
    assert np.mean(errors[:rows]) < 0.7 * np.mean(errors[rows:])


def test_keys_of_later_positions_are_expected():
    rope = Rope(dims=64, base=10000.0)
    turned = lambda x, start: rope.rotate(x, start)  # noqa: E731
    spread = mx.array(2.0 ** (-np.arange(64) / 6).astype(np.float32))
    plain = mx.random.normal((1, 2, 900, 64), key=mx.random.key(0)) * spread + 3 * mx.sin(mx.arange(64))
    keys, found = turned(plain, 0), {}
    for name, known in (("expected", rope), ("unexpected", None)):
        cache = klt(rope=known, budget=0.2, learn=256)
        feed(cache, keys[:, :, :300], keys[:, :, :300])
        feed(cache, keys[:, :, 300:], keys[:, :, 300:])
        found[name] = error(cache, 0, keys)
    assert found["expected"] < found["unexpected"]


VALUES = {
    "zeros": lambda x: 0 * x,
    "one value": lambda x: 0 * x + 7,
    "one direction": lambda x: x[..., :1] + 0 * x,
    "the largest of float16": lambda x: 65504 * mx.sign(x),
    "the smallest of float16": lambda x: 6e-8 * mx.sign(x),
    "beyond float16": lambda x: 1e15 * x,
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_strange_values_stay_finite_and_near(name, dtype):
    if name == "beyond float16" and dtype == mx.float16:
        pytest.skip("float16 has no such values")
    x = VALUES[name](mx.random.normal((1, 2, 140, 64), key=mx.random.key(0))).astype(dtype)
    cache, queries = klt(), mx.full(x.shape, 1e-20)
    for start, stop in ((0, 110), (110, 111), (111, 130), *((i, i + 1) for i in range(130, 140))):
        part = x[:, :, start:stop]
        output = feed(cache, part, part, queries[:, :, start:stop].astype(dtype))
        assert mx.isfinite(output).all()
    held, most = stored(cache, 0), float(mx.abs(x.astype(mx.float32)).max())
    assert np.isfinite(held).all()
    assert np.abs(held).max() <= 3 * most + 1e-9  # steps of 2 bits are wide
    cache.check_state()


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_errors_do_not_depend_on_the_size_of_values(scale):
    tokens, found = decaying(300).astype(mx.bfloat16).astype(mx.float32), []
    for factor in (1, scale):
        cache = klt(learn=128)
        feed(cache, *[(tokens * factor).astype(mx.bfloat16)] * 2)
        found.append(error(cache, 0, tokens * factor))
    np.testing.assert_allclose(found[1], found[0], rtol=0.1)


@pytest.mark.parametrize("sizes", [(300,), (290, 1, 9), (100, 100, 100), (17,) * 17 + (11,), (1,) * 300])
def test_prompts_in_chunks_of_any_size_keep_every_token(sizes):
    tokens = decaying(300)
    cache, start = klt(), 0
    for size in sizes:
        output = feed(cache, *[tokens[:, :, start : start + size]] * 2)
        mx.eval(output, cache._arrays())
        start += size
    assert cache.kept == cache.offset == 300
    cache.check_state()
    held = np.concatenate([np.array(unpack(bucket[0], mx.float32)) for bucket in cache.buckets()], axis=2)
    # Each is stored once: the sums are alike.
    np.testing.assert_allclose(held.mean(axis=2), np.array(tokens).mean(axis=2), atol=0.02)


def test_a_copy_goes_on_by_itself():
    tokens = decaying(200)
    cache = klt()
    feed(cache, tokens, tokens)
    twin = copy.deepcopy(cache)
    outputs = [[feed(each, *[tokens[:, :, i : i + 1]] * 2) for i in range(20)] for each in (cache, twin)]
    for mine, other in zip(*outputs):
        assert mx.array_equal(mine, other)
    assert (cache.kept, twin.kept) == (220, 220)


def changed(cache, name, **parts):
    setattr(cache, name, getattr(cache, name)._replace(**parts))


FORGED = {
    "order": lambda c: changed(c, "packed_keys", order=mx.full(c.packed_keys.order.shape, 200, mx.uint8)),
    "place": lambda c: changed(c, "packed_values", place=c.packed_values.place * mx.array(float("nan"), mx.bfloat16)),
    "basis": lambda c: changed(c, "packed_keys", basis=c.packed_keys.basis[..., :-1]),
    "mean": lambda c: changed(c, "packed_keys", mean=c.packed_keys.mean + float("nan")),
    "codes": lambda c: changed(c, "packed_keys", codes_c=c.packed_keys.codes_c[:, :, :-1]),
    "rows": lambda c: changed(c, "packed_values", codes_a=c.packed_values.codes_a[..., :0]),
    "scales": lambda c: changed(c, "packed_values", scales_b=c.packed_values.scales_b[:, :, :0]),
    "attention": lambda c: setattr(c, "attention", c.attention[..., 1:]),
    "seen": lambda c: setattr(c, "seen", c.seen[..., 1:]),
    "first": lambda c: setattr(c, "first", None),
    "without": lambda c: setattr(c, "packed_values", None),
    "tail": lambda c: setattr(c, "tail", None),
}


@pytest.mark.parametrize("name", FORGED)
def test_states_that_it_cannot_have_are_refused(name):
    cache = klt()
    feed(cache, decaying(200), decaying(200))
    cache.check_state()
    FORGED[name](cache)
    with pytest.raises(FormatError):
        cache.check_state()


def test_predictions_come_nearer_with_the_budget():
    model, tokens = tiny_model("llama"), mx.array([tiny_tokens(700)])
    exact = model(tokens[:, -40:], cache=filled(model, "full", tokens))
    exact = exact - mx.logsumexp(exact, axis=-1, keepdims=True)
    found = []
    for budget in (0.15, 0.25, 0.5):
        near = model(tokens[:, -40:], cache=filled(model, "klt", tokens, budget=budget))
        near = near - mx.logsumexp(near, axis=-1, keepdims=True)
        found.append(float((mx.exp(exact) * (exact - near)).sum(axis=-1).mean()))
    assert found[0] > found[1] > found[2] >= 0


def filled(model, method, tokens, **settings):
    caches = make_cache(model, method, **settings)
    mx.eval(model(tokens[:, :-40], cache=caches))
    return caches

"""SmartKV: budgets to the byte, precision that only falls, and more of it for tokens that get attention."""

import math

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_model, tiny_tokens
from live_checks import feed, lone_cache, stored

from mlxkv.errors import InputError, UnsupportedError
from mlxkv.live.importance import update_importance
from mlxkv.live.methods.smartkv import TOP, SmartKVConfig
from mlxkv.live.seam import make_cache
from mlxkv.spec import CacheSpec, Slot


def spec(key_dim=64, value_dim=64, heads=2, layers=1):
    return CacheSpec("toy", ((Slot("keys", heads, key_dim), Slot("values", heads, value_dim)),) * layers)


def normal(seed, shape):
    return mx.random.normal(shape, key=mx.random.key(seed))


def fill(cache, sizes, batch=1, seed=0):
    """Random tokens in chunks of these sizes; yields after each."""
    keys, values = cache.slots
    for step, size in enumerate(sizes):
        rows = [
            normal(seed + 2 * step + i, (batch, slot.heads, size, slot.dim)) for i, slot in enumerate((keys, values))
        ]
        feed(cache, *rows)
        mx.eval(cache.state)
        yield


def counts(cache):
    """Tokens in each bucket, by rising precision, and in the tail."""
    buckets = (*cache.lower, cache.top, cache.tail)
    return [0 if bucket is None else bucket[0].shape[-2] for bucket in buckets]


def random_sizes(rng, total):
    sizes = []
    while sum(sizes) < total:
        sizes.append(int(rng.choice([1, 1, 1, 1, 1, 2, 9, 70, 250])))
    return sizes


@pytest.mark.parametrize("prompt", [[512], [1024], [2048], [2048, 2048]], ids=sum)
@pytest.mark.parametrize("budget", [0.3, 0.5, 0.7])
def test_the_budget_holds_right_after_a_prompt_and_for_every_token_from_there(budget, prompt):
    cache = lone_cache("smartkv", spec(64, 64, 3), budget=budget)
    sizes = [*prompt, *[1] * 20]
    for step, _ in enumerate(fill(cache, sizes)):
        share = cache.nbytes / (2 * 3 * (64 + 64) * cache.offset)
        assert share <= budget or step < len(prompt) - 1
    assert share > 0.9 * budget


@pytest.mark.parametrize("budget", [0.2, 0.25, 0.3, 0.5])
@pytest.mark.parametrize(("dims", "heads"), [((64, 64), 3), ((64, 128), 2), ((48, 80), 1)])
def test_the_budget_holds_right_after_a_prompt_of_the_least_length_for_which_it_should(dims, heads, budget):
    least = math.ceil(lone_cache("smartkv", spec(*dims, heads), budget=budget).budget.holds_from)
    for length in (least, least + 1, least + 31, 2 * least):
        cache = lone_cache("smartkv", spec(*dims, heads), budget=budget)
        for _ in fill(cache, [length]):
            assert cache.nbytes <= budget * 2 * heads * sum(dims) * length


@pytest.mark.parametrize(("dims", "heads", "budget"), [
    ((64, 64), 3, 0.3), ((64, 64), 1, 0.5), ((64, 64), 2, 0.7), ((128, 128), 1, 0.22), ((64, 64), 2, 0.21),
    ((16, 8), 2, 0.5), ((8, 8), 2, 0.5), ((48, 80), 1, 0.4), ((64, 64), 1, 1.0)])  # fmt: skip
def test_the_budget_holds_to_the_byte_after_every_chunk(dims, heads, budget):
    rng, batch = np.random.default_rng([heads, *dims]), 1 + (heads == 1)
    for allocator in ("greedy", "exact", "uniform"):
        cache = lone_cache("smartkv", spec(*dims, heads), budget=budget, allocator=allocator)
        seen = 0
        sizes = random_sizes(rng, 2.2 * cache.budget.holds_from + 300)
        for size, _ in zip(sizes, fill(cache, sizes, batch)):
            seen += size
            assert cache.kept == cache.offset == seen
            share = max(seen, (cache.budget.holds_from + 3 * seen) / 4)  # the budget itself from `short` tokens on
            assert cache.nbytes <= budget * 2 * batch * heads * sum(dims) * share
        used = cache.nbytes / (2 * batch * heads * sum(dims) * seen)
        assert allocator == "uniform" or used > 0.85 * budget, "bytes are left unused"


def test_a_long_recent_window_counts_too():
    cache = lone_cache("smartkv", spec(), budget=0.5, recent=100)
    for _ in fill(cache, [*[1] * 120, *[300] * 6, *[1] * 40]):
        assert counts(cache)[-1] >= min(100, cache.offset)
        share = max(cache.offset, (cache.budget.holds_from + 3 * cache.offset) / 4)
        assert cache.nbytes <= 0.5 * 2 * 2 * 128 * share


def test_what_is_held_is_what_the_plan_thinks_is_held():
    cache = lone_cache("smartkv", spec(64, 16, 3), budget=0.4)
    for _ in fill(cache, [300, 1, 1, 40, 1, 200]):
        *lower, top, waiting = counts(cache)
        assert cache.nbytes == cache.budget.used_bytes(lower, top, waiting)


def test_precision_of_a_token_never_rises():
    """Values that name their token survive any precision, so each token can be followed from bucket to bucket."""
    cache = lone_cache("smartkv", spec(64, 64, 2), budget=0.3)
    level_of = np.full((2, 2000), TOP + 1)
    for step, size in enumerate([300, *[1] * 120, 90, *[1] * 60, 250]):
        first = cache.offset
        names = mx.repeat(mx.arange(first, first + size, dtype=mx.float32)[:, None], 64, axis=1)
        feed(cache, normal(step, (1, 2, size, 64)), mx.broadcast_to(names, (1, 2, size, 64)))
        now = np.repeat(np.arange(TOP + 2), counts(cache))
        for head, row in enumerate(stored(cache, 1)[0, :, :, 0]):
            tokens = np.rint(row).astype(int)
            assert sorted(tokens) == list(range(cache.offset)), "a token was lost or is there twice"
            assert (now <= level_of[head, tokens]).all()
            level_of[head, tokens] = now
    assert len(set(level_of[0, : cache.offset])) > 2


@pytest.mark.parametrize("decay", [0.9, 1.0])
def test_each_heads_important_tokens_are_in_the_higher_buckets(decay):
    """Head 0 looks at tokens 200..230, head 1 at tokens 400..430, which stand out in one dim of their keys."""
    cache = lone_cache("smartkv", spec(), budget=0.4, decay=decay, sinks=0)
    keys = 0.1 * normal(0, (1, 2, 800, 64))
    for head, start in enumerate((200, 400)):
        keys[:, head, start : start + 30, 0] = 20
    names = mx.repeat(mx.arange(800, dtype=mx.float32)[:, None], 64, axis=1)
    values, queries = mx.broadcast_to(names, (1, 2, 800, 64)), mx.zeros((1, 2, 800, 64))
    queries[..., 0] = 1
    for a in range(0, 800, 100):
        feed(cache, keys[:, :, a : a + 100], values[:, :, a : a + 100], queries[:, :, a : a + 100])
    for head, start in enumerate((200, 400)):
        top = np.rint(stored(cache, 1)[0, head, sum(counts(cache)[:TOP]) :, 0])
        assert set(range(start, start + 30)) <= set(top)
        assert not set(range(600 - start, 630 - start)) <= set(top)


def test_sinks_stay_in_the_top_and_recent_tokens_as_they_are():
    cache = lone_cache("smartkv", spec(), budget=0.3, sinks=4, recent=4)
    keys, values = normal(0, (1, 2, 700, 64)), normal(1, (1, 2, 700, 64)).astype(mx.float16).astype(mx.float32)
    feed(cache, keys, values)
    newest = stored(cache, 1)[:, :, -4:]
    np.testing.assert_array_equal(newest, values[:, :, -4:])
    top = stored(cache, 1)[0, :, sum(counts(cache)[:TOP]) :]
    for head in range(2):
        for sink in range(4):
            assert np.abs(top[head] - np.array(values[0, head, sink])).max(axis=-1).min() < 0.05


def test_bytes_that_8_bits_for_all_leave_keep_the_newest_tokens_as_they_are():
    cache = lone_cache("smartkv", spec(), budget=0.8)
    values = normal(1, (1, 2, 600, 64)).astype(mx.float16).astype(mx.float32)
    feed(cache, normal(0, (1, 2, 600, 64)), values)
    *lower, _, tail = counts(cache)
    assert not any(lower)
    assert tail > 0.5 * 600
    np.testing.assert_array_equal(stored(cache, 1)[:, :, -tail:], values[:, :, -tail:])


def test_hysteresis_keeps_the_token_that_was_there_first():
    """400 tokens, and then 400 that get 2 % more attention: only without hysteresis they drive the old ones out."""

    def old_tokens_in_top(hysteresis):
        cache = lone_cache("smartkv", spec(64, 64, 1), budget=0.4, sinks=0, recent=0, hysteresis=hysteresis, decay=1.0)
        found = []
        for offset, name, attention in ((400, 1.0, 1.0), (800, 2.0, 1.02)):
            cache.offset = offset
            mass = mx.concatenate([mx.zeros((1, 1, offset - 400)), mx.full((1, 1, 400), attention)], axis=-1)
            cache.absorb(normal(offset, (1, 1, 400, 64)), mx.full((1, 1, 400, 64), name), mass)
            top = stored(cache, 1)[0, 0, sum(counts(cache)[:TOP]) :, 0]
            found.append(int((np.rint(top) == 1).sum()))
        return found

    before, after = old_tokens_in_top(0.05)
    assert before == after > 0
    before, after = old_tokens_in_top(0.0)
    assert before > after


def test_the_same_text_gives_the_same_cache_and_orders_do_what_they_say():
    medians = {}
    for order in ("importance", "random", "early", "late"):
        caches = [lone_cache("smartkv", spec(), budget=0.4, order=order, sinks=0, recent=0) for _ in range(2)]
        for cache in caches:
            for a in range(0, 1200, 200):
                names = mx.broadcast_to(mx.arange(a, a + 200, dtype=mx.float32)[:, None], (1, 2, 200, 64))
                feed(cache, normal(a, (1, 2, 200, 64)), names)
        for slot in (0, 1):
            np.testing.assert_array_equal(*(stored(cache, slot) for cache in caches))
        medians[order] = np.median(stored(caches[0], 1)[0, :, sum(counts(caches[0])[:TOP]) :, 0])
    assert medians["early"] < medians["random"] < medians["late"]


def test_importance_is_the_moving_average_of_single_steps_and_the_sum_with_decay_1():
    mass = np.random.default_rng(0).random((5, 8)).astype(np.float32)  # query, token: the last 5 of 8 tokens ask
    mass *= np.tri(5, 8, 3)
    importance = mx.zeros((1, 1, 0))
    stepwise = mx.array(mass[:1, :4])[None]
    for query in range(1, 5):
        stepwise = update_importance(stepwise, mx.array(mass[query : query + 1, : 4 + query])[None], 1, 0.9)
    expected = mass[0, :1]
    for query in range(1, 5):
        expected = 0.9 * expected + 0.1 * mass[query, :1]
    np.testing.assert_allclose(stepwise[0, 0, :1], expected, rtol=1e-5)
    together = update_importance(importance, mx.array(mass.sum(axis=0))[None, None], 5, 0.9)
    seen = np.array([5, 5, 5, 5, 4, 3, 2, 1])
    np.testing.assert_allclose(together[0, 0], mass.sum(axis=0) / seen, rtol=1e-5)
    summed = update_importance(mx.ones((1, 1, 6)), mx.array(mass.sum(axis=0))[None, None], 2, 1.0)
    np.testing.assert_allclose(summed[0, 0], mass.sum(axis=0) + np.array([1] * 6 + [0] * 2), rtol=1e-5)


def test_layers_split_the_budget_and_keep_equally_many_tokens():
    model = tiny_model("glm4_moe_lite", num_hidden_layers=3)
    caches = make_cache(model, "smartkv", budget=0.6, layers="linear")
    for _ in range(3):
        mx.eval(model(mx.array([tiny_tokens(200)]), cache=caches))
    assert len({cache.kept for cache in caches}) == 1
    used = [cache.nbytes for cache in caches]
    assert used == sorted(used, reverse=True)
    assert used[0] > used[-1]
    assert sum(used) <= 0.6 * 2 * 600 * 24 * 3


def test_a_budget_too_small_for_the_heads_is_refused_with_the_least_that_is_not():
    with pytest.raises(UnsupportedError, match=r"budget of 0\.150 .* 64 and 64 dims need more than 0\.172"):
        lone_cache("smartkv", spec(), budget=0.15)


@pytest.mark.parametrize(
    "wrong",
    [{"budget": 0}, {"budget": 1.5}, {"budget": True}, {"decay": 0}, {"interval": 0}, {"sinks": -1},
     {"queries": 0}, {"hysteresis": float("nan")}, {"allocator": "best"}, {"order": "size"}, {"layers": "both"}],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        SmartKVConfig(**wrong)

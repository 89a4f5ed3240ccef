"""What sketch-topk and sketch-aggregate keep, beside exact counters and the whole cache."""

import math
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_model, tiny_tokens
from live_checks import feed, lone_cache, stored

from mlxkv import make_cache
from mlxkv.errors import InputError, PresetError, UnsupportedError
from mlxkv.live import sketching
from mlxkv.live.methods.sketch_topk import SketchTopKConfig
from mlxkv.live.serialization import load_cache, save_cache
from mlxkv.models import kv_slots
from mlxkv.spec import CacheSpec

B, HQ, H, D = 2, 4, 2, 8
SPEC = CacheSpec("llama", (kv_slots(H, D, None),))
BOTH = ["sketch-topk", "sketch-aggregate"]
SIZES = {"sinks": 2, "heavy": 12, "recent": 8, "interval": 4}
WIDE = {"width": 1 << 14, "depth": 3, "decay": 1.0, "queries": 10**6}  # exact counters


def numbers(seed, *shape, wide=1.0):
    # float16 from the start, so that storing them changes nothing
    x = np.random.default_rng(seed).normal(size=shape) * wide
    return mx.array(x.astype(np.float16).astype(np.float32))


def fewer_entries(method):
    return {"entries": 4} if method == "sketch-aggregate" else {}


def text(seed, length, wide=2.0):
    """Queries `[B, HQ, T, D]`, keys and values `[B, H, T, D]`."""
    return tuple(numbers(seed * 3 + i, B, heads, length, D, wide=wide) for i, heads in enumerate((HQ, H, H)))


def run(cache, parts, chunks):
    queries, keys, values = parts
    outputs, edges = [], np.cumsum([0, *chunks]).tolist()
    for start, stop in pairwise(edges):
        outputs.append(feed(cache, *(x[:, :, start:stop] for x in (keys, values, queries))))
    return mx.concatenate(outputs, axis=2)


def random_chunks(seed, length):
    random, chunks = np.random.default_rng(seed), []
    while sum(chunks) < length:
        chunks.append(min(int(random.choice([1, 1, 2, 7, 20])), length - sum(chunks)))
    return chunks


# What is kept


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("heavy", "recent"), [(6, 5), (9, 1), (4, 0)])
def test_a_wide_sketch_keeps_what_exact_counters_keep(seed, heavy, recent):
    chunks, parts = random_chunks(seed, 60), text(seed, 60)
    h2o = lone_cache("h2o", SPEC, heavy=heavy, recent=recent)
    cache = lone_cache("sketch-topk", SPEC, **WIDE, sinks=0, interval=1, heavy=heavy, recent=recent)
    np.testing.assert_allclose(run(cache, parts, chunks), run(h2o, parts, chunks), atol=1e-5)
    for slot in (0, 1):
        assert np.array_equal(stored(cache, slot), stored(h2o, slot))


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("name", ["llama", "glm4_moe_lite", "lfm2", "gpt2"])
def test_with_room_for_every_token_the_model_says_what_it_says_with_the_whole_cache(method, name):
    model, tokens = tiny_model(name), mx.array([tiny_tokens(30)])
    whole = model(tokens)
    edges = [(0, 17), (17, 24), *((i, i + 1) for i in range(24, 30))]
    roomy, small = (
        make_cache(model, method, **fewer_entries(method), **{**SIZES, "heavy": heavy}) for heavy in (20, 3)
    )
    for caches, near in ((roomy, True), (small, False)):
        steps = mx.concatenate([model(tokens[:, a:b], cache=caches) for a, b in edges], axis=1)
        assert np.allclose(steps, whole, atol=3e-2) == near  # stored as float16


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("seed", range(3))
def test_how_many_tokens_are_kept_follows_from_how_many_came_and_not_from_their_chunks(method, seed):
    one, many = lone_cache(method, SPEC, **SIZES), lone_cache(method, SPEC, **SIZES)
    parts = text(seed, 90)
    run(one, parts, [90])
    run(many, parts, random_chunks(seed, 90))
    assert (one.kept, one.nbytes) == (many.kept, many.nbytes)
    assert one.kept - one.merged_entries == 2 + 12 + 8 + 90 % 4
    for cache in (one, many):
        assert np.array_equal(stored(cache, 0)[:, :, -8:], np.array(parts[1][:, :, -8:])), "the recent ones"
        sinks = stored(cache, 0)[:, :, cache.merged_entries : cache.merged_entries + 2]
        assert np.array_equal(sinks, np.array(parts[1][:, :, :2]))


def test_while_everything_fits_the_counters_do_not_depend_on_the_chunks():
    parts = text(0, 25)
    one, many = (lone_cache("sketch-topk", SPEC, **WIDE, **SIZES) for _ in range(2))
    run(one, parts, [25])
    run(many, parts, random_chunks(1, 25))
    np.testing.assert_allclose(one.counters, many.counters, atol=1e-5)
    assert one.heavy is many.heavy is None


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_attention_of_long_ago_fades_by_decay(decay):
    """Queries first look at token 3, then at token 9: with room for one of them, decay says which is kept."""
    keys = np.zeros((1, H, 60, D), np.float32)
    keys[:, :, 3, 0], keys[:, :, 9, 1] = 8, 8
    queries = np.zeros((1, HQ, 60, D), np.float32)
    queries[:, :, 4:36, 0], queries[:, :, 36:, 1] = 8, 8
    cache = lone_cache("sketch-topk", SPEC, **WIDE | {"decay": decay}, sinks=0, heavy=1, recent=47, interval=4)
    run(cache, (mx.array(queries), mx.array(keys), mx.array(keys)), [1] * 60)
    held = np.array(cache.heavy.keys)[0, 0, 0]
    assert held.argmax() == (0 if decay == 1 else 1)


# Merged entries


def test_with_all_keys_and_values_alike_merging_changes_nothing():
    queries, other = numbers(0, B, HQ, 91, D), numbers(2, B, H, 1, D)
    keys = mx.broadcast_to(numbers(1, B, H, 1, D), (B, H, 91, D))
    values = mx.concatenate([keys[:, :, :90], other], axis=2)  # the last one shows how much the others weigh
    whole, cache = lone_cache("full", SPEC), lone_cache("sketch-aggregate", SPEC, **SIZES, entries=5)
    expected, found = run(whole, (queries, keys, values), [91]), run(cache, (queries, keys, values), [50] + [1] * 41)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert cache.kept < 40


@pytest.mark.parametrize("seed", range(3))
def test_entries_weigh_as_many_as_were_merged_and_their_means_add_up_to_what_came(seed):
    cache, parts = lone_cache("sketch-aggregate", SPEC, **SIZES, entries=6), text(seed, 90)
    run(cache, parts, random_chunks(seed, 90))
    exact = cache.kept - 6
    weights = np.exp(np.array(cache.score_bias()))
    assert np.array_equal(weights[..., :6].sum(axis=-1).round(3), np.full((B, H), 90 - exact))
    assert np.array_equal(weights[..., 6:], np.ones((B, H, exact)))
    for slot in (0, 1):
        sums = (weights[..., None] * stored(cache, slot)).sum(axis=2)
        np.testing.assert_allclose(sums, np.array(parts[1 + slot]).sum(axis=2), atol=0.2)  # means are float16


def test_a_light_token_joins_the_entry_with_the_nearest_key():
    """Two kinds of keys: no entry mixes them."""
    signs = mx.array(np.where(np.random.default_rng(0).random((B, H, 90, 1)) < 0.5, -1.0, 1.0))
    _, keys, values = text(0, 90, wide=0.1)
    keys = keys + 3 * signs
    cache = lone_cache("sketch-aggregate", SPEC, **SIZES, entries=6)
    run(cache, (numbers(9, B, HQ, 90, D), keys, values + 3 * signs), [60] + [1] * 30)
    merged_keys, merged_values, counts = map(np.array, cache.merged)
    assert counts.max() > 5
    assert np.abs(merged_keys).min() > 2
    assert (np.sign(merged_keys) == np.sign(merged_values)).all()


# Options


@pytest.mark.parametrize("method", BOTH)
def test_per_layer_all_heads_keep_the_same_tokens_by_one_sketch(method):
    parts = text(0, 90)
    places = {}
    for per in ("head", "layer"):
        cache = lone_cache(method, SPEC, **SIZES, per=per)
        run(cache, parts, [50] + [1] * 40)
        assert len(cache.counters) == (B if per == "layer" else B * H)
        held, every = np.array(cache.heavy.keys), np.array(parts[1])
        places[per] = [[[np.flatnonzero((every[b, h] == k).all(axis=1))[0] for k in held[b, h]] for h in range(H)] for b in range(B)]  # fmt: skip
        expected = np.broadcast_to(np.array(cache.positions), (B, H, 14))
        assert np.array_equal(places[per], expected)
    assert places["layer"][0][0] == places["layer"][0][1]
    assert places["head"][0][0] != places["head"][0][1]


@pytest.mark.parametrize("sketch", ["count-min", "count-sketch", "race"])
@pytest.mark.parametrize("per", ["head", "layer"])
@pytest.mark.parametrize("method", BOTH)
def test_every_sketch_keeps_a_token_that_everyone_looks_at(method, per, sketch):
    _, keys, values = text(0, 90, wide=0.1)
    keys[:, :, 13] = 5
    keys[:, :, 17] = -5
    cache = lone_cache(method, SPEC, **SIZES, per=per, sketch=sketch, width=64, depth=4)
    run(cache, (mx.ones((B, HQ, 90, D)), keys, values), [30] + [1] * 60)
    held = np.array(cache.heavy.keys)[:, :, :, 0]
    assert (held == 5).any(axis=-1).all()
    assert not (held == -5).any()
    assert (cache.positions is None) == (sketch == "race"), "RACE finds tokens by their keys"


@pytest.mark.parametrize(("per", "tables", "heads"), [("head", B * H, HQ // H), ("layer", B, HQ)])
def test_the_last_queries_of_a_chunk_are_asked_and_no_attention_gets_lost(per, tables, heads):
    cache = lone_cache("sketch-topk", SPEC, **SIZES, queries=5, per=per)
    run(cache, text(0, 20), [20])
    assert cache.counters.shape == (tables, 2, 256)
    assert np.allclose(np.array(cache.counters).sum(axis=-1), 5 * heads)


@pytest.mark.parametrize("overrides", [{"sketch": "race", "depth": 8}, {"per": "layer"}, {"target": 0.9}, {"sketch": "count-sketch"}])  # fmt: skip
@pytest.mark.parametrize("method", BOTH)
def test_a_saved_cache_goes_on_as_it_would_have(method, overrides, tmp_path):
    model = tiny_model("llama", num_hidden_layers=2)
    stays, moves = (make_cache(model, method, **SIZES, **overrides) for _ in range(2))
    for i, length in enumerate((50, 1, 9, 1, 1, 30, 1)):
        tokens = mx.array([tiny_tokens(length, seed=i)])
        assert mx.array_equal(model(tokens, cache=stays), model(tokens, cache=moves))
        save_cache(tmp_path / "cache", model, moves)
        moves = load_cache(tmp_path / "cache", model)
    assert all(
        moved.nbytes <= stayed.nbytes for moved, stayed in zip(moves, stays)
    )  # no rows are saved that are only allocated


# The controller


@pytest.mark.parametrize("method", BOTH)
def test_the_controller_widens_for_a_high_target_and_narrows_for_a_low_one(method):
    kept = {}
    for target in (0.001, 0.999):
        cache = lone_cache(method, SPEC, **SIZES, target=target)
        run(cache, text(0, 150, wide=0.5), [40] + [1] * 110)
        kept[target] = cache.kept - cache.merged_entries - 2
        assert cache.size_factor == (sketching.MAX_SCALE if target > 0.5 else sketching.MIN_SCALE)
    assert kept[0.999] in range(2 * 20, 2 * 20 + 4)
    assert kept[0.001] in range(10, 10 + 4)


def test_what_is_covered_is_what_was_not_given_up():
    cache = lone_cache("sketch-topk", SPEC, **WIDE, **SIZES, target=0.5)
    queries, keys, values = text(0, 40)
    run(cache, (queries, keys, values), [40])
    scores = np.array(queries).reshape(B, H, -1, 40, D) @ np.array(keys)[:, :, None].swapaxes(-1, -2) * 0.3
    scores = np.where(np.tril(np.ones((40, 40), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    drawn = (weights / weights.sum(axis=-1, keepdims=True)).sum(axis=(2, 3)) / (40 * HQ / H)
    stay = np.concatenate([np.array(cache.positions), np.broadcast_to(np.arange(32, 40), (B, H, 8))], axis=-1)
    assert float(cache.coverage) == pytest.approx(
        np.take_along_axis(drawn, stay, axis=-1).sum(axis=-1).mean(), abs=1e-4
    )
    assert cache.size_factor == 1.0, "a step waits for what the interval before has computed"


def test_what_is_covered_goes_on_as_the_share_that_kept_tokens_drew():
    cache = lone_cache("sketch-topk", SPEC, **WIDE | {"decay": 0.9}, **SIZES, target=0.5)
    found, expected, parts = [], [], text(0, 90)
    for start in range(0, 90, 5):
        before = cache.coverage
        run(cache, [x[:, :, start : start + 5] for x in parts], [5])
        if cache.coverage is not before:
            kept = cache.sketch.query(
                cache.counters, cache._sketch_keys(cache.heavy, cache.positions, cache.tail, cache.offset)
            ).sum(axis=-1)
            expected.append(float((kept / cache.counters[:, 0].sum(axis=-1)).mean()))
            found.append(float(cache.coverage))
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert len(found) > 9
    assert max(found) < 0.999


def test_the_controller_is_refused_where_layers_must_keep_equally_many():
    with pytest.raises(UnsupportedError, match="MLA"):
        make_cache(tiny_model("glm4_moe_lite"), "sketch-topk", target=0.9)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"heavy": 0}, {"recent": -1}, {"interval": 0}, {"queries": 0}, {"sinks": True}, {"width": 0}, {"depth": 1.5}),
        *({"sketch": "bloom"}, {"per": "token"}, {"decay": 0.0}, {"decay": 2}, {"target": 1.0}, {"target": math.nan}),
    ],
)
def test_impossible_settings_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(InputError, match=name):
        SketchTopKConfig(**wrong)
    with pytest.raises(PresetError, match=name):
        make_cache(tiny_model("llama"), "sketch-aggregate-256", **wrong)


def test_settings_that_do_not_fit_together_are_refused():
    for wrong, message in (({"target": 0.9}, "target needs count-min"), ({"width": 100}, "power of 2")):
        with pytest.raises(InputError, match=message):
            SketchTopKConfig(sketch="race", **wrong)
    with pytest.raises(PresetError, match="entries"):
        make_cache(tiny_model("llama"), "sketch-aggregate", entries=0)

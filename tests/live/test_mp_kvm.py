import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, tiny_model, tiny_tokens
from live_checks import feed, lone_cache, plain_attention, stored

from mlxkv import make_cache
from mlxkv.errors import InputError
from mlxkv.live.arrays import iter_arrays
from mlxkv.live.methods.mp_kvm import MPKVMConfig
from mlxkv.models import kv_slots
from mlxkv.spec import CacheSpec, Rope

B, H, D = 2, 2, 8
FLAT = CacheSpec("flat", (kv_slots(H, D, None),))
TURNING = CacheSpec("turning", (kv_slots(H, D, Rope(D, base=100.0)),))
TINY_SETTINGS = {"centroids": 12, "sinks": 2, "recent": 10, "flush": 8}


def numbers(seed, *shape):
    # float16 from the start, so that storing them changes nothing
    return np.random.default_rng(seed).normal(size=shape).astype(np.float16).astype(np.float32)


def fed(cache, keys, values, chunk):
    """The cache after all tokens, in chunks of this many; and the output of the last chunk."""
    for start in range(0, keys.shape[2], chunk):
        both = (mx.array(x[:, :, start : start + chunk]) for x in (keys, values))
        output = feed(cache, *both)
    return cache, np.array(output)


def counts(cache):
    return np.array(cache.centroids.counts)


@pytest.mark.parametrize("chunk", [1, 40])
@pytest.mark.parametrize("distinct", [1, 6])
@pytest.mark.parametrize("weights", ["count", "attention"])
def test_with_a_centroid_for_every_distinct_key_it_is_full_attention(weights, distinct, chunk):
    """With one distinct key that is: a centroid of count n acts as n copies."""
    which = np.random.default_rng(0).integers(distinct, size=80)
    keys, values = numbers(0, B, H, distinct, D)[:, :, which], numbers(1, B, H, 80, D)
    if weights == "attention":  # which weighs equal keys' values by what each drew: so values are equal too
        values = values[:, :, which]
    settings = {**TINY_SETTINGS, "centroids": distinct + 2, "weights": weights, "value_weight": 0.0}
    cache, output = fed(lone_cache("mp-kvm", FLAT, **settings), keys, values, chunk)
    assert cache.kept < 30 + distinct
    np.testing.assert_allclose(counts(cache).sum(-1), 80 - cache.tail.keys.shape[2])
    expected = plain_attention(keys[:, :, -chunk:], keys, values, 0.3, "causal")
    np.testing.assert_allclose(output, expected, atol=2e-3)
    if weights == "count":  # where values differ; the bias is what makes it so
        last = keys[:, :, :1], values[:, :, :1]
        right = plain_attention(last[0], *(np.concatenate([*pair], 2) for pair in zip((keys, values), last)), 0.3, None)
        cache.score_bias = lambda: None
        cache.tail = cache.tail  # whose rows have their bias already
        _, wrong = fed(cache, *last, 1)
        assert np.abs(wrong - right).max() > 0.02


@pytest.mark.parametrize("architecture", sorted(TINY))
def test_with_a_centroid_for_every_token_the_model_says_what_it_says_with_the_whole_cache(architecture):
    model, tokens = tiny_model(architecture), mx.array([tiny_tokens(60)])
    whole = model(tokens)
    caches = make_cache(model, "mp-kvm", **{**TINY_SETTINGS, "centroids": 60})
    steps = [model(tokens[:, a:b], cache=caches) for a, b in ((0, 33), (33, 50), *((i, i + 1) for i in range(50, 60)))]
    np.testing.assert_allclose(mx.concatenate(steps, axis=1), whole, atol=3e-2)  # stored as float16
    few = make_cache(model, "mp-kvm", **{**TINY_SETTINGS, "centroids": 4})
    model(tokens[:, :50], cache=few)
    assert np.abs(np.array(model(tokens[:, 50:], cache=few)) - np.array(whole[:, 50:])).max() > 0.05


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "glm4_moe_lite"])
@pytest.mark.parametrize("weights", ["count", "attention"])
def test_the_same_text_500_positions_later_gives_the_same_centroids(architecture, weights):
    model, tokens = tiny_model(architecture), mx.array([tiny_tokens(70)])
    first, later = (make_cache(model, "mp-kvm", weights=weights, **TINY_SETTINGS) for _ in range(2))
    for entry in later:
        entry.offset = 500
    for caches in (first, later):
        model(tokens, cache=caches)
    for a, b in zip(first, later):
        before, after = a.unrotated_clusters(), b.unrotated_clusters()
        np.testing.assert_array_equal(before.counts, after.counts)
        assert float(before.counts.max()) > 3
        np.testing.assert_allclose(before.positions + 500, after.positions, atol=1e-2)
        np.testing.assert_allclose(before.keys, after.keys, atol=3e-3, rtol=2e-3)
        np.testing.assert_allclose(before.values, after.values, atol=3e-3, rtol=2e-3)
        rotated = (x.centroids[1 if a.latent else 0] for x in (a, b))
        assert np.abs(np.subtract(*map(np.array, rotated))).max() > 0.1, "but they are rotated for where they are"


@pytest.mark.parametrize("more", [{}, {"stride": 3}, {"partition": "shared"}, {"similarity": -3.0}])
def test_what_is_stored_does_not_depend_on_the_chunks(more):
    keys, values = numbers(0, B, H, 150, D), numbers(1, B, H, 150, D)
    states = []
    for chunk in (150, 7, 1):
        cache, _ = fed(lone_cache("mp-kvm", TURNING, weights="count", **TINY_SETTINGS, **more), keys, values, chunk)
        states.append([part.tolist() for part in iter_arrays(cache.state)])
    assert states[0] == states[1] == states[2]


@pytest.mark.parametrize("weights", ["count", "attention"])
def test_memory_stays_bounded_however_long_the_text(weights):
    cache, sizes = lone_cache("mp-kvm", TURNING, weights=weights, **TINY_SETTINGS), []
    for i in range(20):
        cache, _ = fed(cache, numbers(2 * i, 1, H, 80, D), numbers(2 * i + 1, 1, H, 80, D), 80)
        sizes.append(cache.nbytes)
    drawn = weights == "attention"
    tail = 10 + (1600 - 10) % 8
    assert sizes[-1] == H * (12 * (4 * D + 8 + 4 * drawn) + tail * (4 * D + 4 * drawn)) == max(sizes)
    assert counts(cache).sum() == H * (1600 - tail)


def test_there_are_no_more_slots_than_tokens_that_have_left_the_window():
    cache = lone_cache("mp-kvm", TURNING, **TINY_SETTINGS)
    for length, kept in ((17, 0), (1, 8), (7, 8), (1, 12), (50, 12)):
        cache, _ = fed(cache, numbers(0, 1, H, length, D), numbers(1, 1, H, length, D), length)
        assert (0 if cache.centroids is None else cache.centroids.keys.shape[2]) == kept
        assert 10 <= cache.tail.keys.shape[2] < 18


@pytest.mark.parametrize("more", [{}, {"partition": "shared"}, {"stride": 3}])
def test_tokens_weigh_the_attention_that_a_query_pays_them_on_average_and_no_less_than_the_floor(more):
    keys, values, asked = numbers(0, B, H, 50, D), numbers(1, B, H, 50, D), 20
    settings = {**TINY_SETTINGS, "centroids": 50, "queries": asked, "floor": 0.01}
    cache, _ = fed(lone_cache("mp-kvm", FLAT, **settings, **more), keys, values, 50)
    scores = np.where(np.tri(50, dtype=bool), 0.3 * keys @ keys.swapaxes(-1, -2), -np.inf)
    paid = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    mean = paid[:, :, -asked:].sum(2) / np.minimum(np.arange(50, 0, -1), asked)
    mean = mean.mean(axis=1, keepdims=True) if "partition" in more else mean
    each = more.get("stride", 1)
    taken = [0, 1, *(place for place in range(2, 40) if place % each == 0)]
    stands_for = np.array([1, 1] + [each] * (len(taken) - 2))
    np.testing.assert_allclose(cache.centroids.attention, stands_for * mean[..., taken], atol=1e-4)
    np.testing.assert_allclose(cache.tail.attention, mean[..., 40:], atol=1e-4)
    weights = (stands_for * (0.01 + mean[..., taken])).reshape(-1, len(taken))
    np.testing.assert_allclose(cache.unrotated_clusters().weights, weights, atol=1e-4)


def test_what_everyone_looks_at_keeps_a_centroid_of_its_own():
    keys, values = 0.1 * numbers(0, 1, H, 90, D), numbers(1, 1, H, 90, D)
    keys[:, :, 33] = 3 * np.sign(keys[:, :, 40])
    queries = np.broadcast_to(keys[:, :, 33:34], keys.shape)
    cache = lone_cache("mp-kvm", FLAT, **TINY_SETTINGS)
    for start in range(0, 90, 9):
        rows = slice(start, start + 9)
        feed(cache, *(mx.array(x[:, :, rows]) for x in (keys, values, queries)))
    slot = np.argmin(np.abs(stored(cache, 0)[0, 0] - keys[0, 0, 33]).sum(-1))
    assert counts(cache)[0, 0, slot] == 1
    np.testing.assert_allclose(stored(cache, 1)[0, 0, slot], values[0, 0, 33], atol=1e-3)


def test_a_token_that_is_alone_keeps_its_key_and_a_pair_is_rotated_to_the_place_between():
    rope, plain = TURNING.layers[0][0].rope, numbers(0, 1, H, 40, D)
    plain[:, :, 20:] = 5 * plain[:, :, 20:21]
    keys = np.array(rope.rotate(mx.array(plain)).astype(mx.float16).astype(mx.float32))
    cache = lone_cache("mp-kvm", TURNING, weights="count", **{**TINY_SETTINGS, "centroids": 21, "recent": 0})
    fed(cache, keys, plain, 40)
    held = np.array(cache.centroids.keys.astype(mx.float32))
    np.testing.assert_allclose(held[:, :, :20], keys[:, :, :20], atol=2e-3)
    np.testing.assert_allclose(cache.centroids.positions[:, :, 20], np.full((1, H), 29.5), rtol=1e-5)
    np.testing.assert_allclose(held[:, :, 20:], rope.rotate(mx.array(plain[:, :, 20:21]), 30), atol=2e-2)


@pytest.mark.parametrize("rotation", ["slot", "kept"])
def test_centroids_can_be_rotated_to_their_slot_or_be_of_rotated_keys(rotation):
    rope, plain, values = TURNING.layers[0][0].rope, numbers(0, 1, H, 60, D), numbers(1, 1, H, 60, D)
    settings = {**TINY_SETTINGS, "weights": "count", "recent": 0, "flush": 60, "rotation": rotation}
    cache, _ = fed(lone_cache("mp-kvm", TURNING, **settings), np.array(rope.rotate(mx.array(plain))), values, 60)
    given = plain if rotation == "slot" else np.array(rope.rotate(mx.array(plain)))
    expected, _ = fed(lone_cache("mp-kvm", FLAT, **settings), given, values, 60)
    turned = expected.centroids.keys.astype(mx.float32)
    turned = rope.rotate(turned) if rotation == "slot" else turned
    np.testing.assert_allclose(stored(cache, 0), turned, atol=5e-3)


def test_with_a_stride_each_token_taken_stands_for_those_left_out():
    keys, values = numbers(0, 1, H, 68, D), numbers(1, 1, H, 68, D)
    cache = lone_cache("mp-kvm", FLAT, **{**TINY_SETTINGS, "centroids": 50}, stride=3)
    fed(cache, keys, values, 17)
    taken = [0, 1, *range(3, 56, 3)]
    np.testing.assert_array_equal(counts(cache)[0, 0], [1, 1] + [3] * 18)
    np.testing.assert_array_equal(stored(cache, 0)[:, :, :-12], keys[:, :, taken])


def test_a_shared_partition_puts_the_same_tokens_together_in_all_heads():
    keys, values = numbers(0, B, H, 90, D), numbers(1, B, H, 90, D)
    cache, _ = fed(lone_cache("mp-kvm", FLAT, partition="shared", weights="count", **TINY_SETTINGS), keys, values, 30)
    number = counts(cache)
    assert number.shape == (B, 1, 12)
    for x, slot in ((keys, 0), (values, 1)):
        held = stored(cache, slot)[:, :, :12]
        total = x[:, :, : int(number[0].sum())].sum(2)
        np.testing.assert_allclose((held * number[..., None]).sum(2), total, atol=0.1)
    alone, _ = fed(lone_cache("mp-kvm", FLAT, weights="count", **TINY_SETTINGS), keys, values, 30)
    assert (counts(alone)[:, 0] != counts(alone)[:, 1]).any()


@pytest.mark.parametrize(
    "settings",
    [
        {"recent": -1}, {"flush": 0}, {"stride": 0}, {"queries": 0}, {"decay": 0.0}, {"decay": 1.1}, {"floor": 0},
        {"weights": "mass"}, {"rotation": "sink"}, {"partition": "layer"}, {"centroids": 4}, {"persistence": 2.0},
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        MPKVMConfig(**settings)

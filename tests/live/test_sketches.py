"""Sketches against exact counts: what their papers promise, over many seeds."""

import math

import mlx.core as mx
import numpy as np
import pytest

from mlxkv.errors import InputError
from mlxkv.live.sketches import SKETCHES, CountMin, CountSketch, Race

TRIALS = 1000


def zipf(keys, seed=0):
    """Amounts `[keys]`, few of them large: multiples of 1/64, exact in any order of additions."""
    random = np.random.default_rng(seed)
    return np.round(random.permutation(64 * 50 / np.arange(1, keys + 1))).astype(np.float32) / 64


def estimates_of(kind, width, depth, amounts, seeds=range(TRIALS)):
    """What sketches of many seeds say of all keys: `[seeds, keys]`."""
    keys, added, found = mx.arange(len(amounts)), mx.array(amounts)[None], []
    for seed in seeds:
        sketch = kind(width, depth, seed)
        found.append(sketch.query(sketch.update(sketch.empty(1), keys, added), keys))
    return np.array(mx.concatenate(found))


@pytest.mark.parametrize(("width", "depth"), [(20, 1), (30, 2), (50, 3)])
def test_count_min_is_never_too_low_and_seldom_above_its_bound(width, depth):
    amounts = zipf(100)
    errors = estimates_of(CountMin, width, depth, amounts) - amounts
    assert errors.min() >= 0
    beyond = (errors > math.e / width * amounts.sum()).mean(axis=0)
    # Of each key, over the seeds; five standard errors for the luck of 1,000 draws.
    delta = math.exp(-depth)
    assert beyond.max() <= delta + 5 * math.sqrt(delta / TRIALS)
    assert (errors > 0).mean() > 0.01, "or the sketch was too wide for this test to say anything"


@pytest.mark.parametrize("depth", [1, 3])
def test_count_sketch_is_right_on_average(depth):
    amounts = zipf(100)
    errors = estimates_of(CountSketch, 20, depth, amounts) - amounts
    assert np.abs(errors.mean(axis=0) / (errors.std(axis=0) / math.sqrt(TRIALS))).max() < 5
    assert errors.std(axis=0).min() > 0.1
    assert (estimates_of(CountMin, 20, depth, amounts) - amounts).mean() > 0.5


def test_count_sketch_errs_less_than_count_min_where_many_keys_have_alike():
    amounts = np.ones(400, np.float32)
    errors = {
        kind: np.abs(estimates_of(kind, 40, 5, amounts, range(50)) - amounts).mean() for kind in (CountMin, CountSketch)
    }
    assert errors[CountSketch] < errors[CountMin] / 2


def test_race_estimates_the_density_of_its_kernel():
    random = np.random.default_rng(0)
    vectors, weights = random.standard_normal((2, 40, 8)).astype(np.float32), random.random((2, 40)).astype(np.float32)
    vectors[:, 1] = vectors[:, 0]
    vectors[:, 2] = -vectors[:, 0]
    units = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    angles = np.arccos(np.clip(units @ units.swapaxes(1, 2), -1, 1))
    for width in (2, 16):
        exact = ((1 - angles / np.pi) ** math.log2(width) @ weights[..., None])[..., 0]
        sketch = Race(width, depth=4000)
        counters = sketch.update(sketch.empty(2), mx.array(vectors), mx.array(weights))
        np.testing.assert_allclose(sketch.query(counters, mx.array(vectors)), exact, rtol=0.1)


@pytest.mark.parametrize("kind", SKETCHES.values())
def test_a_wide_sketch_of_few_keys_is_exact_and_tables_do_not_mix(kind):
    amounts = np.stack([zipf(5, seed) for seed in range(3)])
    keys = mx.broadcast_to(mx.eye(5), (3, 5, 5)) if kind is Race else mx.arange(1000, 1005)
    sketch = kind(1 << 16, 4, seed=1)
    counters = sketch.update(sketch.empty(3), keys, mx.array(amounts))
    np.testing.assert_allclose(sketch.query(counters, keys), amounts, rtol=1e-6)


@pytest.mark.parametrize("kind", [CountMin, CountSketch])
def test_top_k_finds_the_keys_that_have_most_in_falling_order(kind):
    amounts = np.stack([zipf(300, seed) for seed in range(4)])
    keys = mx.array(np.random.default_rng(1).permutation(100_000)[:300].astype(np.int32))
    sketch = kind(512, 4)
    counters = sketch.update(sketch.empty(4), keys, mx.array(amounts))
    places, estimates = sketch.top_k(counters, keys, 20)
    exact = np.argsort(-amounts, axis=1)[:, :20]
    recall = np.mean([len(np.intersect1d(*pair)) / 20 for pair in zip(np.array(places), exact)])
    assert recall >= 0.9
    assert (np.diff(np.array(estimates), axis=1) <= 0).all()
    assert mx.array_equal(estimates, mx.take_along_axis(sketch.query(counters, keys), places, axis=1))
    assert sketch.top_k(counters, keys, 1000)[0].shape == (4, 300)


@pytest.mark.parametrize("kind", [CountMin, CountSketch])
def test_counters_decay_by_a_product(kind):
    keys, old, new = mx.arange(50), mx.array(zipf(50))[None], mx.array(zipf(50, 1))[None]
    sketch = kind(1 << 14, 3)
    counters = sketch.update(0.25 * sketch.update(sketch.empty(1), keys, old), keys, new)
    assert mx.array_equal(sketch.query(counters, keys), 0.25 * old + new)


@pytest.mark.parametrize("kind", SKETCHES.values())
def test_bytes_are_those_of_the_counters_and_the_seed_gives_the_rest(kind):
    sketch = kind(64, 3, seed=5)
    assert sketch.nbytes(7) == sketch.empty(7).nbytes == 4 * 7 * 3 * 64
    keys = mx.random.normal((1, 30, 4), key=mx.random.key(0)) if kind is Race else mx.arange(30)
    same, other = (each.update(each.empty(1), keys, mx.ones((1, 30))) for each in (kind(64, 3, seed=5), kind(64, 3)))
    counters = sketch.update(sketch.empty(1), keys, mx.ones((1, 30)))
    assert mx.array_equal(counters, same)
    assert not mx.array_equal(counters, other)


@pytest.mark.parametrize("kind", SKETCHES.values())
@pytest.mark.parametrize("wrong", [{"width": 0}, {"depth": 0}, {"seed": -1}, {"width": 2.0}, {"depth": True}])
def test_impossible_settings_are_refused(kind, wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        kind(**wrong)


def test_races_width_is_a_power_of_2():
    with pytest.raises(InputError, match="power of 2, not 48"):
        Race(48)

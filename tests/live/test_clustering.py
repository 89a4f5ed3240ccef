import mlx.core as mx
import numpy as np
import pytest

from mlxkv.errors import InputError, MismatchError
from mlxkv.live.clustering import BLOCK, ClusteringConfig, Clusters, OnlineClustering, insert
from mlxkv.live.clustering_error import misplaced_attention

N, D = 3, 8


def numbers(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def clustered(x, rules, values=None, weights=None):
    found = OnlineClustering(rules, x.shape[0], x.shape[2], 0 if values is None else values.shape[2])
    found.insert(*(None if part is None else mx.array(part) for part in (x, values, weights)))
    return found


def slots(x, counts=None):
    """Tokens x `[N, T, D]` as slots of their own, with counts that are their weights."""
    counts = np.ones(x.shape[:2], np.float32) if counts is None else counts
    positions = np.broadcast_to(np.arange(x.shape[1], dtype=np.float32), counts.shape)
    return Clusters(*map(mx.array, (x, x[..., :0], positions, counts, counts)))


def blobs(seed, clusters=6, tokens=300, wide=0.05):
    """Tokens `[N, T, D]` around centers far apart, and which they belong to `[N, T]`."""
    centers = 4 * numbers(seed, N, clusters, D)
    truth = np.random.default_rng(seed).integers(clusters, size=(N, tokens))
    truth[:, :clusters] = np.arange(clusters)
    return np.take_along_axis(centers, truth[..., None], 1) + wide * numbers(seed + 1, N, tokens, D), truth


def test_with_room_every_token_is_a_centroid_of_its_own():
    x, values = numbers(0, N, 20, D), numbers(1, N, 20, 5)
    found = clustered(x, ClusteringConfig(centroids=20), values)
    np.testing.assert_array_equal(found.keys, x)
    np.testing.assert_array_equal(found.values, values)
    np.testing.assert_array_equal(found.counts, np.ones((N, 20)))
    np.testing.assert_array_equal(found.positions, np.broadcast_to(np.arange(20), (N, 20)))


def test_equal_tokens_become_one_centroid_that_counts_them_and_others_stay_as_they_are():
    x = np.repeat(numbers(0, N, 1, D), 100, axis=1)
    x[:, [3, 70]] = numbers(1, N, 2, D)
    found = clustered(x, ClusteringConfig(centroids=3))
    np.testing.assert_array_equal(np.sort(found.counts, axis=1), [[1, 1, 98]] * N)
    for n in range(N):
        singles = np.array(found.keys)[n, np.array(found.counts)[n] == 1]
        np.testing.assert_allclose(singles, x[n, [3, 70]], rtol=1e-6)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("seed", range(3))
def test_clusters_that_lie_apart_are_found(metric, seed):
    x, truth = blobs(seed)
    found = clustered(x, ClusteringConfig(centroids=6, metric=metric), x)
    np.testing.assert_array_equal(np.sort(found.counts, 1), np.sort([np.bincount(row) for row in truth], 1))
    means = [[x[n, truth[n] == c].mean(axis=0) for c in range(6)] for n in range(N)]
    np.testing.assert_allclose(found.keys, means, atol=1e-5)  # in the order of their first tokens
    np.testing.assert_allclose(found.values, means, atol=1e-5)


def test_nothing_is_lost_on_the_way():
    x, values = numbers(0, N, 200, D), numbers(1, N, 200, 5)
    weights = np.random.default_rng(2).uniform(0.1, 2, (N, 200)).astype(np.float32)
    found = clustered(x, ClusteringConfig(centroids=9), values, weights)
    held = np.array(found.state.weights)
    np.testing.assert_allclose(held.sum(1), weights.sum(1), rtol=1e-5)
    np.testing.assert_array_equal(np.array(found.counts).sum(1), [200] * N)
    for part, whole in ((found.keys, x), (found.values, values), (found.positions, np.arange(200.0)[None])):
        part, whole = np.array(part), np.broadcast_to(whole, (N, *whole.shape[1:]))
        sums = np.einsum("nc,nc...->n...", held, part), np.einsum("nt,nt...->n...", weights, whole)
        np.testing.assert_allclose(*sums, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("value_weight", [0.0, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_pair_that_is_merged_is_the_cheapest_by_ward(seed, value_weight):
    x, values = numbers(seed, 1, 30, D), numbers(seed + 9, 1, 30, 2)
    counts = np.random.default_rng(seed).integers(1, 9, (1, 30)).astype(np.float32)
    start = slots(x, counts)._replace(values=mx.array(values))
    merged = insert(None, start, ClusteringConfig(centroids=29, value_weight=value_weight))
    both = np.concatenate([x, value_weight * values], axis=2)[0]
    squared = np.square(both[:, None] - both).sum(-1)
    cost = squared * counts.T * counts / (counts.T + counts) + np.where(np.tri(30), np.inf, 0)
    i, j = np.unravel_index(cost.argmin(), cost.shape)
    expected = np.delete(counts[0], j)
    expected[i] += counts[0, j]
    np.testing.assert_array_equal(merged.counts[0], expected)
    mean = (counts[0, i] * x[0, i] + counts[0, j] * x[0, j]) / expected[i]
    np.testing.assert_allclose(merged.keys[0, i], mean, rtol=1e-5)


def test_heavy_tokens_are_left_alone_and_pull_the_mean_of_those_they_are_merged_with():
    x, weights = numbers(0, N, 100, D), np.full((N, 100), 1e-3, np.float32)
    weights[:, [5, 50]] = 10
    found = clustered(x, ClusteringConfig(centroids=4), weights=weights)
    for n in range(N):
        near = np.square(np.array(found.keys)[n, :, None] - x[n, [5, 50]]).sum(-1)
        assert near.min(axis=0).max() < 1e-5
    one = clustered(x, ClusteringConfig(centroids=1), weights=weights)
    np.testing.assert_allclose(one.keys[:, 0], x[:, [5, 50]].mean(1), atol=0.02)
    np.testing.assert_array_equal(one.counts, [[100]] * N)


def test_cosine_looks_at_directions_only():
    directions = numbers(0, N, 4, D)
    x = np.tile(directions, (1, 10, 1)) * np.random.default_rng(0).uniform(0.1, 10, (N, 40, 1)).astype(np.float32)
    found = clustered(x, ClusteringConfig(centroids=4, metric="cosine"))
    np.testing.assert_array_equal(found.counts, [[10] * 4] * N)
    assert np.array(clustered(x, ClusteringConfig(centroids=4)).counts).max() > 10


def test_what_is_similar_enough_joins_at_once_and_the_rest_founds_centroids():
    x = numbers(0, 1, 3, D)
    new = np.concatenate([x[:, :1] + 0.01, x[:, 1:2] + 0.5], axis=1)
    grown = insert(slots(x), slots(new), ClusteringConfig(centroids=10, similarity=-0.01))
    assert grown.counts.tolist() == [[2, 1, 1, 0, 1]]
    np.testing.assert_allclose(grown.keys[0, 0], x[0, 0] + 0.005, rtol=1e-4)
    np.testing.assert_array_equal(insert(slots(x), slots(new), ClusteringConfig(centroids=10)).counts, [[1] * 5])


@pytest.mark.parametrize(("quantile", "joining"), [(0.0, 8), (0.5, 4), (0.75, 2), (1.0, 1)])
def test_by_quantile_the_most_similar_tokens_join_whatever_the_scale(quantile, joining):
    x = numbers(0, 1, 4, D)
    new = np.tile(x, (1, 2, 1)) + np.arange(1, 9, dtype=np.float32)[None, :, None] / 100
    for scale in (1, 100):
        grown = insert(slots(scale * x), slots(scale * new), ClusteringConfig(centroids=20, quantile=quantile))
        assert float(grown.counts[:, :4].sum()) == 4 + joining
        assert float(grown.counts.sum()) == 12


@pytest.mark.parametrize("merge_similarity", [None, -0.01])
def test_empty_slots_are_used_again_before_anything_is_merged(merge_similarity):
    x, fresh = numbers(0, N, 4, D), numbers(1, N, 4, D)
    fresh[:, 1] = fresh[:, 0] + 0.01
    old = insert(slots(x), slots(x), ClusteringConfig(centroids=8, similarity=-1e-3))
    assert int((old.counts == 0).sum()) == 4 * N
    grown = insert(old, slots(fresh), ClusteringConfig(centroids=8, merge_similarity=merge_similarity))
    np.testing.assert_array_equal(grown.counts, [[2] * 4 + [1] * 4] * N)
    np.testing.assert_allclose(grown.keys, np.concatenate([x, fresh], 1), rtol=1e-6)


def test_what_is_unlike_is_never_merged_but_the_lightest_is_given_up():
    x = 10 * np.eye(D, dtype=np.float32)[None, :6]
    counts = np.array([[5, 1, 4, 2, 6, 3]], np.float32)
    kept = insert(None, slots(x, counts), ClusteringConfig(centroids=4, merge_similarity=-1.0))
    assert sorted(kept.counts[0].tolist()) == [3, 4, 5, 6]
    assert float(kept.keys.max()) == float(kept.keys[0, 0].max()) == 10
    assert sum(insert(None, slots(x, counts), ClusteringConfig(centroids=4)).counts[0].tolist()) == 21


def test_the_first_tokens_stay_as_they_are():
    x = np.repeat(numbers(0, N, 1, D), 150, axis=1)
    x[:, 3:] += 1e-3 * numbers(1, N, 147, D)
    for more in ({}, {"similarity": -1.0}):
        found = clustered(x, ClusteringConfig(centroids=5, sinks=3, **more))
        np.testing.assert_array_equal(found.counts[:, :3], np.ones((N, 3)))
        np.testing.assert_allclose(found.keys[:, :3], x[:, :3], rtol=1e-6)
        np.testing.assert_array_equal(found.counts.sum(axis=1), [150] * N)


def test_with_ema_a_centroid_moves_by_a_fixed_share_for_each_token():
    x = np.ones((1, 1, D), np.float32)
    heavy = np.full((1, 1), 1000, np.float32)
    grown = insert(
        slots(x, heavy), slots(np.full((1, 2, D), 2, np.float32)), ClusteringConfig(similarity=-100.0, ema=0.9)
    )
    np.testing.assert_allclose(grown.keys[0, 0], 1 + (1 - 0.9**2), rtol=1e-5)
    assert grown.counts[0].tolist() == [1002, 0, 0]


def test_counts_fade_with_persistence_and_so_do_weights():
    x = numbers(0, 1, 3, D)
    grown = insert(slots(x), slots(x[:, :1] + 0.1), ClusteringConfig(centroids=3, persistence=0.5))
    assert sorted(grown.counts[0].tolist()) == [0.5, 0.5, 1.5]
    np.testing.assert_allclose(grown.keys[0, 0], x[0, 0] + 0.1 / 1.5, rtol=1e-4)


def test_centroids_of_few_tokens_are_not_given_out_but_may_grow():
    x, _ = blobs(0, clusters=2, tokens=60)
    x[:, 0] += 50
    found = clustered(x, ClusteringConfig(centroids=3, min_count=2))
    np.testing.assert_array_equal((np.array(found.counts) == 0).sum(1), [1] * N)
    found.insert(mx.array(x[:, :1]))
    assert float(found.counts.min()) == 2
    first = clustered(x, ClusteringConfig(centroids=3, min_count=2, sinks=1))
    assert float(first.counts[:, 0].min()) == 1


def test_blocks_may_come_together_or_one_by_one_and_no_more_memory_is_ever_taken():
    x = numbers(0, N, 4 * BLOCK, D)
    whole, parts = clustered(x, ClusteringConfig(centroids=20)), OnlineClustering(ClusteringConfig(centroids=20), N, D)
    before = parts.nbytes
    for start in range(0, 4 * BLOCK, BLOCK):
        parts.insert(mx.array(x[:, start : start + BLOCK]))
    assert before == parts.nbytes == N * 20 * (D + 3) * 4
    assert [a.tolist() for a in whole.state] == [a.tolist() for a in parts.state]


def test_a_token_with_nan_spoils_no_other():
    x, _ = blobs(0, tokens=80)
    spoilt = x.copy()
    spoilt[:, 40] = np.nan
    found = clustered(spoilt, ClusteringConfig(centroids=7))
    assert np.isnan(np.array(found.keys)).any(axis=-1).sum() == N
    np.testing.assert_array_equal(found.counts.sum(axis=1), [80] * N)


@pytest.mark.parametrize(
    "rules",
    [
        {"centroids": 0}, {"centroids": 4, "sinks": 4}, {"sinks": -1}, {"metric": "manhattan"}, {"ema": 1.5},
        {"quantile": 2.0}, {"similarity": float("nan")}, {"merge_similarity": "much"}, {"persistence": 0},
        {"persistence": 1.1}, {"min_count": -1}, {"value_weight": -1}, {"similarity": 0.5, "quantile": 0.5},
    ],
)  # fmt: skip
def test_impossible_rules_are_refused(rules):
    with pytest.raises(InputError, match=next(iter(rules))):
        ClusteringConfig(**rules)


def test_arrays_that_do_not_fit_are_refused():
    found = OnlineClustering(ClusteringConfig(), N, D, 2)
    for arrays in ((N, 5, D + 1), None), ((N + 1, 5, D), None), ((N, 5, D), (N, 5, 3)), ((N, 5, D), (N, 4, 2)):
        with pytest.raises(MismatchError, match="tokens"):
            found.insert(*(None if shape is None else mx.zeros(shape) for shape in arrays))


def test_no_attention_is_misplaced_by_centroids_that_stand_for_equal_tokens():
    keys = np.tile(numbers(0, N, 4, D), (1, 5, 1))
    owner = mx.array(np.tile(np.arange(4, dtype=np.int32), (N, 5)))
    queries, centroids = mx.array(numbers(1, N, 9, D)), mx.array(keys[:, :4])
    counted, uncounted = mx.full((N, 4), np.log(5)), mx.zeros((N, 4)).at[:, 0].add(2.0)
    np.testing.assert_allclose(misplaced_attention(queries, mx.array(keys), owner, centroids, counted), 0, atol=1e-6)
    assert float(misplaced_attention(queries, mx.array(keys), owner, centroids, uncounted).min()) > 0.05
    none = misplaced_attention(queries, mx.array(keys), mx.full((N, 20), -1), centroids, counted)
    np.testing.assert_allclose(none, 1, rtol=1e-5)
    far = misplaced_attention(1e3 * mx.array(keys[:, :1]), mx.array(keys), 0 * owner, -centroids, counted)
    assert float(far.max()) <= 1 + 1e-5


def test_centroids_that_say_the_same_cost_diversity():
    queries, keys, owner = mx.zeros((1, 2, D)), mx.zeros((1, 4, D)), mx.array([[0, 1, 2, 3]])
    for centroids, alike in ((np.ones((4, D)), 1.0), (np.eye(4, D), 0.0)):
        args = queries, keys, owner, mx.array(centroids[None], mx.float32), mx.zeros((1, 4))
        assert float(misplaced_attention(*args, diversity=0.5)[0] - misplaced_attention(*args)[0]) == pytest.approx(
            0.5 * alike
        )

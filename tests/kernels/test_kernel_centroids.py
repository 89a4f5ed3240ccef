"""Nearest centroids and their sums: the reference against NumPy in float64, then each body against the reference."""

import mlx.core as mx
import numpy as np
import pytest
from kernel_checks import assert_same
from metal_host import HostError, installed

from mlxkv.kernels import centroids as kernel

# N, T, C, D: edges of the tiles of 32, one of everything, more tiles than one on every side.
SHAPES = [
    (1, 1, 1, 1),
    (2, 31, 33, 64),
    (3, 32, 32, 32),
    (2, 33, 31, 65),
    (1, 70, 1, 31),
    (2, 3, 65, 33),
    (1, 40, 70, 2),
]
METRICS = ["cosine", "euclidean"]
DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def scene(N, T, C, D, dtype=mx.float32, seed=0):
    """x `[N, T, D]` near centroids `[N, C, D]` that are apart, and counts `[N, C]`, some of them 0."""
    random = np.random.default_rng(seed)
    centers = random.normal(size=(N, C, D)) + 3 * np.sign(random.normal(size=(N, C, D)))
    counts = random.integers(1, 9, (N, C)) * (random.random((N, C)) < 0.8)
    counts[:, C // 2] = 3
    owner = np.stack([random.choice(np.flatnonzero(line), T) for line in counts])
    x = np.take_along_axis(centers, owner[..., None], axis=1) * random.uniform(0.9, 1.1, (N, T, 1))
    return [mx.array(array, dtype=kind) for array, kind in ((x, dtype), (centers, mx.float32), (counts, mx.float32))]


def nearest_in_float64(x, centers, counts, metric):
    """By the definitions, from differences and quotients of vectors."""
    x, centers = (np.array(array.astype(mx.float32), dtype=np.float64) for array in (x, centers))
    if metric == "cosine":
        x, centers = (array / np.linalg.norm(array, axis=-1, keepdims=True) for array in (x, centers))
        scores = x @ centers.swapaxes(1, 2)
    else:
        scores = -np.square(x[:, :, None] - centers[:, None]).sum(axis=-1)
    scores = np.where(np.array(counts)[:, None] > 0, scores, -np.inf)
    return scores.argmax(axis=-1), scores.max(axis=-1)


def check_assign(x, centers, counts, metric):
    found, expected = (
        kernel.metal_assign(x, centers, counts, metric),
        kernel.reference_assign(x, centers, counts, metric),
    )
    for one, other in zip(found, expected):
        assert_same(one, other)


def check_sums(x, owner, clusters, weights=None):
    found = kernel.metal_sums(x, owner, clusters, weights)
    for one, other in zip(found, kernel.reference_sums(x, owner, clusters, weights)):
        assert_same(one, other)


@pytest.mark.parametrize("metric", METRICS)
def test_a_token_with_nan_is_near_to_nothing(kernel_path, metric):
    x, centers, counts = scene(2, 5, 40, 33)
    x = mx.where((mx.arange(5) == 3)[:, None], mx.nan, x)
    check_assign(x, centers, counts, metric)
    index, similarity = kernel.assign(x, centers, counts, metric)
    assert (np.array(index)[:, 3] == -1).all()
    assert np.isneginf(np.array(similarity)[:, 3]).all()
    assert (np.array(index)[:, :3] >= 0).all()


def test_centroids_may_be_bfloat16_and_clusters_may_be_none(kernel_path):
    x, centers, counts = scene(2, 33, 5, 33)
    check_assign(x, centers.astype(mx.bfloat16), counts, "cosine")
    check_sums(x, mx.full((2, 33), -1, mx.int32), 0)


def owners(N, T, C, seed=0):
    """Some centroid or none (-1) for each token."""
    return mx.array(np.random.default_rng(seed).integers(-1, C, (N, T)), dtype=mx.int32)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_the_reference_finds_the_nearest_by_definition(shape, metric):
    x, centers, counts = scene(*shape)
    nearest, similarity = nearest_in_float64(x, centers, counts, metric)
    found, value = kernel.reference_assign(x, centers, counts, metric)
    assert np.array_equal(np.array(found), nearest)
    np.testing.assert_allclose(np.array(value), similarity, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_body_finds_what_the_reference_finds(kernel_path, shape, metric, dtype):
    check_assign(*scene(*shape, dtype), metric)


def test_the_body_takes_the_dims_of_a_latent_cache(kernel_path):
    check_assign(*scene(1, 5, 9, 576), "cosine")


@pytest.mark.parametrize("metric", METRICS)
def test_ties_go_to_the_lowest_index_across_lanes_and_tiles(kernel_path, metric):
    centers = np.zeros((1, 70, 4), np.float32)
    centers[0, :, 0] = -1
    centers[0, [69, 40, 33, 37, 5]] = [[2, 0, 0, 0], [0, 2, 0, 0], [2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0]]
    x = mx.array([[[2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0], [-1, 0, 0, 0]]], dtype=mx.float32)
    for path in (kernel.reference_assign, kernel.metal_assign):
        nearest, similarity = path(x, mx.array(centers), mx.ones((1, 70)), metric)
        assert nearest.tolist() == [[33, 37, 5, 0]]
        assert similarity.tolist() == [[1.0 if metric == "cosine" else 0.0] * 4]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("held", [0.0, float("nan"), float("inf")])
def test_an_empty_centroid_is_never_chosen_whatever_it_holds(kernel_path, metric, held):
    x, centers, _ = scene(2, 33, 40, 8)
    counts = mx.where(mx.arange(40) % 3 == 1, 1, 0) * mx.ones((2, 1))
    expected = nearest_in_float64(x, centers, counts, metric)[0]
    dirty = mx.where(counts[..., None] > 0, centers, held)
    for path in (kernel.reference_assign, kernel.metal_assign):
        assert np.array_equal(np.array(path(x, dirty, counts, metric)[0]), expected)


@pytest.mark.parametrize("metric", METRICS)
def test_without_centroids_there_is_none(kernel_path, metric):
    x, centers, counts = scene(2, 33, 40, 8)
    for path in (kernel.reference_assign, kernel.metal_assign):
        nearest, similarity = path(x, centers, mx.zeros_like(counts), metric)
        assert set(np.array(nearest).ravel()) == {-1}
        assert set(np.array(similarity).ravel()) == {-np.inf}


def test_a_zero_vector_is_like_nothing_in_direction(kernel_path):
    x, centers, counts = scene(1, 9, 40, 8)
    for path in (kernel.reference_assign, kernel.metal_assign):
        assert set(np.array(path(mx.zeros_like(x), centers, counts)[1]).ravel()) == {0.0}
        lone = mx.where(mx.arange(40) == 7, 1, 0)[None]
        nearest, similarity = path(x, mx.zeros_like(centers), lone)
        assert set(np.array(nearest).ravel()) == {7}
        assert set(np.array(similarity).ravel()) == {0.0}


@pytest.mark.parametrize("metric", METRICS)
def test_no_tokens_have_no_nearest(kernel_path, metric):
    _, centers, counts = scene(2, 3, 5, 8)
    for path in (kernel.reference_assign, kernel.metal_assign):
        nearest, similarity = path(mx.zeros((2, 0, 8)), centers, counts, metric)
        assert (nearest.shape, nearest.dtype) == ((2, 0), mx.int32)
        assert (similarity.shape, similarity.dtype) == ((2, 0), mx.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_body_adds_what_the_reference_adds(kernel_path, shape, dtype):
    N, T, C, _ = shape
    x = scene(*shape, dtype)[0]
    check_sums(x, owners(N, T, C), C)
    check_sums(x, owners(N, T, C), C, mx.random.uniform(shape=(N, T), key=mx.random.key(1)))


def test_tokens_are_added_in_their_order_bit_for_bit(kernel_path):
    x, owner = scene(2, 100, 9, 33)[0], owners(2, 100, 9)
    weights = mx.random.uniform(shape=(2, 100), key=mx.random.key(2))
    expected = np.zeros((2, 10, 33), np.float32)
    for n in range(2):
        np.add.at(expected[n], np.array(owner[n]), np.array(weights[n, :, None] * x[n]))
    assert np.array_equal(np.array(kernel.metal_sums(x, owner, 9, weights)[0]), expected[:, :9])


def test_tokens_of_no_cluster_add_to_none(kernel_path):
    x, owner = scene(2, 33, 9, 5)[0], mx.full((2, 33), -1)
    for path in (kernel.reference_sums, kernel.metal_sums):
        total, number = path(x, owner, 9)
        assert mx.array_equal(total, mx.zeros((2, 9, 5)))
        assert mx.array_equal(number, mx.zeros((2, 9)))


def test_no_tokens_add_nothing(kernel_path):
    for path in (kernel.reference_sums, kernel.metal_sums):
        total, number = path(mx.zeros((2, 0, 5)), mx.zeros((2, 0), mx.int32), 9)
        assert mx.array_equal(total, mx.zeros((2, 9, 5)))
        assert mx.array_equal(number, mx.zeros((2, 9)))


def test_sums_of_positions_are_mean_positions(kernel_path):
    positions = mx.arange(500, 566, dtype=mx.float32).reshape(1, 66, 1)
    total, number = kernel.sums(positions, mx.array([[0, 1, 1] * 22]), 2)
    assert (total[..., 0] / number).tolist() == [[531.5, 533.0]]


def test_means_after_many_updates_are_the_means_of_all_tokens(kernel_path):
    x, owner = mx.round(scene(2, 90, 6, 33)[0] * 4), owners(2, 90, 6)
    means, counts = mx.full((2, 6, 33), float("nan")), mx.zeros((2, 6))
    for part in (slice(0, 1), slice(1, 40), slice(40, 90)):
        means, counts = kernel.update(x[:, part], owner[:, part], means, counts)
    for n in range(2):
        for cluster in range(6):
            mine = np.array(x[n])[np.array(owner[n]) == cluster]
            assert counts[n, cluster].item() == len(mine)
            np.testing.assert_allclose(np.array(means[n, cluster]), mine.mean(axis=0), rtol=1e-5, atol=1e-5)


def test_a_weight_counts_as_that_many_tokens(kernel_path):
    x, owner = scene(1, 8, 3, 5)[0], owners(1, 8, 3)
    state = mx.ones((1, 3, 5)), mx.ones((1, 3))
    thrice = kernel.update(mx.repeat(x, 3, axis=1), mx.repeat(owner, 3, axis=1), *state)
    for one, other in zip(kernel.update(x, owner, *state, weights=mx.full((1, 8), 3.0)), thrice):
        assert_same(one, other)


def test_an_update_leaves_centroids_without_tokens_as_they_are(kernel_path):
    x, centers, _ = scene(2, 9, 40, 33)
    found, counts = kernel.update(x, mx.full((2, 9), 4), centers, mx.full((2, 40), 7.3))
    others = [i for i in range(40) if i != 4]
    assert mx.array_equal(found[:, others], centers[:, others])
    assert not mx.array_equal(found[:, 4], centers[:, 4])
    assert mx.array_equal(counts[:, others], mx.full((2, 39), 7.3))


ASSIGN, SUMS = "centroids_assign", "centroids_sums"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
FAULTS = {
    "assign: tiles read before they are written": (ASSIGN, f"{BARRIER}    if", "if"),
    "assign: tiles written before they are read": (ASSIGN, f"{BARRIER}  }}", "}"),
    "assign: tile without its padding": (ASSIGN, "centroid_tile[row * 33 + lane]", "centroid_tile[row * 32 + lane]"),
    "assign: read past the tokens": (ASSIGN, "t < tokens && d < dims ?", "d < dims ?"),
    "assign: read past the dims": (ASSIGN, "t < tokens && d < dims ?", "t < tokens ?"),
    "assign: read past the centroids": (ASSIGN, "c < clusters && d < dims ?", "d < dims ?"),
    "assign: dims beyond the first tile": (ASSIGN, "uint d = from + lane", "uint d = lane"),
    "assign: 31 dims of a tile": (ASSIGN, "i < 32", "i < 31"),
    "assign: the first clustering's tokens": (ASSIGN, "x[(size_t(n) * tokens + t) * dims + d]", "x[t * dims + d]"),
    "assign: the next token": (ASSIGN, "token_tile[(mine + k) * 32 + i]", "token_tile[mine * 32 + i]"),
    "assign: busy tokens skipped": (ASSIGN, "first + mine < tokens", "first + mine + 4 < tokens"),
    "assign: written past the tokens": (ASSIGN, "lane == 0 && t < tokens", "lane == 0"),
    "assign: last of equals in a lane": (ASSIGN, "score > best_of[k]", "score >= best_of[k]"),
    "assign: last of equals of all lanes": (
        ASSIGN,
        "simd_min(best_of[k] == top ? nearest_of[k] : clusters)",
        "simd_max(best_of[k] == top ? nearest_of[k] : 0)",
    ),
    "assign: first lane's best": (ASSIGN, "metal::simd_max(best_of[k])", "metal::simd_min(best_of[k])"),
    "assign: centroid past the end": (ASSIGN, "  if (c < clusters) {", "  {"),
    "assign: another's offset": (ASSIGN, "offsets[n * clusters + c]", "offsets[c]"),
    "assign: empty ones count": (
        ASSIGN,
        "+ offsets[n * clusters + c]",
        "+ metal::max(offsets[n * clusters + c], -1e9f)",
    ),
    "assign: none is one past the end": (ASSIGN, "winner == clusters ? -1 : int(winner)", "int(winner)"),
    "sums: written past the clusters": (SUMS, "if (cluster >= clusters)", "if (cluster > clusters)"),
    "sums: read past the tokens": (SUMS, "t < tokens && owner", "owner"),
    "sums: tokens beyond the first 32": (SUMS, "uint t = start + lane", "uint t = lane"),
    "sums: one token of 32": (SUMS, "left &= left - 1", "left = 0"),
    "sums: half of the lanes": (SUMS, "1u << lane", "1u << (lane & 15)"),
    "sums: read past the dims": (SUMS, "if (d < dims) {\n      total", "{\n      total"),
    "sums: written past the dims": (SUMS, "if (d < dims) {\n  totals", "{\n  totals"),
    "sums: without weights": (SUMS, "weight * float", "float"),
    "sums: the first clustering's owners": (SUMS, "owner[n * tokens + t]", "owner[t]"),
    "sums: tokens of lower clusters too": (SUMS, "== int(cluster)", "<= int(cluster)"),
}


def check_faulty():
    """Small, but more than one tile of tokens, centroids and dims, and one clustering of nothing but empty ones."""
    x, centers, counts = scene(2, 33, 70, 65)
    equal = mx.where(mx.arange(70)[None, :, None] % 35 < 2, mx.round(centers[:, :1]), centers)
    near = mx.concatenate([x[:, :-5], equal[:, :5]], axis=1)
    for held in (counts, mx.array([[1.0], [0.0]]) * counts):
        for metric in METRICS:
            check_assign(near, equal, held, metric)
    check_sums(x, owners(2, 33, 70), 70, mx.random.uniform(shape=(2, 33), key=mx.random.key(1)))
    check_sums(x, mx.zeros((2, 33), mx.int32), 1)


@pytest.mark.faults
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault):
    with installed(FAULTS[fault]), pytest.raises((AssertionError, HostError)):
        check_faulty()

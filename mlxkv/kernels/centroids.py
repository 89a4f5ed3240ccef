"""Online clustering of token vectors: the nearest centroid of each token, and the sum of each centroid's tokens.

N independent clusterings (batch x heads) of T tokens against C centroids in D dims, all float types in, float32 out.
A centroid of count 0 is empty: never chosen, whatever it holds. `update` is the running mean of mini-batch k-means
(Sculley, WWW 2010) with all tokens of a call assigned to the old centroids. Other rules, such as an exponential mean,
are plain array operations on `sums`: `mean + rate * (total / weight - mean)`; a value's centroids are `sums` of the
values by the keys' index, mean positions `sums` of positions `[N, T, 1]`.
"""

from __future__ import annotations

from typing import Literal

import mlx.core as mx

from mlxkv.kernels import metal
from mlxkv.kernels.metal import Kernel
from mlxkv.kernels.operations import Example, Operation, register

Metric = Literal["cosine", "euclidean"]
_ASSIGN = Kernel("centroids_assign", inputs=("x", "directions", "offsets"), outputs=("nearest",))
_SUMS = Kernel("centroids_sums", inputs=("x", "owner", "weights", "clusters"), outputs=("totals", "numbers"))
_TILE = 32  # tokens of a threadgroup, in centroids_assign.metal
_ROWS = 8  # SIMD-groups of a threadgroup


def assign(x: mx.array, centroids: mx.array, counts: mx.array, metric: Metric = "cosine") -> tuple[mx.array, mx.array]:
    """Return each token's nearest centroid and their similarity.

    Parameters
    ----------
    x
        Tokens `[N, T, D]`, float32, float16 or bfloat16.
    centroids
        `[N, C, D]` of any float type.
    counts
        `[N, C]`, above 0 where a centroid is not empty.
    metric
        Similarity: "cosine", 0 where a vector is zero, or "euclidean", minus the squared distance.

    Returns
    -------
    tuple[mx.array, mx.array]
        Index int32 `[N, T]` and similarity float32 `[N, T]`. Ties go to the lowest index; where all centroids are
        empty, and for a token that holds NaN, the index is -1 and the similarity -inf.

    Notes
    -----
    Distances are compared by products, |c|^2 / 2 - x . c: of two that differ by less than float32's rounding of the
    squared norms either is the nearest.

    Examples
    --------
    >>> centroids = mx.array([[[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]])
    >>> nearest, similarity = assign(mx.array([[[3.0, 0.0], [0.0, 2.0]]]), centroids, counts=mx.array([[1, 1, 0]]))
    >>> nearest.tolist(), similarity.tolist()
    ([[0, 1]], [[1.0, 1.0]])
    """
    return (metal_assign if metal.available() else reference_assign)(x, centroids, counts, metric)


def sums(x: mx.array, owner: mx.array, clusters: int, weights: mx.array | None = None) -> tuple[mx.array, mx.array]:
    """Add up the tokens of each cluster.

    Parameters
    ----------
    x
        Tokens `[N, T, D]`, float32, float16 or bfloat16.
    owner
        int32 `[N, T]`, index of each token's cluster, or -1 for none.
    clusters
        C, the number of clusters.
    weights
        `[N, T]`, each token's weight; None is 1 for all.

    Returns
    -------
    tuple[mx.array, mx.array]
        Weighted sums `[N, C, D]` and sums of weights `[N, C]`, float32. Added token by token, so the same bits every
        time.

    Examples
    --------
    >>> total, number = sums(mx.array([[[1.0], [2.0], [4.0]]]), owner=mx.array([[0, 1, 0]]), clusters=2)
    >>> total.tolist(), number.tolist()
    ([[[5.0], [2.0]]], [[2.0, 1.0]])
    """
    return (metal_sums if metal.available() else reference_sums)(x, owner, clusters, weights)


def update(
    x: mx.array, owner: mx.array, centroids: mx.array, counts: mx.array, weights: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Move each centroid to the mean of all tokens ever assigned to it.

    mean' = (count * mean + sum of weight * x) / count', count' = count + sum of weights.

    Parameters
    ----------
    x
        New tokens `[N, T, D]`, float32, float16 or bfloat16.
    owner
        int32 `[N, T]`, each token's centroid, or -1 for none.
    centroids
        Means `[N, C, D]` before these tokens.
    counts
        `[N, C]`, the weight of all tokens before these.
    weights
        `[N, T]`, each token's weight; None is 1 for all.

    Returns
    -------
    tuple[mx.array, mx.array]
        Centroids `[N, C, D]` and counts `[N, C]`, float32. A centroid that owns no token keeps its bits, and an empty
        one becomes the mean of its tokens.

    Examples
    --------
    >>> means, counts = mx.array([[[4.0], [9.0]]]), mx.array([[1.0, 0.0]])
    >>> update(mx.array([[[2.0], [7.0]]]), mx.array([[0, 1]]), means, counts)[0].tolist()
    [[[3.0], [7.0]]]
    """
    total, number = sums(x, owner, counts.shape[1], weights)
    held = mx.where(counts[..., None] > 0, counts[..., None] * centroids, 0)
    grown = counts + number
    return mx.where(number[..., None] > 0, (held + total) / grown[..., None], centroids), grown


def reference_assign(
    x: mx.array, centroids: mx.array, counts: mx.array, metric: Metric = "cosine"
) -> tuple[mx.array, mx.array]:
    """Assign by the array operations that define `assign`.

    Parameters
    ----------
    x, centroids, counts, metric
        See `assign`.

    Returns
    -------
    tuple[mx.array, mx.array]
        See `assign`.
    """
    if 0 in x.shape:
        return mx.zeros(x.shape[:2], mx.int32), mx.zeros(x.shape[:2])
    directions, offsets = _terms(centroids, counts, metric)
    scores = mx.addmm(offsets[:, None], x.astype(mx.float32), directions.swapaxes(1, 2))
    scores = mx.where(scores > -mx.inf, scores, -mx.inf)  # a token with NaN has no nearest centroid
    nearest = mx.where(scores.max(axis=-1) > -mx.inf, scores.argmax(axis=-1).astype(mx.int32), -1)
    return nearest, _similarity(x, centroids, nearest, metric)


def reference_sums(
    x: mx.array, owner: mx.array, clusters: int, weights: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Add up by the array operations that define `sums`.

    Parameters
    ----------
    x, owner, clusters, weights
        See `sums`.

    Returns
    -------
    tuple[mx.array, mx.array]
        See `sums`.
    """
    N, _, D = x.shape
    weights = _weights(owner, weights)
    row, slot = mx.arange(N)[:, None], mx.where(owner < 0, clusters, owner)  # one more cluster for tokens of none
    totals = mx.zeros((N, clusters + 1, D)).at[row, slot].add(weights[..., None] * x.astype(mx.float32))
    numbers = mx.zeros((N, clusters + 1)).at[row, slot].add(weights)
    return totals[:, :clusters], numbers[:, :clusters]


def metal_assign(
    x: mx.array, centroids: mx.array, counts: mx.array, metric: Metric = "cosine"
) -> tuple[mx.array, mx.array]:
    """Assign by the kernel, 32 tokens per threadgroup.

    Parameters
    ----------
    x, centroids, counts, metric
        See `assign`.

    Returns
    -------
    tuple[mx.array, mx.array]
        See `assign`.
    """
    if 0 in x.shape:
        return reference_assign(x, centroids, counts, metric)
    N, T, _ = x.shape
    nearest = _ASSIGN(
        inputs=[x, *_terms(centroids, counts, metric)],
        grid=(-(-T // _TILE) * 32 * _ROWS, N, 1),
        threadgroup=(32 * _ROWS, 1, 1),
        output_shapes=[(N, T)],
        output_dtypes=[mx.int32],
    )[0]
    return nearest, _similarity(x, centroids, nearest, metric)


def metal_sums(
    x: mx.array, owner: mx.array, clusters: int, weights: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Add up by the kernel, a SIMD-group for each cluster and 32 dims.

    Parameters
    ----------
    x, owner, clusters, weights
        See `sums`.

    Returns
    -------
    tuple[mx.array, mx.array]
        See `sums`.
    """
    N, _, D = x.shape
    if 0 in (*x.shape, clusters):
        return mx.zeros((N, clusters, D)), mx.zeros((N, clusters))
    totals, numbers = _SUMS(
        inputs=[x, owner, _weights(owner, weights), mx.array(clusters, mx.uint32)],
        grid=(-(-D // 32) * 32, -(-clusters // _ROWS) * _ROWS, N),
        threadgroup=(32, _ROWS, 1),
        output_shapes=[(N, clusters, D), (N, clusters)],
        output_dtypes=[mx.float32, mx.float32],
    )
    return totals, numbers


def _terms(centroids: mx.array, counts: mx.array, metric: Metric) -> tuple[mx.array, mx.array]:
    """Return directions `[N, C, D]` and offsets `[N, C]`, float32: `x . direction + offset` ranks centroids."""
    held = counts > 0
    directions = mx.where(held[..., None], centroids.astype(mx.float32), 0)
    squares = mx.square(directions).sum(axis=-1)
    if metric == "cosine":
        return directions * _inverse(mx.sqrt(squares))[..., None], mx.where(held, 0.0, -mx.inf)
    return directions, mx.where(held, -squares / 2, -mx.inf)


def _similarity(x: mx.array, centroids: mx.array, nearest: mx.array, metric: Metric) -> mx.array:
    """Return the similarity `[N, T]` of tokens and their nearest centroids, from the vectors: nothing cancels out."""
    chosen = mx.take_along_axis(centroids, mx.maximum(nearest, 0)[..., None], axis=1).astype(mx.float32)
    x = x.astype(mx.float32)
    if metric == "cosine":
        value = (x * chosen).sum(axis=-1) * _inverse(mx.linalg.norm(x, axis=-1) * mx.linalg.norm(chosen, axis=-1))
    else:
        value = -mx.square(x - chosen).sum(axis=-1)
    return mx.where(nearest >= 0, value, -mx.inf)


def _inverse(norm: mx.array) -> mx.array:
    return mx.where(norm > 0, 1 / norm, 0)


def _weights(owner: mx.array, weights: mx.array | None) -> mx.array:
    return mx.ones(owner.shape) if weights is None else weights.astype(mx.float32)


def _example(tokens: int) -> tuple[mx.array, mx.array, mx.array]:
    """Return tokens close to a centroid each, so that no rounding can change which is the nearest."""
    means = mx.random.normal((8, 256, 128), key=mx.random.key(0))
    noise = mx.random.normal((8, tokens, 128), key=mx.random.key(1))
    return (means[:, mx.arange(tokens) % 256] + 0.1 * noise).astype(mx.bfloat16), means, mx.ones((8, 256))


def _example_sums(tokens: int) -> tuple[mx.array, mx.array, int]:
    x, means, _ = _example(tokens)
    return x, mx.broadcast_to((mx.arange(tokens) * 7 % 256).astype(mx.int32), x.shape[:2]), means.shape[1]


register(
    Operation(
        "centroids.assign",
        assign,
        reference_assign,
        metal_assign,
        (Example("8 heads x 256 centroids x 128 dims", _example),),
    )
)
register(
    Operation(
        "centroids.sums",
        sums,
        reference_sums,
        metal_sums,
        (Example("8 heads x 256 centroids x 128 dims", _example_sums),),
    )
)

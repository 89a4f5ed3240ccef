"""Error of attention over centroids, compared with attention over the tokens that they stand for."""

from __future__ import annotations

import mlx.core as mx

from mlxkv.kernels.centroids import sums
from mlxkv.live.arrays import safe_divide, unit_vectors


def misplaced_attention(
    queries: mx.array, keys: mx.array, owner: mx.array, centroids: mx.array, bias: mx.array, diversity: float = 0.0
) -> mx.array:
    """Return the share of attention that centroids get in excess of, or short of, their tokens' attention.

    Parameters
    ----------
    queries
        `[N, Q, D]`, already scaled.
    keys
        The tokens, `[N, T, D]`.
    owner
        Index of each token's centroid, `[N, T]`; -1 for none: the attention of such a token counts as misplaced.
    centroids
        `[N, C, D]`.
    bias
        Logarithms of the centroids' token counts, `[N, C]`, -inf for an empty centroid.
    diversity
        Weight of the penalty for similar centroids: what a mean cosine of 1 between different centroids adds.

    Returns
    -------
    mx.array
        `[N]` float32: half of the sum, over centroids, of the absolute difference between the attention that a centroid
        gets and the attention that its tokens get, averaged over queries. 0 for no error, 1 for the largest error.
    """
    exact = mx.softmax(queries.astype(mx.float32) @ keys.astype(mx.float32).swapaxes(1, 2), axis=-1)
    scores = queries.astype(mx.float32) @ centroids.astype(mx.float32).swapaxes(1, 2) + bias[:, None]
    due, _ = sums(exact.swapaxes(1, 2), owner, centroids.shape[1])
    orphaned = mx.where(owner < 0, exact.mean(axis=1), 0).sum(axis=-1)
    misplaced = (mx.abs(mx.softmax(scores, axis=-1) - due.swapaxes(1, 2)).sum(axis=-1).mean(axis=-1) + orphaned) / 2
    if not diversity:
        return misplaced
    there = bias > -mx.inf
    units = mx.where(there[..., None], unit_vectors(centroids), 0)
    number = there.sum(axis=-1).astype(mx.float32)
    alike = mx.square(units.sum(axis=1)).sum(axis=-1) - mx.square(units).sum(axis=(1, 2))
    return misplaced + diversity * safe_divide(alike, number * (number - 1))

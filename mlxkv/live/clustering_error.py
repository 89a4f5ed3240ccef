"""How far attention over centroids is from attention over their tokens."""

from __future__ import annotations

import mlx.core as mx

from mlxkv.kernels.centroids import sums
from mlxkv.live.arrays import safe_divide, unit_vectors


def misplaced_attention(
    queries: mx.array, keys: mx.array, owner: mx.array, centroids: mx.array, bias: mx.array, diversity: float = 0.0
) -> mx.array:
    """Return the attention mass that centroids misplace.

    Parameters
    ----------
    queries
        `[N, Q, D]`, already scaled.
    keys
        The tokens, `[N, T, D]`.
    owner
        Their centroids, `[N, T]`; -1 for none, whose mass counts as misplaced.
    centroids
        `[N, C, D]`.
    bias
        Logarithms of the centroids' counts, `[N, C]`, -inf where there is no centroid.
    diversity
        Penalty for a mean cosine of 1 between different centroids, since similar centroids waste slots.

    Returns
    -------
    mx.array
        `[N]` float32: half of the sum, over centroids, of the difference between the mass that a centroid gets and the
        mass that its tokens get, averaged over queries. 0 where none is misplaced, 1 where all is.
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

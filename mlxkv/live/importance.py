"""Importance of tokens: the attention that each gets from the queries of a kv head, averaged or summed over time."""

from __future__ import annotations

import mlx.core as mx


def update_importance(importance: mx.array, mass: mx.array, queries: int, decay: float) -> mx.array:
    """Update the importance of tokens after a chunk.

    Parameters
    ----------
    importance
        `[B, Hkv, T]`, of the T tokens before the chunk.
    mass
        `[B, Hkv, T + L]`, attention probabilities that the last queries gave to all tokens, summed over those queries.
    queries
        Number of queries that `mass` was summed over.
    decay
        Weight of a query relative to the query after it, above 0 and at most 1. With 1 importance is the sum over all
        queries; below 1 it is a moving average of the attention per query.

    Returns
    -------
    mx.array
        `[B, Hkv, T + L]`.

    Notes
    -----
    H2O (https://arxiv.org/abs/2306.14048) is the case of decay 1. In the moving average a new token starts with the
    mean over the queries that could see it; otherwise it would look unimportant only because few queries came after it.

    Examples
    --------
    One token so far; a new one comes, whose query gives it 3/4 of its attention:

    >>> old, mass = mx.array([[[0.5]]]), mx.array([[[0.25, 0.75]]])
    >>> update_importance(old, mass, queries=1, decay=1).tolist()
    [[[0.75, 0.75]]]
    >>> update_importance(old, mass, queries=1, decay=0.5).tolist()
    [[[0.375, 0.75]]]
    """
    T = importance.shape[-1]
    if decay == 1:
        return mx.concatenate([importance + mass[..., :T], mass[..., T:]], axis=-1)
    mean = mass if queries == 1 else mass / mx.minimum(mx.arange(mass.shape[-1], 0, -1), queries)
    weight = decay**queries
    return mx.concatenate([weight * importance + (1 - weight) * mean[..., :T], mean[..., T:]], axis=-1)

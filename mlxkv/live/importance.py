"""Importance of tokens to a kv head: the attention that they get, over time."""

from __future__ import annotations

import mlx.core as mx


def update_importance(importance: mx.array, mass: mx.array, queries: int, decay: float) -> mx.array:
    """Importance `[B, Hkv, T]` and what the last queries attended to, `[B, Hkv, T + L]`, as importance `[B, Hkv, T + L]`.

    An average of the attention of one query, in which each query counts `decay` times as much as the one after it;
    with decay 1 the sum over all queries. mass: summed over those queries. A new token starts with the mean of the
    queries that could see it, or it would look unimportant for having come last.
    """
    T = importance.shape[-1]
    if decay == 1:
        return mx.concatenate([importance + mass[..., :T], mass[..., T:]], axis=-1)
    mean = mass / mx.minimum(mx.arange(mass.shape[-1], 0, -1), queries)
    kept = decay**queries
    return mx.concatenate([kept * importance + (1 - kept) * mean[..., :T], mean[..., T:]], axis=-1)

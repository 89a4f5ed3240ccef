"""The whole cache, watched: how spread the attention is that it is asked for. Written as a live method is, so that the
benchmarks make its caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlxkv.live.base import causal_mask
from mlxkv.live.methods import full

METHOD = "watched"


@dataclass(frozen=True)
class Settings(full.FullConfig):
    """The yardstick, watched."""


class Cache(full.FullCache):
    """Everything as it is; notes how spread the attention of each query is, but for those of the context.

    entropies: in nats, a mean over heads, `[B, L]` of each chunk.
    """

    state_fields = (*full.FullCache.state_fields, "entropies")  # type: ignore[assignment]  # so they are evaluated with the state

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.entropies: list[mx.array] = []

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None = None
    ) -> mx.array:
        if queries.shape[2] < keys.shape[2]:
            self.entropies.append(attention_entropy(queries, keys, scale))
        return super().attend(queries, keys, values, scale, mask)


def attention_entropy(queries: mx.array, keys: mx.array, scale: float) -> mx.array:
    """In nats, a mean over heads, `[B, L]`: of queries `[B, Hq, L, D]`, the last ones of keys `[B, H, T, D]`."""
    repeated = mx.repeat(keys, queries.shape[1] // keys.shape[1], axis=1).astype(mx.float32)
    seen = causal_mask(queries.shape[2], keys.shape[2])
    scores = mx.where(seen, scale * queries.astype(mx.float32) @ repeated.swapaxes(-1, -2), -mx.inf)
    return entropy(scores).mean(axis=1)


def entropy(scores: mx.array) -> mx.array:
    """In nats, of the softmax over the last axis; scores may be -inf."""
    logs = scores - mx.logsumexp(scores, axis=-1, keepdims=True)
    return -mx.where(logs > -mx.inf, mx.exp(logs) * logs, 0).sum(axis=-1)

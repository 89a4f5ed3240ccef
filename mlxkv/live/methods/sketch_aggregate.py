"""Sketch aggregate: as sketch-topk, but light tokens are merged into a few weighted entries, not given up."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlxkv.config import integer
from mlxkv.kernels import centroids
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.live.base import live_methods, unquantized
from mlxkv.live.sketching import SketchConfig, SketchingCache, gather_tokens
from mlxkv.spec import CacheSpec


@dataclass(frozen=True, kw_only=True)
class SketchAggregateConfig(SketchConfig):
    """Settings of sketch-aggregate: those of all sketch methods, and

    Parameters
    ----------
    entries
        Entries that light tokens are merged into.
    """

    entries: int = integer(16, least=1)


@live_methods.register("sketch-aggregate")
class SketchAggregateCache(SketchingCache):
    """`merged` are means of keys and of values, and of how many tokens, `[B, Hkv, entries]` float32; the logarithm of that
    is added to their scores, so that an entry of equal tokens weighs as they did.

    A token that is not heavy joins the entry whose key is nearest to its own, both rotated as they are, since a query meets
    them so. The first entries are such tokens at even distances. Means are held in the tokens' type, so an entry of some
    thousand tokens (bfloat16: some hundred) hardly moves any more.
    """

    config_class = SketchAggregateConfig
    config: SketchAggregateConfig

    state_fields = ("merged", *SketchingCache.state_fields)

    def __init__(self, config: SketchAggregateConfig, spec: CacheSpec, layer: int) -> None:
        super().__init__(config, spec, layer)
        self.entries = config.entries
        self.merged: tuple[mx.array, mx.array, mx.array] | None = None

    def buckets(self) -> list[Bucket]:
        merged = [] if self.merged is None else [(unquantized(self.merged[0]), unquantized(self.merged[1]))]
        return [*merged, *super().buckets()]

    def bias(self) -> mx.array | None:
        if self.merged is None:
            return None
        return mx.pad(mx.log(self.merged[2]), [(0, 0), (0, 0), (0, self.kept - self.entries)])

    def evict(self, keys: mx.array, values: mx.array, places: mx.array) -> None:
        places = mx.sort(places, axis=-1)
        keys, values = gather_tokens(keys, places), gather_tokens(values, places)
        if self.merged is None:
            first = mx.arange(self.entries) * places.shape[-1] // self.entries
            old_keys, old_values = keys[:, :, first], values[:, :, first]
            counts = mx.zeros(old_keys.shape[:3])
        else:
            old_keys, old_values, counts = self.merged
        # An entry without tokens yet can be the nearest too, so all count as one here.
        owner, _ = centroids.assign(_flat(keys), _flat(old_keys), mx.ones(_flat(counts).shape), "euclidean")
        new_keys, grown = centroids.update(_flat(keys), owner, _flat(old_keys), _flat(counts))
        new_values, _ = centroids.update(_flat(values), owner, _flat(old_values), _flat(counts))
        self.merged = (
            new_keys.reshape(old_keys.shape).astype(keys.dtype),
            new_values.reshape(old_values.shape).astype(values.dtype),
            grown.reshape(counts.shape),
        )


def _flat(x: mx.array) -> mx.array:
    """Batch and heads as one axis."""
    return x.reshape(-1, *x.shape[2:])

"""Sketch aggregate: as sketch-topk, but evicted tokens are merged into a few weighted entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx

from mlxkv.config import integer
from mlxkv.errors import FormatError
from mlxkv.kernels import centroids
from mlxkv.live.base import KeysValues, live_methods
from mlxkv.live.checks import check_array, check_values
from mlxkv.live.in_place import Field
from mlxkv.live.sketching import SketchConfig, SketchedRows, SketchingCache, gather_tokens
from mlxkv.spec import CacheSpec


@dataclass(frozen=True, kw_only=True)
class SketchAggregateConfig(SketchConfig):
    """Settings of sketch-aggregate: those of all sketch methods, and `entries`.

    Parameters
    ----------
    entries
        Number of entries into which evicted tokens are merged.
    """

    entries: int = integer(16, least=1)


class MergedEntries(NamedTuple):
    """Entries that stand for evicted tokens.

    Parameters
    ----------
    keys, values
        Means over each entry's tokens, `[B, Hkv, entries, D]` and `[B, Hkv, entries, Dv]`.
    counts
        Number of tokens per entry, `[B, Hkv, entries]` float32.
    """

    keys: mx.array
    values: mx.array
    counts: mx.array


@live_methods.register("sketch-aggregate")
class SketchAggregateCache(SketchingCache):
    """Sketch aggregate: sinks, heavy and newest tokens stay; all others are merged into a few weighted entries.

    An evicted token joins the entry whose key is nearest to its own. Keys are compared with their rotation, because
    queries are multiplied with rotated keys. The entries start as evenly spaced tokens of the first eviction. The
    logarithm of an entry's count is added to its scores, so that an entry of n equal tokens gets the attention that the
    n tokens would have got.

    Parameters
    ----------
    config
        Settings.
    spec
        Description of the model's cache.
    layer
        The layer's index in the model.

    Attributes
    ----------
    merged
        The entries, None while no token has been evicted.

    Notes
    -----
    Tokens are selected as in sketch-topk; merging evicted tokens is this project's own. Means are stored in the tokens'
    type, so rounding stops an entry from changing after some thousand tokens in float16, some hundred in bfloat16.
    """

    config_class = SketchAggregateConfig
    config: SketchAggregateConfig

    state_fields = ("merged", *SketchingCache.state_fields)
    state_types: ClassVar = {**SketchingCache.state_types, "merged": MergedEntries}
    merged = Field[MergedEntries | None]()
    _unmoved = (*SketchingCache._unmoved, "merged")

    def __init__(self, config: SketchAggregateConfig, spec: CacheSpec, layer: int) -> None:
        super().__init__(config, spec, layer)
        self.merged_entries = config.entries
        self.merged = None

    def parts(self) -> list[KeysValues]:
        """Return the merged entries, then heavy tokens and tail."""
        merged = self.merged
        return [*([] if merged is None else [KeysValues(merged.keys, merged.values)]), *super().parts()]

    def score_bias(self) -> mx.array | None:
        """Return the logarithms of the entries' counts."""
        if (merged := self.merged) is None:
            return None
        return mx.pad(mx.log(merged.counts), [(0, 0), (0, 0), (0, self.kept - self.merged_entries)])

    def check_state(self) -> None:
        """Check the entries of evicted tokens, then what every sketch method has."""
        if self.merged is not None:
            shape = None, self.slots[0].heads, self.merged_entries
            for name, slot in zip(("keys", "values"), self.slots):
                check_array(getattr(self.merged, name), f"merged.{name}", (*shape, slot.dim))
            check_array(self.merged.counts, "merged.counts", shape, mx.float32)
            check_values(self.merged.counts, "merged.counts", 0, self.offset)
        super().check_state()
        if self.merged is not None and self.heavy is None:
            raise FormatError("there are merged entries, but no heavy tokens")

    def _new_rows(self) -> SketchedRows:
        """Move all that is stored into rows, and leave the counts of the entries beside them."""
        rows = super()._new_rows()
        if (merged := rows.fields["merged"]) is not None:
            rows.fields["merged"] = merged.counts
        return rows

    def _settled(self, rows: Any) -> dict[str, Any]:
        """Return all fields."""
        fields = super()._settled(rows)
        if (counts := fields["merged"]) is not None:
            keys, values = rows.tokens(0, self.merged_entries)
            fields["merged"] = MergedEntries(keys, values, counts)
        return fields

    def evict(self, tokens: KeysValues, indices: mx.array) -> None:
        """Merge the evicted tokens into the entries with the nearest keys."""
        indices = mx.sort(indices, axis=-1)
        evicted = gather_tokens(tokens, indices)
        old = self.merged
        if old is None:
            first = mx.arange(self.merged_entries) * indices.shape[-1] // self.merged_entries
            keys, values = evicted.keys[:, :, first], evicted.values[:, :, first]
            old = MergedEntries(keys, values, mx.zeros(keys.shape[:3]))
        # Entries without tokens yet can be the nearest too, so all counts are passed as 1.
        ones = mx.ones(_flat(old.counts).shape)
        owner, _ = centroids.assign(_flat(evicted.keys), _flat(old.keys), ones, "euclidean")
        new_keys, counts = centroids.update(_flat(evicted.keys), owner, _flat(old.keys), _flat(old.counts))
        new_values, _ = centroids.update(_flat(evicted.values), owner, _flat(old.values), _flat(old.counts))
        self.merged = MergedEntries(
            new_keys.reshape(old.keys.shape).astype(evicted.keys.dtype),
            new_values.reshape(old.values.shape).astype(evicted.values.dtype),
            counts.reshape(old.counts.shape),
        )


def _flat(x: mx.array) -> mx.array:
    """Flatten batch and heads into one axis."""
    return x.reshape(-1, *x.shape[2:])

"""The whole cache, as it is: what all other methods are measured against. Same bits as mlx-lm's KVCache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from mlxkv.config import Config
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.live.base import LayerCache, live_methods, unquantized
from mlxkv.spec import CacheSpec


@dataclass(frozen=True, kw_only=True)
class FullConfig(Config):
    """Nothing to set."""


@live_methods.register("full")
class FullCache(LayerCache):
    """Stores a chunk before it is attended: nothing is lost on the way, and so nothing has to be copied to join the two.

    Grows as mlx-lm's KVCache does, by steps of 256 tokens; `nbytes` counts whole steps.
    """

    config_class = FullConfig
    config: FullConfig

    state_fields = ("keys", "values")

    def __init__(self, config: FullConfig, spec: CacheSpec, layer: int) -> None:
        super().__init__(config, spec, layer)
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def buckets(self) -> list[Bucket]:
        if self.keys is None or self.values is None:
            return []
        return [(unquantized(self.keys[..., : self.offset, :]), unquantized(self.values[..., : self.offset, :]))]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        store: Any = KVCache()  # type: ignore[no-untyped-call]
        store.state = self.keys, self.values, self.offset
        super().update_and_fetch(keys, values)
        everything = store.update_and_fetch(keys, values)
        self.keys, self.values, _ = store.state
        return everything

    def absorb(self, keys: mx.array, values: mx.array, mass: mx.array | None) -> None:
        """The chunk is stored already."""

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None = None
    ) -> mx.array:
        self._chunk = None
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)

    def _trim(self, count: int) -> None:
        """The next chunk overwrites them."""

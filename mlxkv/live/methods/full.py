"""Full cache: the baseline of all other methods, bit-identical to mlx-lm's KVCache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from mlxkv.config import Config
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.live.arrays import KeysValues, unquantized
from mlxkv.live.base import LayerCache, live_methods
from mlxkv.live.checks import check_array, check_kept
from mlxkv.spec import CacheSpec


@dataclass(frozen=True, kw_only=True)
class FullConfig(Config):
    """Settings of the full cache: none."""


@live_methods.register("full")
class FullCache(LayerCache):
    """Full: every token in the model's own type.

    Unlike in other methods a chunk is stored before its attention is computed, as in mlx-lm. Since storing loses
    nothing, the result is the same, and stored tokens need not be concatenated with the chunk. The arrays grow as
    mlx-lm's KVCache does, in steps of 256 tokens; `nbytes` counts allocated steps.

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
    keys, values
        `[B, Hkv, S, D]` and `[B, Hkv, S, Dv]`, with S >= offset allocated tokens; None before the first chunk.
    """

    config_class = FullConfig
    config: FullConfig

    state_fields = ("keys", "values")
    takes_tokens_back = True
    any_use = True

    def __init__(self, config: FullConfig, spec: CacheSpec, layer: int) -> None:
        super().__init__(config, spec, layer)
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def buckets(self) -> list[Bucket]:
        """Return all tokens."""
        if self.keys is None or self.values is None:
            return []
        return [(unquantized(self.keys[..., : self.offset, :]), unquantized(self.values[..., : self.offset, :]))]

    def state_to_save(self) -> dict[str, Any]:
        """Return the tokens up to `offset`, without allocated steps and tokens that were taken back."""
        if self.keys is None or self.values is None or not self.offset:
            return {"keys": None, "values": None}
        return {"keys": self.keys[..., : self.offset, :], "values": self.values[..., : self.offset, :]}

    def check_state(self) -> None:
        """Check keys and values, then what every method has."""
        if self.keys is not None or self.values is not None:
            first, second = self.slots
            check_array(self.keys, "keys", (None, first.heads, None, first.dim))
            assert self.keys is not None
            batch, _, allocated, _ = self.keys.shape
            check_array(self.values, "values", (batch, second.heads, allocated, second.dim))
        super().check_state()
        check_kept(self, self.offset)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Store a chunk and return all tokens."""
        self._begin(keys, values)
        self.absorb(keys, values, None)
        if self._fetching:
            self._end()
        stop = self._offset
        return self.keys[:, :, :stop], self.values[:, :, :stop]  # type: ignore[index]

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Return all tokens."""
        if self.keys is None or self.values is None:
            return super().keys_and_values()
        return self.keys[..., : self.offset, :], self.values[..., : self.offset, :]

    def absorb(self, keys: mx.array, values: mx.array, mass: mx.array | None) -> None:
        """Append the chunk."""
        stop = self._offset
        start = stop - keys.shape[2]
        if self.keys is None or self.values is None or stop > self.keys.shape[2]:
            store: Any = KVCache()  # type: ignore[no-untyped-call]
            store.state = self.keys, self.values, start
            store.update_and_fetch(keys, values)
            self.keys, self.values, _ = store.state
        else:
            self.keys[:, :, start:stop] = keys
            self.values[:, :, start:stop] = values

    def _store(self, chunk: KeysValues, mass: mx.array | None) -> None:
        """Store a chunk as it is."""
        self.absorb(*chunk, mass)

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Return mlx-lm's own attention over all tokens."""
        if not self._fetching:
            self._end()
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)

    def _trim(self, count: int) -> None:
        """Do nothing: the next chunk overwrites the tokens."""

"""What methods share that keep some tokens as they are and give up the others, the same ones for all heads."""

from __future__ import annotations

from abc import abstractmethod

import mlx.core as mx
import numpy as np

from mlxkv.config import Config
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.live.base import LayerCache, copy_without_parent, to_storage_dtype, unquantized
from mlxkv.spec import CacheSpec


class SelectingCache(LayerCache):
    """Keeps tokens in the order they came, at the rotation they came with. A method adds `kept_indices`."""

    state_fields = ("tokens",)

    def __init__(self, config: Config, spec: CacheSpec, layer: int) -> None:
        super().__init__(config, spec, layer)
        self.tokens: tuple[mx.array, mx.array] | None = None

    @abstractmethod
    def kept_indices(self, count: int) -> np.ndarray:
        """Which of count tokens, the stored and then the new ones, are kept: their indices in rising order."""

    def buckets(self) -> list[Bucket]:
        return [] if self.tokens is None else [(unquantized(self.tokens[0]), unquantized(self.tokens[1]))]

    def absorb(self, keys: mx.array, values: mx.array, mass: mx.array | None) -> None:
        keys, values = to_storage_dtype(keys), to_storage_dtype(values)
        old = (keys[..., :0, :], values[..., :0, :]) if self.tokens is None else self.tokens
        keys, values = mx.concatenate([old[0], keys], axis=-2), mx.concatenate([old[1], values], axis=-2)
        kept = self.kept_indices(keys.shape[-2])
        if len(kept) < keys.shape[-2]:
            keys, values = keys[:, :, mx.array(kept)], values[:, :, mx.array(kept)]  # on a CPU far faster than mx.take
        self.tokens = keys, values

    def _trim(self, count: int) -> None:
        if self.tokens is not None:
            self.tokens = (
                copy_without_parent(self.tokens[0][..., :-count, :]),
                copy_without_parent(self.tokens[1][..., :-count, :]),
            )

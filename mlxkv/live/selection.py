"""Base class of methods that keep some tokens unchanged and evict the others, the same tokens in all heads."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import mlx.core as mx
import numpy as np

from mlxkv.config import Config
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.live.base import KeysValues, LayerCache, append_chunk
from mlxkv.spec import CacheSpec

_ENOUGH = 1024  # tokens of a text to begin with


class SelectingCache(LayerCache):
    """Base class of methods that keep some tokens unchanged, the same tokens in all heads.

    Kept tokens stay in the order of the text, and their keys keep the rotary embedding of their position in the text. A
    method implements `kept_indices`.

    Parameters
    ----------
    config
        Settings, of the method's `config_class`.
    spec
        Description of the model's cache.
    layer
        The layer's index in the model.

    Attributes
    ----------
    tokens
        The tokens kept, None before the first chunk.
    """

    state_fields = ("tokens",)
    state_types: ClassVar = {"tokens": KeysValues}

    def __init__(self, config: Config, spec: CacheSpec, layer: int) -> None:
        super().__init__(config, spec, layer)
        self.tokens: KeysValues | None = None

    @abstractmethod
    def kept_indices(self, count: int) -> np.ndarray:
        """Choose the tokens to keep.

        Parameters
        ----------
        count
            Number of candidates: the tokens kept so far, then the new ones. `offset` already includes the new ones.

        Returns
        -------
        np.ndarray
            Indices below `count` of the tokens to keep, in ascending order.
        """

    def tokens_as_large(self, tokens: int) -> int:
        """Return a text that is twice as long as one of which no more tokens are kept."""
        count = _ENOUGH
        while count < tokens and self._kept_of(count) < self._kept_of(2 * count):
            count *= 2
        return min(tokens, 2 * count)

    def _kept_of(self, count: int) -> int:
        """Return how many tokens are kept of the first chunk of a text."""
        cache = type(self)(*self._arguments)
        cache.offset = count
        return len(cache.kept_indices(count))

    def buckets(self) -> list[Bucket]:
        """Return the tokens kept."""
        return [] if self.tokens is None else [self.tokens.as_bucket()]

    def absorb(self, keys: mx.array, values: mx.array, mass: mx.array | None) -> None:
        """Append the chunk, then keep the tokens that the method chooses."""
        tokens = append_chunk(self.tokens, keys, values)
        kept = self.kept_indices(tokens.tokens)
        if len(kept) < tokens.tokens:
            # Indexing is far faster than mx.take on a CPU.
            tokens = KeysValues(*(part[:, :, mx.array(kept)] for part in tokens))
        self.tokens = tokens

    def _trim(self, count: int) -> None:
        """Drop the last tokens."""
        if self.tokens is not None:
            self.tokens = self.tokens.copy_tokens(0, -count)

"""The last tokens and nothing else: the simplest baseline, which StreamingLLM's sinks improve on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlxkv.config import Config, integer
from mlxkv.live.base import live_methods
from mlxkv.live.selection import SelectingCache


@dataclass(frozen=True, kw_only=True)
class SlidingWindowConfig(Config):
    """Settings of the sliding window.

    Parameters
    ----------
    recent
        Newest tokens that stay.
    """

    recent: int = integer(512, least=1, key="window")


@live_methods.register("sliding-window")
class SlidingWindowCache(SelectingCache):
    """Windows every layer of the model, at the tokens' own positions."""

    config_class = SlidingWindowConfig
    config: SlidingWindowConfig

    def kept_indices(self, count: int) -> np.ndarray:
        return np.arange(max(0, count - self.config.recent), count, dtype=np.int32)

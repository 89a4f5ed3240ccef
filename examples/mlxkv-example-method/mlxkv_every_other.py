"""A live method for mlxkv: the first tokens, the newest, and of those between every other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlxkv.config import Config, integer
from mlxkv.live import live_methods
from mlxkv.live.selection import SelectingCache


@dataclass(frozen=True, kw_only=True)
class EveryOtherConfig(Config):
    """Settings of every-other: the first tokens, the newest, and the step between those that stay in between."""

    sinks: int = integer(4)
    recent: int = integer(128, least=1)
    step: int = integer(2, least=1)


@live_methods.register("every-other")
class EveryOtherCache(SelectingCache):
    """Every other: the first tokens, the newest, and of those between every `step`-th."""

    config_class = EveryOtherConfig
    config: EveryOtherConfig

    def kept_indices(self, count: int) -> np.ndarray:
        """Choose among the tokens kept so far and the new ones."""
        seen = self.offset - (count - self.kept)  # before the new ones
        positions = np.concatenate([self._kept_positions(seen), np.arange(seen, self.offset)])
        return np.flatnonzero(np.isin(positions, self._kept_positions(self.offset)))

    def _kept_positions(self, seen: int) -> np.ndarray:
        """Return which of the first `seen` tokens are kept."""
        sinks, recent, step = self.config.sinks, self.config.recent, self.config.step
        tokens = np.arange(seen)
        return tokens[(tokens < sinks) | (tokens >= seen - recent) | ((tokens - sinks) % step == 0)]

"""Random: keep tokens drawn at random, as a baseline of methods that select tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlxkv.config import Config, integer
from mlxkv.errors import InputError
from mlxkv.live.base import live_methods
from mlxkv.live.checks import check_kept
from mlxkv.live.selection import SelectingCache


@dataclass(frozen=True, kw_only=True)
class RandomConfig(Config):
    """Settings of the random baseline.

    Parameters
    ----------
    tokens
        Maximal number of tokens kept, sinks and recent ones included.
    sinks
        Number of first tokens, which are always kept.
    recent
        Number of newest tokens, which are always kept.
    seed
        Seed of the draw.
    """

    tokens: int = integer(512, least=1)
    sinks: int = integer(4)
    recent: int = integer(64)
    seed: int = integer(0, most=2**63 - 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < self.sinks + self.recent:
            raise InputError(f"tokens must be at least sinks + recent: {self}")


@live_methods.register("random")
class RandomCache(SelectingCache):
    """Random: when there are too many tokens, evict random ones between the sinks and the recent tokens.

    This is the baseline that a method which selects tokens by importance has to beat. A draw depends only on the seed,
    the layer and the number of tokens seen, so a loaded cache continues exactly as the saved one would have.

    Parameters
    ----------
    config
        Settings.
    spec
        Description of the model's cache.
    layer
        The layer's index in the model.
    """

    config_class = RandomConfig
    config: RandomConfig

    def check_state(self) -> None:
        """Check what every method has, then how many tokens there are."""
        super().check_state()
        check_kept(self, min(self.offset, self.config.tokens))

    def evicted_indices(self, count: int) -> list[int]:
        """Draw the tokens to evict."""
        sinks, excess = self.config.sinks, max(0, count - self.config.tokens)
        draw = np.random.default_rng([self.config.seed, self.layer, self.offset])
        evicted = draw.choice(max(0, count - self.config.recent - sinks), excess, replace=False)
        return [sinks + index for index in evicted.tolist()]

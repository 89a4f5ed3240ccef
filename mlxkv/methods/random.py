"""Tokens drawn at random: what any method that chooses tokens by their importance has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlxkv.cache import is_whole
from mlxkv.errors import InputError
from mlxkv.methods._selection import SelectingCache

METHOD = "random"


@dataclass(frozen=True)
class Settings:
    """tokens: most that are kept. sinks, recent: first and last ones among them that always stay. seed: of the draw.
    Raises InputError for numbers that do not fit together."""

    tokens: int = 512
    sinks: int = 4
    recent: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if not all(is_whole(n) for n in (self.sinks, self.recent, self.seed)):
            raise InputError(f"sinks, recent and seed must be 0 or more: {self}")
        if not is_whole(self.tokens, least=max(1, self.sinks + self.recent)):
            raise InputError(f"tokens must be 1 or more and hold sinks and recent: {self}")


class Cache(SelectingCache):
    """Where there are too many tokens, those to give up are drawn evenly from between sinks and recent ones. A draw
    depends on the seed, the layer and the position alone, so a saved cache goes on as it would have."""

    settings: Settings

    def survivors(self, count: int) -> np.ndarray:
        tokens = np.arange(count, dtype=np.int32)
        middle = tokens[self.settings.sinks : max(self.settings.sinks, count - self.settings.recent)]
        draw = np.random.default_rng([self.settings.seed, self.layer, self.offset])
        return np.setdiff1d(tokens, draw.choice(middle, max(0, count - self.settings.tokens), replace=False))

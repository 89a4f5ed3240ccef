"""The last tokens and nothing else: the simplest baseline, which StreamingLLM's sinks improve on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlxkv.cache import is_whole
from mlxkv.errors import InputError
from mlxkv.methods._selection import SelectingCache

METHOD = "sliding-window"


@dataclass(frozen=True)
class Settings:
    """window: last tokens that stay. Raises InputError for less than 1."""

    window: int = 512

    def __post_init__(self) -> None:
        if not is_whole(self.window, least=1):
            raise InputError(f"window must be 1 or more, not {self.window!r}")


class Cache(SelectingCache):
    """Windows every layer of the model, at the tokens' own positions."""

    settings: Settings

    def survivors(self, count: int) -> np.ndarray:
        return np.arange(max(0, count - self.settings.window), count, dtype=np.int32)

"""StreamingLLM: the first tokens, which draw attention whatever they say, and a window of the last ones.

https://arxiv.org/abs/2309.17453
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlxkv.cache import is_whole
from mlxkv.errors import InputError
from mlxkv.methods._selection import SelectingCache

METHOD = "streaming-llm"


@dataclass(frozen=True)
class Settings:
    """sinks: first tokens that stay for ever. window: last tokens that stay. Raises InputError for impossible ones."""

    sinks: int = 4
    window: int = 508

    def __post_init__(self) -> None:
        if not is_whole(self.sinks) or not is_whole(self.window, least=1):
            raise InputError(f"sinks must be 0 or more and window 1 or more, not {self.sinks!r} and {self.window!r}")


class Cache(SelectingCache):
    """Departs from the paper in positions: tokens keep the rotation of their place in the text, where the paper rotates
    them by their place in the cache. So nothing is rotated again, and texts longer than the model was trained for are
    not made possible by this."""

    settings: Settings

    def survivors(self, count: int) -> np.ndarray:
        sinks, window = self.settings.sinks, self.settings.window
        tokens = np.arange(count, dtype=np.int32)
        return tokens[(tokens < sinks) | (tokens >= count - window)]

"""StreamingLLM: the first tokens and the newest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlxkv.config import Config, integer
from mlxkv.live.base import live_methods
from mlxkv.live.selection import SelectingCache


@dataclass(frozen=True, kw_only=True)
class StreamingLLMConfig(Config):
    """Settings of StreamingLLM.

    Parameters
    ----------
    sinks
        First tokens, which always stay.
    recent
        Newest tokens that stay.
    """

    sinks: int = integer(4)
    recent: int = integer(508, least=1, key="window")


@live_methods.register("streaming-llm")
class StreamingLLMCache(SelectingCache):
    """StreamingLLM: the first tokens stay, since models attend to them whatever they say, and the newest; others go.

    Parameters
    ----------
    config
        Settings.
    spec
        Description of the model's cache.
    layer
        The layer's index in the model.

    Notes
    -----
    https://arxiv.org/abs/2309.17453. Departs from the paper in positions: tokens keep the rotation of their position in
    the text, where the paper rotates them for their index in the cache. So nothing is rotated again, and texts longer
    than the model was trained for are not made possible.
    """

    config_class = StreamingLLMConfig
    config: StreamingLLMConfig

    def kept_indices(self, count: int) -> np.ndarray:
        """Choose the first tokens and the newest."""
        sinks, recent = self.config.sinks, self.config.recent
        tokens = np.arange(count, dtype=np.int32)
        return tokens[(tokens < sinks) | (tokens >= count - recent)]

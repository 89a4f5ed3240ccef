"""StreamingLLM: the first tokens, which draw attention whatever they say, and a window of the last ones.

https://arxiv.org/abs/2309.17453
"""

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
        First tokens that stay for ever.
    recent
        Newest tokens that stay.
    """

    sinks: int = integer(4)
    recent: int = integer(508, least=1, key="window")


@live_methods.register("streaming-llm")
class StreamingLLMCache(SelectingCache):
    """Departs from the paper in positions: tokens keep the rotation of their place in the text, where the paper rotates
    them by their place in the cache. So nothing is rotated again, and texts longer than the model was trained for are
    not made possible by this."""

    config_class = StreamingLLMConfig
    config: StreamingLLMConfig

    def kept_indices(self, count: int) -> np.ndarray:
        sinks, recent = self.config.sinks, self.config.recent
        tokens = np.arange(count, dtype=np.int32)
        return tokens[(tokens < sinks) | (tokens >= count - recent)]

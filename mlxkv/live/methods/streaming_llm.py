"""StreamingLLM: the first and the newest tokens."""

from __future__ import annotations

from dataclasses import dataclass

from mlxkv.config import Config, integer
from mlxkv.live.base import live_methods
from mlxkv.live.ring import RingCache
from mlxkv.spec import CacheSpec


@dataclass(frozen=True, kw_only=True)
class StreamingLLMConfig(Config):
    """Settings of StreamingLLM.

    Parameters
    ----------
    sinks
        Number of first tokens that are kept.
    recent
        Number of newest tokens that are kept.
    """

    sinks: int = integer(4)
    recent: int = integer(508, least=1, key="window")


@live_methods.register("streaming-llm")
class StreamingLLMCache(RingCache):
    """StreamingLLM: keep the first tokens and the newest, evict all others.

    Models give much attention to the first tokens of a text, whatever these are: they act as attention sinks. Keeping a
    few of them beside a window of the newest tokens keeps the attention distribution stable.

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
    Paper: "Efficient Streaming Language Models with Attention Sinks", https://arxiv.org/abs/2309.17453. There is one
    departure. Keys keep the rotary embedding of their position in the text, while the paper uses their index in the
    cache. So keys are not rotated again, but the method does not extend a model beyond its trained context length.
    """

    config_class = StreamingLLMConfig
    config: StreamingLLMConfig

    def __init__(self, config: StreamingLLMConfig, spec: CacheSpec, layer: int) -> None:
        super().__init__(config, spec, layer)
        self.sinks = config.sinks

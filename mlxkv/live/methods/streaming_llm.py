"""StreamingLLM: the first and the newest tokens."""

from __future__ import annotations

from dataclasses import dataclass

from mlxkv.config import Config, integer
from mlxkv.live.base import live_methods
from mlxkv.live.checks import check_kept
from mlxkv.live.selection import SelectingCache


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
class StreamingLLMCache(SelectingCache):
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

    def check_state(self) -> None:
        """Check what every method has, then how many tokens there are."""
        super().check_state()
        check_kept(self, min(self.offset, self.config.sinks + self.config.recent))

    def evicted_indices(self, count: int) -> range:
        """Choose the tokens between the first and the newest."""
        return range(self.config.sinks, count - self.config.recent)

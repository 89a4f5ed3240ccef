"""Sliding window: the newest tokens and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from mlxkv.config import Config, integer
from mlxkv.live.base import live_methods
from mlxkv.live.ring import RingCache


@dataclass(frozen=True, kw_only=True)
class SlidingWindowConfig(Config):
    """Settings of the sliding window.

    Parameters
    ----------
    recent
        Number of newest tokens that are kept.
    """

    recent: int = integer(512, least=1, key="window")


@live_methods.register("sliding-window")
class SlidingWindowCache(RingCache):
    """Sliding window: every layer keeps only the newest tokens, at their positions in the text.

    The simplest baseline; StreamingLLM (https://arxiv.org/abs/2309.17453) improves on it by keeping the first tokens.

    Parameters
    ----------
    config
        Settings.
    spec
        Description of the model's cache.
    layer
        The layer's index in the model.
    """

    config_class = SlidingWindowConfig
    config: SlidingWindowConfig

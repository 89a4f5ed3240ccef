"""Sketch top-k: the first tokens, those with most attention by a fading sketch, and the newest."""

from __future__ import annotations

from dataclasses import dataclass

from mlxkv.live.base import live_methods
from mlxkv.live.sketching import SketchConfig, SketchingCache


@dataclass(frozen=True, kw_only=True)
class SketchTopKConfig(SketchConfig):
    """Settings of sketch-topk: those of all sketch methods."""


@live_methods.register("sketch-topk")
class SketchTopKCache(SketchingCache):
    """Sketch top-k: H2O with a sketch of attention in place of a counter for each token. Other tokens are evicted.

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
    H2O is https://arxiv.org/abs/2306.14048. This departs from it in the sketch, in attention that fades, in first
    tokens that always stay, and in whole intervals that leave the newest tokens together.

    The sketch saves nothing here: to find a heavy token in it takes its position, 4 bytes, and an exact counter would
    take no more. It pays where all of a long text's tokens are counted, for it is smaller than exact counters of more
    than width * depth tokens.
    """

    config_class = SketchTopKConfig
    config: SketchTopKConfig

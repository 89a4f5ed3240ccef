"""Sketch top-k: the first tokens, those with most attention by a sketch that fades, and the newest."""

from __future__ import annotations

from dataclasses import dataclass

from mlxkv.live.base import live_methods
from mlxkv.live.sketching import SketchConfig, SketchingCache


@dataclass(frozen=True, kw_only=True)
class SketchTopKConfig(SketchConfig):
    """Settings of sketch-topk: those of all sketch methods."""


@live_methods.register("sketch-topk")
class SketchTopKCache(SketchingCache):
    """Sketch top-k: H2O with a sketch of attention in place of one counter per token.

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
    H2O is https://arxiv.org/abs/2306.14048. There are four departures: attention is counted in a sketch; it fades; the
    first tokens always stay; and tokens leave the tail of newest tokens in groups of `interval`.

    The sketch saves no memory here: each heavy token's position must be stored to query the sketch, 4 bytes, as much as
    an exact counter. A sketch saves memory only if it counts more than width * depth tokens, evicted ones included.
    """

    config_class = SketchTopKConfig
    config: SketchTopKConfig

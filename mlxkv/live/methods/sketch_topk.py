"""Sketch top-k: the first tokens, those that a sketch of past attention has heaviest, and a window of the last."""

from __future__ import annotations

from dataclasses import dataclass

from mlxkv.live.base import live_methods
from mlxkv.live.sketching import SketchConfig, SketchingCache


@dataclass(frozen=True, kw_only=True)
class SketchTopKConfig(SketchConfig):
    """Settings of sketch-topk: those of all sketch methods."""


@live_methods.register("sketch-topk")
class SketchTopKCache(SketchingCache):
    """H2O (https://arxiv.org/abs/2306.14048) with a sketch where that has a counter a token, with decay, with first tokens
    that always stay, and with whole intervals that leave the window. Tokens that are not heavy are given up.

    The sketch saves nothing here: to find a heavy token in it takes its position, 4 bytes, and an exact counter would be
    no more. It pays where all of a long text's tokens are counted: it is smaller than exact counters of more than
    width * depth tokens.
    """

    config_class = SketchTopKConfig
    config: SketchTopKConfig

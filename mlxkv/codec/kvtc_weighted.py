"""KVTC as published, but for the weights of `kvtc-rd`: its dynamic programme then minimises what the model notices.

For a fixed rate where squared error is the wrong guide; `kvtc-rd` needs fewer bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxkv.cache import STREAMS
from mlxkv.codec import kvtc, weighting
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.plan import Plan
from mlxkv.codec.samples import Samples
from mlxkv.errors import FormatError

METHOD = "kvtc-weighted"
explain, facts = kvtc.explain, kvtc.facts


@dataclass(frozen=True)
class Settings(kvtc.Settings):
    """As those of `kvtc`; the dumps need a sensitivity."""


@dataclass(frozen=True)
class StreamArtifacts:
    """mu, V, plan: as those of `kvtc`, of weighted rows. weights: `[heads, D, D]` float32, heads of all layers."""

    mu: np.ndarray
    V: np.ndarray
    plan: Plan
    weights: np.ndarray

    def __post_init__(self) -> None:
        kvtc.StreamArtifacts(self.mu, self.V, self.plan)  # checks itself
        heads, dim = self.weights.shape[:2] if self.weights.ndim == 3 else (0, 0)
        fits = self.weights.shape == (heads, dim, dim) and heads * dim == self.mu.size
        if not fits or self.weights.dtype != np.float32 or not np.isfinite(self.weights).all():
            raise FormatError(f"weights {self.weights.dtype} {self.weights.shape} do not fit rows of {self.mu.size}")

    @property
    def width(self) -> int:
        """Of the rows that it codes."""
        return self.mu.size


class Coder(kvtc.Coder):
    """That of `kvtc` between weighting and its inverse."""

    def __init__(self, artifacts: CalibrationArtifacts) -> None:
        super().__init__(artifacts)
        self._weights = {name: artifacts.stream(name).weights for name in STREAMS}
        self._inverse = {name: weighting.inverse(weights) for name, weights in self._weights.items()}

    def encode(self, rows: Mapping[str, mx.array], quality: float | None) -> dict[str, bytes]:
        """As `kvtc.Coder.encode`."""
        return super().encode({name: weighting.weighted(x, self._weights[name]) for name, x in rows.items()}, quality)

    def decode(self, codes: Mapping[str, bytes], tokens: int, quality: float | None) -> dict[str, mx.array]:
        """As `kvtc.Coder.decode`."""
        rows = super().decode(codes, tokens, quality)
        return {name: weighting.weighted(x, self._inverse[name]) for name, x in rows.items()}


def train(samples: Samples, settings: Settings) -> dict[str, StreamArtifacts]:
    """Weights, and what `kvtc` learns of weighted rows."""
    weights, _ = weighting.learn(samples, foretell=False)
    nothing = np.zeros((0, 0, 0), np.float32)
    parts = {"v": StreamArtifacts(np.zeros(0, np.float32), np.zeros((0, 0), np.float16), Plan(), nothing)}
    for name, of_heads in weights.items():
        of_heads = of_heads.astype(np.float32)
        rows = np.array(weighting.weighted(mx.array(samples.rows(name)), of_heads))
        part = kvtc.train_stream(rows, name, settings, samples.progress)
        parts[name] = StreamArtifacts(part.mu, part.V, part.plan, of_heads)
    return parts

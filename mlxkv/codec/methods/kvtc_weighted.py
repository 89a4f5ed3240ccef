"""KVTC as published, but for the weights of `kvtc-rd`: its dynamic programme then minimises what the model notices.

For a fixed rate where squared error is the wrong guide; `kvtc-rd` needs fewer bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxkv.codec.methods import kvtc
from mlxkv.codec.methods.base import CodecConfig, CodecMethod, StreamArtifacts, codec_methods, streams_of
from mlxkv.codec.samples import Samples
from mlxkv.codec.stages import weighting
from mlxkv.codec.stages.plan import Plan
from mlxkv.errors import FormatError


@dataclass(frozen=True)
class KVTCWeightedConfig(kvtc.KVTCConfig):
    """As those of `kvtc`; the dumps need a sensitivity."""


@dataclass(frozen=True)
class KVTCWeightedStream(StreamArtifacts):
    """mu, V, plan: as those of `kvtc`, of weighted rows. weights: `[heads, D, D]` float32, heads of all layers."""

    mu: np.ndarray
    V: np.ndarray
    plan: Plan
    weights: np.ndarray

    def __post_init__(self) -> None:
        kvtc.KVTCStream(self.mu, self.V, self.plan)  # checks itself
        heads, dim = self.weights.shape[:2] if self.weights.ndim == 3 else (0, 0)
        fits = self.weights.shape == (heads, dim, dim) and heads * dim == self.mu.size
        if not fits or self.weights.dtype != np.float32 or not np.isfinite(self.weights).all():
            raise FormatError(f"weights {self.weights.dtype} {self.weights.shape} do not fit rows of {self.mu.size}")

    @property
    def width(self) -> int:
        """Of the rows that it codes."""
        return self.mu.size


class KVTCWeightedCoder(kvtc.KVTCCoder):
    """That of `kvtc` between weighting and its inverse."""

    def __init__(self, streams: Mapping[str, KVTCWeightedStream]) -> None:
        super().__init__({name: kvtc.KVTCStream(part.mu, part.V, part.plan) for name, part in streams.items()})
        self._weights = {name: part.weights for name, part in streams.items()}
        self._inverse = {name: weighting.invert_weights(weights) for name, weights in self._weights.items()}

    def encode(self, rows: Mapping[str, mx.array], quality: float | None) -> dict[str, np.ndarray]:
        """As `kvtc.Coder.encode`."""
        return super().encode(
            {name: weighting.apply_weights(x, self._weights[name]) for name, x in rows.items()}, quality
        )

    def decode(self, codes: Mapping[str, np.ndarray], tokens: int, quality: float | None) -> dict[str, mx.array]:
        """As `kvtc.Coder.decode`."""
        rows = super().decode(codes, tokens, quality)
        return {name: weighting.apply_weights(x, self._inverse[name]) for name, x in rows.items()}


@codec_methods.register("kvtc-weighted")
class KVTCWeighted(CodecMethod):
    """`kvtc` between weighting and its inverse."""

    config_class = KVTCWeightedConfig
    artifacts_class = KVTCWeightedStream

    def train(self, samples: Samples, config: CodecConfig) -> dict[str, KVTCWeightedStream]:
        """Weights, and what `kvtc` learns of weighted rows."""
        assert isinstance(config, KVTCWeightedConfig)
        weights, _ = weighting.learn_weights(samples, predict_attention=False)
        nothing = np.zeros((0, 0, 0), np.float32)
        parts = {"v": KVTCWeightedStream(np.zeros(0, np.float32), np.zeros((0, 0), np.float16), Plan(), nothing)}
        for name, of_heads in weights.items():
            of_heads = of_heads.astype(np.float32)
            rows = np.array(weighting.apply_weights(mx.array(samples.rows(name)), of_heads))
            part = kvtc.train_stream(rows, name, config, samples.progress)
            parts[name] = KVTCWeightedStream(part.mu, part.V, part.plan, of_heads)
        return parts

    def coder(self, streams: Mapping[str, StreamArtifacts]) -> KVTCWeightedCoder:
        return KVTCWeightedCoder(streams_of(KVTCWeightedStream, streams))

    def facts(self, streams: Mapping[str, StreamArtifacts]) -> dict[str, Any]:
        return kvtc.plan_ranks(streams_of(KVTCWeightedStream, streams))

    def explain(self, streams: Mapping[str, StreamArtifacts], meta: Mapping[str, Any]) -> dict[str, Any]:
        return kvtc.explain_plans(streams_of(KVTCWeightedStream, streams), meta)

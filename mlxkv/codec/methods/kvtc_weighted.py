"""KVTC as published, applied to rows that are multiplied by the sensitivity weights of `kvtc-rd`.

The weights make equal squared errors about equally harmful to the model's predictions, so the dynamic programme of KVTC
minimises that harm instead of plain squared error. Decoding multiplies by the inverse weights. The rate is fixed in
calibration, as with `kvtc`; at equal fidelity `kvtc-rd` needs fewer bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxkv.codec.methods import kvtc
from mlxkv.codec.methods.base import (
    CodecConfig,
    CodecMethod,
    StreamArtifacts,
    checked_config,
    checked_streams,
    codec_methods,
)
from mlxkv.codec.samples import Samples
from mlxkv.codec.stages import weighting
from mlxkv.codec.stages.plan import Plan
from mlxkv.errors import FormatError
from mlxkv.spec import STREAMS


@dataclass(frozen=True)
class KVTCWeightedConfig(kvtc.KVTCConfig):
    """Settings of the `kvtc-weighted` method: those of `kvtc`. At least one dump needs a sensitivity."""


@dataclass(frozen=True)
class KVTCWeightedStream(StreamArtifacts):
    """Artifacts of one stream.

    Parameters
    ----------
    mu, V, plan
        Mean, basis and bit plan of weighted rows, as in `KVTCStream`.
    weights
        One symmetric matrix per head of each layer, `[layers * H, D, D]` float32.

    Raises
    ------
    FormatError
        When the parts do not belong together.
    """

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
        """Width p of the rows."""
        return self.mu.size


class KVTCWeightedCoder(kvtc.KVTCCoder):
    """Coder of `kvtc` for weighted rows: weights are applied before encoding and undone after decoding.

    Parameters
    ----------
    streams
        Artifacts of "k" and "v".
    """

    def __init__(self, streams: Mapping[str, KVTCWeightedStream]) -> None:
        super().__init__({name: kvtc.KVTCStream(part.mu, part.V, part.plan) for name, part in streams.items()})
        self._weights = {name: part.weights for name, part in streams.items()}
        self._inverse = {name: weighting.invert_weights(weights) for name, weights in self._weights.items()}

    def encode(self, rows: Mapping[str, mx.array], quality: float | None) -> dict[str, np.ndarray]:
        """Return each stream's weighted rows as packed groups, uint8."""
        return super().encode(
            {name: weighting.apply_weights(x, self._weights[name]) for name, x in rows.items()}, quality
        )

    def decode(self, codes: Mapping[str, np.ndarray], tokens: int, quality: float | None) -> dict[str, mx.array]:
        """Return each stream's rows from their packed groups, with the weights undone."""
        rows = super().decode(codes, tokens, quality)
        return {name: weighting.apply_weights(x, self._inverse[name]) for name, x in rows.items()}


@codec_methods.register("kvtc-weighted")
class KVTCWeighted(CodecMethod):
    """The `kvtc` method applied to sensitivity-weighted rows."""

    config_class = KVTCWeightedConfig
    artifacts_class = KVTCWeightedStream

    def train(self, samples: Samples, config: CodecConfig) -> dict[str, KVTCWeightedStream]:
        """Learn the weights, then a mean, a basis and a plan from weighted rows."""
        config = checked_config(KVTCWeightedConfig, config)
        weights, _ = weighting.learn_weights(samples, predict_attention=False)
        parts = dict.fromkeys(STREAMS, _EMPTY)
        for name, head_weights in weights.items():
            head_weights = head_weights.astype(np.float32)
            rows = np.array(weighting.apply_weights(mx.array(samples.rows(name)), head_weights))
            part = kvtc.train_stream(rows, name, config, samples.progress)
            parts[name] = KVTCWeightedStream(part.mu, part.V, part.plan, head_weights)
        return parts

    def coder(self, streams: Mapping[str, StreamArtifacts]) -> KVTCWeightedCoder:
        """Return a `KVTCWeightedCoder`."""
        return KVTCWeightedCoder(checked_streams(KVTCWeightedStream, streams))

    def tokens_needed(self, streams: Mapping[str, StreamArtifacts], config: CodecConfig) -> int:
        """Return the number of components of the stream that has more of them."""
        checked = checked_config(kvtc.KVTCConfig, config)
        return max(min(part.width, checked.components(part.width)) for part in streams.values())

    def facts(self, streams: Mapping[str, StreamArtifacts]) -> dict[str, Any]:
        """Return the plans' ranks."""
        return kvtc.plan_ranks(checked_streams(KVTCWeightedStream, streams))

    def explain(self, streams: Mapping[str, StreamArtifacts], meta: Mapping[str, Any]) -> dict[str, Any]:
        """Describe the plans."""
        return kvtc.explain_plans(checked_streams(KVTCWeightedStream, streams), meta)


_EMPTY = KVTCWeightedStream(
    np.zeros(0, np.float32), np.zeros((0, 0), np.float16), Plan(), np.zeros((0, 0, 0), np.float32)
)

"""The published KVTC (arXiv 2511.01815): groups of principal components, bits by dynamic programming.

    rows [n, p] --minus mean, times basis--> coefficients [r, n] --groups, shift and scale--> codes --> lossless stage

A calibration serves one compression ratio. Each group of each token has its own shift (an offset) and scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cache
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlxkv.codec.methods.base import (
    BlockCoder,
    CodecConfig,
    CodecMethod,
    StreamArtifacts,
    checked_config,
    checked_streams,
    codec_methods,
)
from mlxkv.codec.samples import Progress, Samples
from mlxkv.codec.stages.payload import decode_block, encode_block, payload_size
from mlxkv.codec.stages.pca import principal_components
from mlxkv.codec.stages.plan import CODED_TYPES, GROUP_SIZES, Plan, allocate_bits
from mlxkv.codec.stages.quantize import quantization_round_trip
from mlxkv.codec.stages.weighting import MAX_MEAN, within
from mlxkv.config import integer, number
from mlxkv.errors import FormatError, InputError
from mlxkv.spec import STREAMS, is_int

MAX_DEFAULT_RANK = 4096
MIN_RATIO = 0.01  # allows far more bits than any cache needs
MAX_ERROR_TOKENS = 512  # tokens that quantization errors of groups are measured on, at most


@dataclass(frozen=True)
class KVTCConfig(CodecConfig):
    """Settings of the `kvtc` method.

    Parameters
    ----------
    compression_ratio
        Sets the bit budget: 16 * p / ratio bits per token for a stream of width p; at least 0.01.
    rank
        Number of principal components to learn; None for one per two bits of the budget, at most MAX_DEFAULT_RANK.
    max_bit_budget
        Most bits per token and stream; None for no further bound.
    samples_per_file
        Most tokens to use per dump, evenly spaced; None for all.
    sinks
        First tokens of each dump excluded from training; 0 or more.
    seed
        Seed of all random numbers in calibration.

    Examples
    --------
    >>> config = KVTCConfig(compression_ratio=8)
    >>> config.budget(width=96), config.components(width=96)
    (192, 96)
    """

    compression_ratio: float = number(least=MIN_RATIO)
    _: KW_ONLY
    rank: int | None = integer(None, least=1)
    max_bit_budget: int | None = integer(None, least=1)

    def budget(self, width: int) -> int:
        """Return the bit budget of a stream.

        Parameters
        ----------
        width
            Width p of its rows.

        Returns
        -------
        int
            Bits per token.
        """
        bits = int(16 * width / self.compression_ratio)
        return min(bits, self.max_bit_budget or bits)

    def components(self, width: int) -> int:
        """Return the number of principal components to learn.

        Parameters
        ----------
        width
            Width p of the stream's rows.

        Returns
        -------
        int
            Number of components; calibration may find fewer.
        """
        return self.rank or max(1, min(self.budget(width) // 2, MAX_DEFAULT_RANK))


@dataclass(frozen=True)
class KVTCStream(StreamArtifacts):
    """Artifacts of one stream.

    Parameters
    ----------
    mu
        Mean row `[p]` float32.
    V
        Basis `[p, r]` float16 with orthonormal columns; r is the number of components that the plan covers.
    plan
        Groups of components and their types.

    Raises
    ------
    FormatError
        When the parts do not belong together or are not finite, or the plan codes nothing.
    """

    mu: np.ndarray
    V: np.ndarray
    plan: Plan

    def __post_init__(self) -> None:
        if self.mu.ndim != 1 or self.V.ndim != 2 or self.V.shape != (self.mu.size, self.plan.rank):
            raise FormatError(
                f"artifacts disagree: mean {self.mu.shape}, basis {self.V.shape}, plan of rank {self.plan.rank}"
            )
        if self.mu.dtype != np.float32 or self.V.dtype != np.float16:
            raise FormatError(f"expected a float32 mean and a float16 basis, found {self.mu.dtype} and {self.V.dtype}")
        if self.plan.rank > self.mu.size:
            raise FormatError(f"artifacts disagree: {self.plan.rank} components of rows {self.mu.size} wide")
        if not (within(self.mu, MAX_MEAN) and np.isfinite(self.V).all()):
            raise FormatError("the mean or the basis has NaN, infinite or enormous values: calibrate again")
        if self.mu.size and not self.plan.bits:
            raise FormatError("the plan codes nothing: calibrate with a lower compression ratio")

    @property
    def width(self) -> int:
        """Width p of the rows."""
        return self.mu.size


class KVTCCoder(BlockCoder):
    """Coder of blocks with a mean, a basis and a bit plan.

    Parameters
    ----------
    streams
        Artifacts of "k" and "v".
    """

    uses_lossless_stage = True

    def __init__(self, streams: Mapping[str, KVTCStream]) -> None:
        self._parts = dict(streams)
        # Cached on the coder: the float32 basis is made on first use and freed with the coder.
        self._basis = cache(lambda name: mx.array(self._parts[name].V).astype(mx.float32))
        self._size = cache(lambda name, tokens: payload_size(self._parts[name].plan, tokens))

    def check_quality(self, quality: object) -> None:
        """Refuse any quality: the ratio was chosen in calibration."""
        if quality is not None:
            raise InputError(f"kvtc has the one ratio that it was calibrated for, and no quality {quality!r}")

    def encode(self, rows: Mapping[str, mx.array], quality: float | None) -> dict[str, np.ndarray]:
        """Return each stream's rows as packed groups, uint8."""
        return {name: np.frombuffer(self._payload(name, x), np.uint8) for name, x in rows.items()}

    def _payload(self, name: str, rows: mx.array) -> bytes:
        """Return the packed groups of one stream's rows."""
        part = self._parts[name]
        return encode_block(part.plan, self._basis(name).T @ (rows - mx.array(part.mu)).T)

    def pack(self, name: str, codes: np.ndarray) -> bytes:
        """Return the packed groups as they are."""
        return codes.tobytes()

    def estimate(self, name: str, codes: np.ndarray) -> float:
        """Return the bytes before the lossless stage: an upper bound of what is stored."""
        return float(codes.nbytes)

    def is_size(self, name: str, tokens: int, size: int, coding: str) -> bool:
        """Check that the size is exactly what the plan gives for n rows."""
        return bool(size == self._size(name, tokens))

    def unpack(self, blocks: Sequence[Mapping[str, bytes]], tokens: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """Return the packed groups as arrays."""
        return [{name: np.frombuffer(data, np.uint8) for name, data in block.items()} for block in blocks]

    def decode(self, codes: Mapping[str, np.ndarray], tokens: int, quality: float | None) -> dict[str, mx.array]:
        """Return each stream's rows from their packed groups."""
        return {
            name: decode_block(self._parts[name].plan, data.tobytes(), tokens).T @ self._basis(name).T
            + mx.array(self._parts[name].mu)
            for name, data in codes.items()
        }


@codec_methods.register("kvtc")
class KVTC(CodecMethod):
    """The published method."""

    config_class = KVTCConfig
    artifacts_class = KVTCStream

    def train(self, samples: Samples, config: CodecConfig) -> dict[str, KVTCStream]:
        """Learn a mean, a basis and a plan for each stream in turn, so that memory holds the rows of one stream."""
        config = checked_config(KVTCConfig, config)
        return {
            name: train_stream(samples.rows(name), name, config, samples.progress)
            if samples.stream(name).width
            else KVTCStream(np.zeros(0, np.float32), np.zeros((0, 0), np.float16), Plan())
            for name in STREAMS
        }

    def coder(self, streams: Mapping[str, StreamArtifacts]) -> KVTCCoder:
        """Return a `KVTCCoder`."""
        return KVTCCoder(checked_streams(KVTCStream, streams))

    def tokens_needed(self, streams: Mapping[str, StreamArtifacts], config: CodecConfig) -> int:
        """Return the number of components of the stream that has more of them."""
        checked = checked_config(KVTCConfig, config)
        return max(min(part.width, checked.components(part.width)) for part in streams.values())

    def facts(self, streams: Mapping[str, StreamArtifacts]) -> dict[str, Any]:
        """Return the plans' ranks."""
        return plan_ranks(checked_streams(KVTCStream, streams))

    def explain(self, streams: Mapping[str, StreamArtifacts], meta: Mapping[str, Any]) -> dict[str, Any]:
        """Describe the plans."""
        return explain_plans(checked_streams(KVTCStream, streams), meta)


class _HasPlan(Protocol):
    """Artifacts with a plan: those of `kvtc` and `kvtc-weighted`."""

    @property
    def plan(self) -> Plan: ...

    @property
    def width(self) -> int: ...


def plan_ranks(streams: Mapping[str, _HasPlan]) -> dict[str, Any]:
    """Return the number of components that the plan of each stream covers.

    Parameters
    ----------
    streams
        Artifacts with a plan.

    Returns
    -------
    dict
        `plan_rank`, by stream.
    """
    return {"plan_rank": {name: part.plan.rank for name, part in streams.items()}}


def explain_plans(streams: Mapping[str, _HasPlan], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Describe how each stream uses its bit budget, with advice when the rank rather than the budget was the limit.

    Parameters
    ----------
    streams
        Artifacts with a plan.
    meta
        The contents of meta.json.

    Returns
    -------
    dict
        Values by label.

    Raises
    ------
    InputError
        When meta holds settings that are out of range.
    FormatError
        When it holds no number of tokens.
    """
    facts: dict[str, Any] = {"compression_ratio": meta.get("compression_ratio")}
    limited = []
    for name in STREAMS:
        part = streams[name]
        facts |= {f"{name}_width": part.width, f"{name}_bits_per_token": part.plan.bits}
        facts |= {f"{name}_components": part.plan.rank, f"{name}_plan": _describe_plan(part.plan)}
        try:
            config = KVTCConfig.from_dict({key: meta[key] for key in KVTCConfig.stored_keys().values()})
            tokens = meta["calibration_tokens"]
            if not is_int(tokens):
                raise FormatError(f"artifacts are made from a number of tokens, not {str(tokens)[:80]!r}")
        except KeyError:  # artifacts that were not made by `calibrate`
            continue
        budget = config.budget(part.width)
        unspent = budget - part.plan.bits
        facts |= {f"{name}_bit_budget": budget, f"{name}_unspent_bits": unspent}
        # No more components exist, whatever the rank.
        directions = min(part.width, tokens - 1)
        if unspent > budget / 10 and part.plan.rank == config.components(part.width) < directions:
            limited.append(name)
    if limited:
        facts["advice"] = f"raise --rank: it, not the bit budget, limits {' and '.join(limited)}"
    return facts


def _describe_plan(plan: Plan) -> str:
    """Return a plan in one line."""
    return " | ".join(f"{run.count} x {run.size} {run.kind}" for run in plan.runs()) or "nothing is coded"


def train_stream(rows: np.ndarray, name: str, config: KVTCConfig, progress: Progress) -> KVTCStream:
    """Learn a mean, a basis and a plan from rows, which are centred in place.

    Parameters
    ----------
    rows
        Rows `[N, p]` float32.
    name
        "k" or "v", for messages.
    config
        Settings.
    progress
        Called with the name of each step as it starts.

    Returns
    -------
    KVTCStream
        The artifacts.

    Raises
    ------
    InputError
        When the bits cannot code a single component.
    """
    budget, rank = config.budget(rows.shape[1]), config.components(rows.shape[1])
    progress(f"principal components of {name}: {rows.shape[0]} tokens x {rows.shape[1]}")
    mean, basis = principal_components(rows, rank, config.seed)
    progress(f"bit plan of {name}: {budget} bits per token")
    coefficients = rows @ basis
    sampled = coefficients[:: -(-len(coefficients) // MAX_ERROR_TOKENS)]
    energy = np.square(coefficients, dtype=np.float64).mean(axis=0)
    plan = allocate_bits(energy, group_errors(sampled), budget)
    if not plan.groups:
        raise InputError(
            f"{budget} bits per token cannot code a single component of {name}; lower the compression ratio"
        )
    return KVTCStream(mean, basis[:, : plan.rank].astype(np.float16), plan)


def group_errors(coefficients: np.ndarray) -> dict[tuple[int, str], np.ndarray]:
    """Measure the mean squared error per token of quantizing each possible group of components.

    Parameters
    ----------
    coefficients
        Coefficients `[n, r]` of sampled tokens.

    Returns
    -------
    dict
        Errors `[r - size + 1]` by (size, type), indexed by the group's first component.

    Notes
    -----
    Groups are quantized at every first component. Neighbouring groups overlap almost completely, so sizes above 16 are
    measured at every (size / 16)-th first component and interpolated between.
    """
    tokens, rank = coefficients.shape
    table = {}
    for size in (size for size in GROUP_SIZES if size <= rank):
        starts = np.unique(np.r_[0 : rank - size + 1 : max(1, size // 16), rank - size])
        windows = np.lib.stride_tricks.sliding_window_view(coefficients, size, axis=1).transpose(1, 2, 0)
        step = max(1, 2**23 // (tokens * size))
        batches = [mx.array(windows[starts[a : a + step]]) for a in range(0, len(starts), step)]
        for kind in CODED_TYPES:
            errors = np.concatenate([_mean_error(batch, kind) for batch in batches])
            table[size, kind] = np.interp(np.arange(rank - size + 1), starts, errors)
    return table


def _mean_error(windows: mx.array, kind: str) -> np.ndarray:
    """Return the mean squared error per token of each group `[groups, size, n]`."""
    difference = quantization_round_trip(windows, kind) - windows
    return np.array(mx.square(difference).sum(axis=1).mean(axis=1), dtype=np.float64)

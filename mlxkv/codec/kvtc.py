"""The published KVTC (arXiv 2511.01815): principal components in groups, whose bits a dynamic programme hands out.

One calibration, one ratio. Every token's group has a shift and a scale of its own; the lossless stage comes last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlxkv.cache import STREAMS, is_whole
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.payload import decode_block, encode_block, payload_size
from mlxkv.codec.pca import principal_components
from mlxkv.codec.plan import CODED, SIZES, Plan, allocate
from mlxkv.codec.quantize import coded
from mlxkv.codec.samples import Progress, Samples
from mlxkv.errors import FormatError, InputError

METHOD = "kvtc"
MAX_DEFAULT_RANK = 4096
MIN_RATIO = 0.01  # far more bits than any cache has
MAX_ERROR_TOKENS = 512  # tokens that group errors are measured on


@dataclass(frozen=True)
class Settings:
    """How the `kvtc` method is calibrated.

    compression_ratio: sets the bit budget, 16 * p / ratio bits a token for a stream of width p, and max_bit_budget
    bounds it. rank: components considered; None stands for one in every two bits of the budget, at most
    MAX_DEFAULT_RANK.
    s: sink tokens of each file to leave out. samples_per_file: at most so many tokens of a file, spread evenly.
    """

    compression_ratio: float
    rank: int | None = None
    max_bit_budget: int | None = None
    samples_per_file: int | None = None
    s: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        ratio = self.compression_ratio
        if type(ratio) not in (int, float) or not MIN_RATIO <= ratio < math.inf:
            raise InputError(f"the compression ratio must be a number above 0, not {ratio!r}")
        for name in ("rank", "max_bit_budget", "samples_per_file"):
            value = getattr(self, name)
            if value is not None and not is_whole(value, least=1):
                raise InputError(f"{name} must be 1 or more, not {value!r}")
        if not is_whole(self.s) or not is_whole(self.seed):
            raise InputError(f"s and seed must be 0 or more, not {self.s!r} and {self.seed!r}")

    def budget(self, width: int) -> int:
        """Bits a token for a stream of this width."""
        bits = int(16 * width / self.compression_ratio)
        return min(bits, self.max_bit_budget or bits)

    def components(self, width: int) -> int:
        """Principal components to consider for a stream of this width, if there are so many."""
        return self.rank or max(1, min(self.budget(width) // 2, MAX_DEFAULT_RANK))


@dataclass(frozen=True)
class StreamArtifacts:
    """mu: `[p]` float32. V: `[p, r]` float16, orthonormal columns, only as many as the plan codes. plan: the bits."""

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
        if self.mu.size and not self.plan.bits:
            raise FormatError("the plan codes nothing: calibrate with a lower compression ratio")

    @property
    def width(self) -> int:
        """Of the rows that it codes."""
        return self.mu.size


class Coder:
    """One block of rows to bytes and back, by the artifacts of this method."""

    leaves_lossless = True  # its bytes go through one of lossless.CODINGS
    default_quality = window_finer = None  # one ratio, and a raw window

    def __init__(self, artifacts: CalibrationArtifacts) -> None:
        self._parts = {name: artifacts.stream(name) for name in STREAMS}
        # The coder's own cache: the float32 basis is made on first use and dies with the coder.
        self._basis = cache(lambda name: mx.array(self._parts[name].V).astype(mx.float32))

    def check_quality(self, quality: float | None) -> None:
        """Raises InputError when there is one."""
        if quality is not None:
            raise InputError(f"{METHOD} has the one ratio that it was calibrated for, and no quality {quality!r}")

    def encode(self, rows: Mapping[str, mx.array], quality: float | None) -> dict[str, bytes]:
        """Each stream's rows `[n, p]` as bytes of the size that `is_size` asks for."""
        return {
            name: encode_block(self._parts[name].plan, self._basis(name).T @ (x - mx.array(self._parts[name].mu)).T)
            for name, x in rows.items()
        }

    def pack(self, name: str, codes: bytes) -> bytes:
        """What `encode` made is bytes already."""
        return codes

    def is_size(self, name: str, tokens: int, size: int, coding: str) -> bool:
        """Whether a section of `size` bytes, before its lossless coding, may hold so many rows."""
        return size == payload_size(self._parts[name].plan, tokens)

    def unpack(self, blocks: Sequence[Mapping[str, bytes]], tokens: Sequence[int]) -> Sequence[Mapping[str, bytes]]:
        """What `encode` made, of each block of so many tokens."""
        return blocks

    def decode(self, codes: Mapping[str, bytes], tokens: int, quality: float | None) -> dict[str, mx.array]:
        """The inverse of `encode`: each stream's rows `[tokens, p]` float32."""
        return {
            name: decode_block(self._parts[name].plan, data, tokens).T @ self._basis(name).T
            + mx.array(self._parts[name].mu)
            for name, data in codes.items()
        }


def train(samples: Samples, settings: Settings) -> dict[str, StreamArtifacts]:
    """A mean, a basis and a plan for each stream. One stream at a time, so that memory holds one stream's rows."""
    return {
        name: train_stream(samples.rows(name), name, settings, samples.progress)
        if samples.spec.stream(name).width
        else StreamArtifacts(np.zeros(0, np.float32), np.zeros((0, 0), np.float16), Plan())
        for name in STREAMS
    }


def facts(parts: Mapping[str, StreamArtifacts]) -> dict[str, Any]:
    """What artifacts say of themselves in meta.json beside the settings."""
    return {"plan_rank": {name: part.plan.rank for name, part in parts.items()}}


def explain(artifacts: CalibrationArtifacts) -> dict[str, Any]:
    """What each stream spends of its budget, and advice when the rank, not the bits, was the limit."""
    told: dict[str, Any] = {"compression_ratio": artifacts.meta.get("compression_ratio")}
    limited = []
    for name in STREAMS:
        part = artifacts.stream(name)
        told |= {f"{name}_width": part.width, f"{name}_bits_per_token": part.plan.bits}
        told |= {f"{name}_components": part.plan.rank, f"{name}_plan": _described(part.plan)}
        try:
            settings = Settings(**{field.name: artifacts.meta[field.name] for field in fields(Settings)})
            tokens = artifacts.meta["calibration_tokens"]
        except KeyError:  # of artifacts that were put together by hand
            continue
        budget = settings.budget(part.width)
        unspent = budget - part.plan.bits
        told |= {f"{name}_bit_budget": budget, f"{name}_unspent_bits": unspent}
        # More components than that do not exist, whatever the rank.
        directions = min(part.width, tokens - 1)
        if unspent > budget / 10 and part.plan.rank == settings.components(part.width) < directions:
            limited.append(name)
    if limited:
        told["advice"] = f"raise --rank: it, not the bit budget, limits {' and '.join(limited)}"
    return told


def _described(plan: Plan) -> str:
    return " | ".join(f"{run.count} x {run.size} {run.kind}" for run in plan.runs()) or "nothing is coded"


def train_stream(rows: np.ndarray, name: str, settings: Settings, progress: Progress) -> StreamArtifacts:
    """A mean, a basis and a plan for rows `[N, p]`, which are centred in place. Raises InputError for too few bits."""
    budget, rank = settings.budget(rows.shape[1]), settings.components(rows.shape[1])
    progress(f"principal components of {name}: {rows.shape[0]} tokens x {rows.shape[1]}")
    mean, basis = principal_components(rows, rank, settings.seed)
    progress(f"bit plan of {name}: {budget} bits a token")
    coefficients = rows @ basis
    spread = coefficients[:: -(-len(coefficients) // MAX_ERROR_TOKENS)]
    energy = np.square(coefficients, dtype=np.float64).mean(axis=0)
    plan = allocate(energy, group_errors(spread), budget)
    if not plan.groups:
        raise InputError(f"{budget} bits a token cannot code a single component of {name}; lower the compression ratio")
    return StreamArtifacts(mean, basis[:, : plan.rank].astype(np.float16), plan)


def group_errors(coefficients: np.ndarray) -> dict[tuple[int, str], np.ndarray]:
    """Mean squared error a token of coding each group, by (size, kind): `[r - size + 1]`, indexed by first component.

    Measured by quantizing windows of coefficients `[n, r]`. Neighbouring windows overlap almost wholly, so sizes
    above 16 are measured at every size/16-th start and interpolated between.
    """
    tokens, rank = coefficients.shape
    table = {}
    for size in (size for size in SIZES if size <= rank):
        starts = np.unique(np.r_[0 : rank - size + 1 : max(1, size // 16), rank - size])
        windows = np.lib.stride_tricks.sliding_window_view(coefficients, size, axis=1).transpose(1, 2, 0)
        step = max(1, 2**23 // (tokens * size))
        batches = [mx.array(windows[starts[a : a + step]]) for a in range(0, len(starts), step)]
        for kind in CODED:
            errors = np.concatenate([_mean_error(batch, kind) for batch in batches])
            table[size, kind] = np.interp(np.arange(rank - size + 1), starts, errors)
    return table


def _mean_error(windows: mx.array, kind: str) -> np.ndarray:
    difference = coded(windows, kind) - windows
    return np.array(mx.square(difference).sum(axis=1).mean(axis=1), dtype=np.float64)

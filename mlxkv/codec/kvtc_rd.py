"""A rate-distortion codec after KVTC's transform: what the model notices is what costs bits.

rows --weights, KLT--> coefficients --one step for all, dead zone--> integers --static tables, rANS--> bytes

Departures from KVTC (arXiv 2511.01815): rows are weighted by the model's sensitivity before the principal components;
one uniform step serves all components, so one calibration serves every ratio and the step is the quality; integers are
entropy-coded with fractional bits; values are weighted once more by the attention that their decoded keys foretell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np

from mlxkv.cache import STREAMS, is_whole
from mlxkv.codec import entropy, weighting
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.pca import principal_components
from mlxkv.codec.samples import Samples
from mlxkv.errors import FormatError, InputError

METHOD = "kvtc-rd"
KEYS_COARSER = 1.5  # the keys' step is so many times the quality's, the values' so many times less
ROUNDING = 0.40  # below 1/2: the dead zone around 0 is wider than a step
OUTWARDS = 0.12  # steps: shrunken vectors flatten attention, which costs more than their squared error
LARGEST = 2**30  # quantized magnitude
QUALITIES = range(10, 71, 10)  # that the tables are learnt at
MAX_HISTOGRAMS = 20_000
BLOCK = 512  # tokens of the histograms that the tables are learnt from


@dataclass(frozen=True)
class Settings:
    """How the `kvtc-rd` method is calibrated; its dumps need a sensitivity.

    basis_bytes: bound of the artifacts, all of k and v together. A basis that does not fit is split into groups of
    heads, which keeps every direction, as one of fewer components would not. samples_per_file, s, seed: as `kvtc` has them.
    """

    basis_bytes: int | None = None
    samples_per_file: int | None = None
    s: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("basis_bytes", "samples_per_file"):
            value = getattr(self, name)
            if value is not None and not is_whole(value, least=1):
                raise InputError(f"{name} must be 1 or more, not {value!r}")
        if not is_whole(self.s) or not is_whole(self.seed):
            raise InputError(f"s and seed must be 0 or more, not {self.s!r} and {self.seed!r}")


@dataclass(frozen=True)
class StreamArtifacts:
    """mu: `[p]` float32. V: `[p, r]` int8, the components of each group of heads under one another; scale: `[G, r]`
    float32, of G groups. weights: `[n, D, D]` float16, symmetric, one for each layer and head. attention: `[n, Dk + 1]`
    float32 for values, `[0, 0]` for what has no keys. tables: of codec/entropy.py."""

    mu: np.ndarray
    V: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    attention: np.ndarray
    tables: np.ndarray

    def __post_init__(self) -> None:
        types = {"mu": "float32", "V": "int8", "scale": "float32", "weights": "float16", "attention": "float32",
                 "tables": "uint16"}  # fmt: skip
        found = {name: str(getattr(self, name).dtype) for name in types}
        axes = [getattr(self, name).ndim for name in types]
        if found != types or axes != [1, 2, 2, 3, 2, 2]:
            raise FormatError(f"expected artifacts of types {types}, found {found} with {axes} axes")
        heads, dim = self.weights.shape[:2]
        fits = self.V.shape == (self.mu.size, self.scale.shape[1]) and self.weights.shape[2] == dim
        fits &= self.mu.size == heads * dim and (not heads or 1 <= len(self.scale) <= heads)
        fits &= self.attention.shape[0] in (0, heads) and self.tables.shape == (entropy.CLASSES, 256)
        if not fits or not all(np.isfinite(getattr(self, name)).all() for name in types):
            raise FormatError(
                f"artifacts disagree: {self.mu.shape}, {self.V.shape}, {self.scale.shape}, {self.weights.shape}"
            )

    @property
    def width(self) -> int:
        """Of the rows that it codes."""
        return self.mu.size

    @property
    def components(self) -> int:
        """Coefficients of a row."""
        return self.scale.size

    def groups(self) -> list[slice]:
        """The part of a row that each group codes."""
        return _groups(self.weights.shape[0], self.weights.shape[1], len(self.scale))

    def matrices(self, weights: np.ndarray) -> list[mx.array]:
        """`[width, r]` float32 of each group: head by head these weights times the components."""
        heads, dim = self.weights.shape[:2]
        basis = np.concatenate([self.V[part] * scale for part, scale in zip(self.groups(), self.scale)])
        weighted = (weights.astype(np.float32) @ basis.reshape(heads, dim, -1)).reshape(self.V.shape)
        return [mx.array(weighted[part]) for part in self.groups()]


def step_of(quality: float, name: str) -> float:
    """Of a stream's coefficients: ten points of quality halve it."""
    return 2 ** (3 - quality / 10) * (KEYS_COARSER if name == "k" else 1 / KEYS_COARSER)


class Coder:
    """One block of rows to bytes and back, by the artifacts of this method."""

    leaves_lossless = False
    default_quality = 35.0

    def __init__(self, artifacts: CalibrationArtifacts) -> None:
        self._parts = {name: artifacts.stream(name) for name in STREAMS}
        # Made on first use: compressing needs the way there, decompressing the way back.
        self._there = cache(lambda name: self._parts[name].matrices(self._parts[name].weights))
        self._back = cache(lambda name: self._parts[name].matrices(_inverse(self._parts[name].weights)))
        self._foretold = cache(self._foretelling)

    def check_quality(self, quality: object) -> None:
        """Raises InputError for anything but a number from 0 to 100."""
        if not isinstance(quality, int | float) or isinstance(quality, bool) or not 0 <= quality <= 100:
            raise InputError(f"the quality of {METHOD} is a number from 0 to 100, not {quality!r}")

    def encode(self, rows: Mapping[str, mx.array], quality: float) -> dict[str, np.ndarray]:
        """Each stream's rows `[n, p]` as integers `[n, components]` int32. Raises InputError for values without bound."""
        integers: dict[str, np.ndarray] = {}
        for name, x in rows.items():
            part, step = self._parts[name], step_of(quality, name)
            x = x - mx.array(part.mu)
            if len(part.attention):
                x = _by_head(x, self._gains(integers["k"], quality))
            parts = [x[:, where] @ matrix for where, matrix in zip(part.groups(), self._there(name))]
            integers[name] = np.array(_quantized(mx.concatenate(parts, axis=1), step))
        return integers

    def pack(self, name: str, codes: np.ndarray) -> bytes:
        """Integers `[n, components]` to bytes."""
        return entropy.encode(codes, self._parts[name].tables)

    def is_size(self, name: str, tokens: int, size: int, coding: str) -> bool:
        """Whether a section may hold so many rows: it has a byte for each at least, and is stored plain."""
        return coding == "raw" and size >= tokens

    def decode(self, payloads: Mapping[str, bytes], tokens: int, quality: float) -> dict[str, mx.array]:
        """The inverse of `encode` and `pack`: each stream's rows `[tokens, p]` float32."""
        rows, integers = {}, {}
        for name, data in payloads.items():
            part = self._parts[name]
            integers[name] = entropy.decode(data, part.tables, tokens, part.components)
            c = _restored(integers[name], step_of(quality, name))
            groups = zip(mx.split(c, len(part.scale), axis=1), self._back(name))
            x = mx.concatenate([each @ matrix.T for each, matrix in groups], axis=1)
            if len(part.attention):
                x = _by_head(x, 1 / self._gains(integers["k"], quality))
            rows[name] = x + mx.array(part.mu)
        return rows

    def _gains(self, keys: np.ndarray, quality: float) -> mx.array:
        """Of each token's values, `[n, heads]`, by its quantized keys: encoder and decoder know the same."""
        slopes, bias = self._foretold()
        logs = _restored(keys, step_of(quality, "k")) @ slopes + bias
        return mx.exp(mx.clip(logs, -weighting.REACH, weighting.REACH))

    def _foretelling(self) -> tuple[mx.array, mx.array]:
        """Attention as linear in the keys' coefficients: `[components, heads]` and `[heads]`."""
        attention, keys = self._parts["v"].attention, self._parts["k"]
        heads, dim = keys.weights.shape[:2]
        slopes = np.zeros((heads, len(keys.scale), keys.scale.shape[1]), np.float32)
        for group, (where, matrix) in enumerate(zip(keys.groups(), self._back("k"))):
            inside = slice(where.start // dim, where.stop // dim)
            by_head = np.array(matrix).reshape(-1, dim, matrix.shape[1])
            slopes[inside, group] = np.einsum("ndr,nd->nr", by_head, attention[inside, :-1])
        bias = (keys.mu.reshape(heads, dim) * attention[:, :-1]).sum(axis=1) + attention[:, -1]
        return mx.array(slopes.reshape(heads, -1).T), mx.array(bias)


def train(samples: Samples, settings: Settings) -> dict[str, StreamArtifacts]:
    """Weights, basis and tables of each stream. Values are weighted by their own tokens' keys as well."""
    weights, attention = weighting.learn(samples)
    parts: dict[str, StreamArtifacts] = {}
    budget = settings.basis_bytes and settings.basis_bytes // sum(
        samples.spec.stream(name).width > 0 for name in STREAMS
    )
    foretold: np.ndarray | None = None
    unit = 0.0
    for name in STREAMS:
        if not samples.spec.stream(name).width:
            parts[name] = _nothing()
            continue
        rows, (heads, dim) = samples.rows(name), weights[name].shape[:2]
        if name == "k" and len(attention):
            foretold = weighting.gains(rows.reshape(-1, heads, dim), attention)
        mu = rows.mean(axis=0, dtype=np.float64).astype(np.float32)
        rows -= mu
        if name == "v" and foretold is not None:
            rows = _by_head(rows, foretold)
        # The keys' weighted rows have a mean square of 1, so that steps mean alike for every model.
        unit = unit or float(1 / np.sqrt(np.square(_weighted(rows, weights[name])).mean()))
        stored = (unit * weights[name]).astype(np.float16)
        of_values = attention if name == "v" else attention[:0, :0]
        parts[name] = _learn(samples, name, _weighted(rows, stored), settings, budget, mu, stored, of_values)
    return parts


def facts(parts: Mapping[str, StreamArtifacts]) -> dict[str, Any]:
    """What artifacts say of themselves in meta.json beside the settings."""
    return {"components": {name: part.components for name, part in parts.items()},
            "groups": {name: len(part.scale) for name, part in parts.items()}}  # fmt: skip


def explain(artifacts: CalibrationArtifacts) -> dict[str, Any]:
    """What each stream is coded with."""
    told: dict[str, Any] = {}
    for name in STREAMS:
        part = artifacts.stream(name)
        told |= {f"{name}_width": part.width, f"{name}_components": part.components, f"{name}_groups": len(part.scale)}
    return told


def _learn(samples: Samples, name: str, rows: np.ndarray, settings: Settings, budget: int | None,
           mu: np.ndarray, weights: np.ndarray, attention: np.ndarray) -> StreamArtifacts:  # fmt: skip
    """Basis and tables from weighted rows."""
    heads, dim = weights.shape[:2]
    fixed = mu.nbytes + weights.nbytes + attention.nbytes + entropy.CLASSES * 512
    count, rank = _grouping(heads, dim, len(rows), None if budget is None else budget - fixed)
    samples.progress(f"principal components of {name}: {len(rows)} tokens x {mu.size}, {count} groups")
    V, scale = np.zeros((mu.size, rank), np.int8), np.zeros((count, rank), np.float32)
    coefficients = np.zeros((len(rows), count, rank), np.float32)
    for group, where in enumerate(_groups(heads, dim, count)):
        part = rows[:, where]
        _, basis = principal_components(part.copy(), rank, settings.seed)
        columns = basis.shape[1]
        scale[group, :columns] = np.abs(basis).max(axis=0) / 127
        V[where, :columns] = np.rint(basis / scale[group, :columns])
        coefficients[:, group] = part @ (V[where] * scale[group])
    samples.progress(f"tables of {name}")
    tables = _learn_tables(coefficients.reshape(len(rows), -1), name, settings.seed)
    return StreamArtifacts(mu, V, scale, weights, attention, tables)


def _grouping(heads: int, dim: int, tokens: int, budget: int | None) -> tuple[int, int]:
    """Groups of heads, as few as fit the budget with all their components, and components of each."""
    for count in range(1, heads + 1):
        rank = min(-(-heads // count) * dim, tokens - 1)
        if budget is None or rank * (heads * dim + 4 * count) <= budget:
            return count, rank
    if (rank := budget // (heads * dim + 4 * heads)) < 1:  # type: ignore[operator]
        raise InputError(f"{budget} bytes hold no component of {heads} heads of {dim}: raise basis_bytes")
    return heads, rank


def _learn_tables(coefficients: np.ndarray, name: str, seed: int) -> np.ndarray:
    blocks = np.array_split(coefficients, -(-len(coefficients) // BLOCK))
    found = [
        entropy.histograms(np.array(_quantized(mx.array(block), step_of(quality, name))))
        for quality in QUALITIES
        for block in blocks
    ]
    every = np.concatenate(found)
    chosen = np.random.default_rng(seed).permutation(len(every))[:MAX_HISTOGRAMS]
    return entropy.learn_tables(every[chosen])


def _nothing() -> StreamArtifacts:
    none = np.zeros((0, 0), np.float32)
    tables = np.zeros((entropy.CLASSES, 256), np.uint16)
    return StreamArtifacts(none[0:0].ravel(), none.astype(np.int8), none, np.zeros((0, 0, 0), np.float16), none, tables)


def _groups(heads: int, dim: int, count: int) -> list[slice]:
    ends = [heads * dim * group // count // dim * dim for group in range(count + 1)]
    return [slice(*pair) for pair in pairwise(ends)]


def _inverse(weights: np.ndarray) -> np.ndarray:
    """Of what is stored, so that both ways agree."""
    try:
        return np.linalg.inv(weights.astype(np.float64)).astype(np.float32)
    except np.linalg.LinAlgError:
        raise FormatError("the artifacts' weights have no inverse; calibrate again") from None


def _weighted(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    heads, dim = weights.shape[:2]
    by_head = rows.reshape(len(rows), heads, dim).swapaxes(0, 1)
    return np.ascontiguousarray((by_head @ weights.astype(np.float32)).swapaxes(0, 1)).reshape(rows.shape)


def _by_head(rows: Any, gains: Any) -> Any:
    """Each head's part of rows `[n, p]` times its gain `[n, heads]`."""
    return (rows.reshape(*gains.shape, -1) * gains[..., None]).reshape(rows.shape)


def _quantized(coefficients: mx.array, step: float) -> mx.array:
    """int32, with a dead zone around 0. Raises InputError for values that are not finite or far beyond any cache."""
    magnitudes = mx.floor(mx.abs(coefficients) / step + ROUNDING)
    if not (magnitudes.max() < LARGEST).item():
        raise InputError("the cache holds NaN, infinite or enormous values")
    return (mx.sign(coefficients) * magnitudes).astype(mx.int32)


def _restored(integers: np.ndarray, step: float) -> mx.array:
    q = mx.array(integers).astype(mx.float32)
    return (q + OUTWARDS * mx.sign(q)) * step

"""A rate-distortion codec after KVTC's transform: what the model notices is what costs bits.

rows --weights, KLT--> coefficients --one step for all, dead zone--> integers --static tables, rANS--> bytes

Departures from KVTC (arXiv 2511.01815): rows are weighted by the model's sensitivity before the principal components;
one uniform step serves all components, so one calibration serves every ratio and the step is the quality; integers are
entropy-coded with fractional bits; values are weighted once more by the attention that their decoded keys foretell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from mlxkv.codec.layout import BLOCK
from mlxkv.codec.methods.base import BlockCoder, CodecConfig, CodecMethod, StreamArtifacts, codec_methods, streams_of
from mlxkv.codec.samples import Samples
from mlxkv.codec.stages import basis, entropy, weighting
from mlxkv.codec.stages.basis import Basis
from mlxkv.config import integer
from mlxkv.errors import FormatError, InputError
from mlxkv.spec import STREAMS

KEY_STEP_FACTOR = 1.5  # the keys' step is so many times the quality's, the values' so many times less
ROUNDING = 0.40  # below 1/2: the dead zone around 0 is wider than a step
RECONSTRUCTION_OFFSET = 0.12  # steps: shrunken vectors flatten attention, which costs more than their squared error
MIN_SPREAD = 1 / 10  # steps: a component that spreads less is not looked at
BASIS_QUALITY = 100  # at which the rounding of the basis costs about as much as the step does
REFINE_FROM_QUALITY = 55  # from this quality on the rounding of the basis would be seen
MAX_MAGNITUDE = 2**30  # quantized magnitude
QUALITIES = range(10, 71, 10)  # that the tables are learnt at
TABLE_BLOCKS, MAX_HISTOGRAMS = 12, 20_000


@dataclass(frozen=True, kw_only=True)
class KVTCRDConfig(CodecConfig):
    """Settings of the `kvtc-rd` method; its dumps need a sensitivity.

    Parameters
    ----------
    basis_bytes
        Bytes of the artifacts, all of k and v together, at most, kept by a coarser basis; None for no bound.
    """

    basis_bytes: int | None = integer(None, least=1)


@dataclass(frozen=True)
class KVTCRDStream(StreamArtifacts):
    """mu: `[p]` float32. codes, scale, spread: of the basis (codec/basis.py). weights: `[heads, D, D]` float16,
    symmetric, heads of all layers. attention: `[heads, Dk + 1]` float32 for values, `[0, 0]` for what has no keys.
    tables: of codec/entropy.py."""

    mu: np.ndarray
    codes: np.ndarray
    scale: np.ndarray
    spread: np.ndarray
    weights: np.ndarray
    attention: np.ndarray
    tables: np.ndarray

    def __post_init__(self) -> None:
        types = {"mu": "float32", "weights": "float16", "attention": "float32", "tables": "uint16"}
        parts = {name: getattr(self, name) for name in types}
        if {name: str(part.dtype) for name, part in parts.items()} != types or self.mu.ndim != 1:
            raise FormatError(f"expected artifacts of the types {types}")
        heads, dim = self.weights.shape[:2] if self.weights.ndim == 3 else (0, 0)
        fits = self.weights.shape == (heads, dim, dim) and heads * dim == self.mu.size and self.attention.ndim == 2
        fits = fits and self.attention.shape[0] in (0, heads) and self.tables.shape == (entropy.CLASSES, 256)
        if not fits or not all(np.isfinite(part).all() for part in parts.values()):
            raise FormatError(f"artifacts disagree: {[part.shape for part in parts.values()]}, or are not finite")
        if self.basis.rank > self.mu.size:
            raise FormatError(f"artifacts disagree: {self.basis.rank} components of rows {self.mu.size} wide")

    @property
    def width(self) -> int:
        """Of the rows that it codes."""
        return self.mu.size

    @cached_property
    def basis(self) -> Basis:
        """Of weighted rows."""
        return Basis(self.codes, self.scale, self.spread, self.mu.size)

    @cached_property
    def unweighted_basis(self) -> mx.array:
        """The basis with its weights undone, `[rank, p]` float32."""
        return mx.contiguous(weighting.apply_weights(self.basis.matrix, weighting.invert_weights(self.weights)))


def step_size(quality: float, name: str) -> float:
    """Of a stream's coefficients: ten points of quality halve it."""
    return 2 ** (3 - quality / 10) * (KEY_STEP_FACTOR if name == "k" else 1 / KEY_STEP_FACTOR)


class KVTCRDCoder(BlockCoder):
    """One block of rows to bytes and back, by the artifacts of this method."""

    uses_lossless_stage = False
    default_quality = 35.0
    window_quality_bonus: ClassVar[float | None] = 30.0  # points of quality: the newest tokens are looked at most

    def __init__(self, streams: Mapping[str, KVTCRDStream]) -> None:
        self._parts = dict(streams)
        heads, dim = streams["k"].weights.shape[:2]
        attention = streams["v"].attention
        if streams["k"].attention.size or attention.shape not in ((0, 0), (heads, dim + 1)):
            raise FormatError(f"attention {attention.shape} is not of the keys' {heads} heads of {dim}")

    def check_quality(self, quality: object) -> None:
        """Raises InputError for anything but a number from 0 to 100."""
        if not isinstance(quality, int | float) or isinstance(quality, bool) or not 0 <= quality <= 100:
            raise InputError(f"the quality of kvtc-rd is a number from 0 to 100, not {quality!r}")

    def coefficients(self, rows: Mapping[str, mx.array], quality: float) -> dict[str, mx.array]:
        """Each stream's rows `[n, p]` as weighted coefficients `[n, components]`, as many as a step of this quality can
        reach. Values are weighted as their keys' integers tell."""
        found: dict[str, mx.array] = {}
        for name, x in rows.items():
            part, step = self._parts[name], step_size(quality, name)
            x = weighting.apply_weights(x - mx.array(part.mu), part.weights)
            if len(part.attention):
                x = _apply_gains(x, self._gains(_quantize(found["k"], step_size(quality, "k")), quality))
            found[name] = part.basis.project(
                x, part.basis.rank_above(MIN_SPREAD * step), quality >= REFINE_FROM_QUALITY
            )
        return found

    def encode(self, rows: Mapping[str, mx.array], quality: float | None) -> dict[str, np.ndarray]:
        """Each stream's rows as integers `[n, components]` int32. Raises InputError for values without bound."""
        assert quality is not None  # check_quality refuses none
        found = self.coefficients(rows, quality)
        return {name: _quantize(each, step_size(quality, name)) for name, each in found.items()}

    def pack(self, name: str, codes: np.ndarray) -> bytes:
        """Integers `[n, components]`, of the strongest components, to bytes."""
        part = self._parts[name]
        return entropy.encode(np.pad(codes, ((0, 0), (0, part.basis.rank - codes.shape[1]))), part.tables)

    def estimate(self, name: str, codes: np.ndarray) -> float:
        """About how many bytes `pack` makes."""
        return entropy.estimate(codes, self._parts[name].tables)

    def is_size(self, name: str, tokens: int, size: int, coding: str) -> bool:
        """Whether a section may hold so many rows: it has a byte for each at least, and is stored plain."""
        return coding == "raw" and size >= tokens

    def unpack(self, blocks: Sequence[Mapping[str, bytes]], tokens: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """What `encode` made, of each block of so many tokens."""
        sections = [
            entropy.Section(data, self._parts[name].tables, count, self._parts[name].basis.rank)
            for payloads, count in zip(blocks, tokens)
            for name, data in payloads.items()
        ]
        found = iter(entropy.decode(sections))
        return [
            {name: (codes := next(found))[:, : _used_components(codes)] for name in payloads} for payloads in blocks
        ]

    def decode(self, codes: Mapping[str, np.ndarray], tokens: int, quality: float | None) -> dict[str, mx.array]:
        """The inverse of `encode`: each stream's rows `[tokens, p]` float32."""
        assert quality is not None
        rows = {}
        for name, integers in codes.items():
            part = self._parts[name]
            x = _dequantize(integers, step_size(quality, name)) @ part.unweighted_basis[: integers.shape[1]]
            if len(part.attention):
                x = _apply_gains(x, 1 / self._gains(codes["k"], quality))
            rows[name] = x + mx.array(part.mu)
        return rows

    def _gains(self, keys: np.ndarray, quality: float) -> mx.array:
        """Of each token's values, `[n, heads]`, by its quantized keys: encoder and decoder know the same."""
        slopes, bias = self._attention_predictor
        logs = _dequantize(keys, step_size(quality, "k")) @ slopes[: keys.shape[1]] + bias
        return mx.exp(mx.clip(logs, -weighting.MAX_LOG_GAIN, weighting.MAX_LOG_GAIN))

    @cached_property
    def _attention_predictor(self) -> tuple[mx.array, mx.array]:
        """Attention as linear in the keys' coefficients: `[rank, heads]` and `[heads]`."""
        attention, part = self._parts["v"].attention, self._parts["k"]
        heads, dim = part.weights.shape[:2]
        slopes = (part.unweighted_basis.reshape(-1, heads, dim) * mx.array(attention[:, :-1])).sum(axis=-1)
        bias = (part.mu.reshape(heads, dim) * attention[:, :-1]).sum(axis=1) + attention[:, -1]
        return slopes, mx.array(bias)


@codec_methods.register("kvtc-rd")
class KVTCRD(CodecMethod):
    """The rate-distortion method."""

    config_class = KVTCRDConfig
    artifacts_class = KVTCRDStream

    def train(self, samples: Samples, config: CodecConfig) -> dict[str, KVTCRDStream]:
        """Weights, basis and tables of each stream. Values are weighted by their own tokens' keys as well."""
        assert isinstance(config, KVTCRDConfig)
        weights, attention = weighting.learn_weights(samples)
        budget = config.basis_bytes and config.basis_bytes // len(weights)
        parts: dict[str, KVTCRDStream] = {}
        foretold: np.ndarray | None = None
        unit = 0.0
        for name, of_heads in weights.items():
            rows, (heads, dim) = samples.rows(name), of_heads.shape[:2]
            of_values = attention if name == "v" else attention[:0, :0]
            if name == "k" and len(attention):
                foretold = weighting.attention_gains(rows.reshape(-1, heads, dim), attention)
            mu = rows.mean(axis=0, dtype=np.float64).astype(np.float32)
            rows = np.array(weighting.apply_weights(mx.array(rows - mu), of_heads.astype(np.float32)))
            # The keys' weighted rows have a mean square of 1, so that steps mean alike for every model.
            unit = unit or float(1 / np.sqrt(np.square(rows).mean()))
            rows *= unit
            if len(of_values):
                rows = _apply_gains(rows, foretold)
            samples.progress(f"principal components of {name}: {len(rows)} tokens x {mu.size}")
            stored = (unit * of_heads).astype(np.float16)
            fixed = mu.nbytes + stored.nbytes + of_values.nbytes + 2 * 256 * entropy.CLASSES
            exact = step_size(BASIS_QUALITY, name) / np.sqrt(mu.size)
            found = basis.learn_basis(rows, exact, budget and budget - fixed, config.seed)
            samples.progress(f"tables of {name}")
            tables = _learn_tables(rows, found, name, config.seed)
            parts[name] = KVTCRDStream(mu, found.codes, found.scale, found.spread, stored, of_values, tables)
        return {"v": _empty_stream(), **parts}

    def coder(self, streams: Mapping[str, StreamArtifacts]) -> KVTCRDCoder:
        return KVTCRDCoder(streams_of(KVTCRDStream, streams))

    def facts(self, streams: Mapping[str, StreamArtifacts]) -> dict[str, Any]:
        parts = streams_of(KVTCRDStream, streams)
        return {"components": {name: part.basis.rank for name, part in parts.items()}}

    def explain(self, streams: Mapping[str, StreamArtifacts], meta: Mapping[str, Any]) -> dict[str, Any]:
        told: dict[str, Any] = {}
        parts = streams_of(KVTCRDStream, streams)
        for name in STREAMS:
            part = parts[name]
            told |= {
                f"{name}_width": part.width,
                f"{name}_components": part.basis.rank,
                f"{name}_bits_an_entry": round(8 * part.codes.size / max(1, part.basis.rank * part.width), 2),
            }
        return told


def _learn_tables(rows: np.ndarray, found: Basis, name: str, seed: int) -> np.ndarray:
    """From some blocks of weighted rows, each at several qualities."""
    blocks = np.array_split(rows, -(-len(rows) // BLOCK))
    every = [
        entropy.histograms(_quantize(coefficients, step_size(quality, name)))
        for block in blocks[:: -(-len(blocks) // TABLE_BLOCKS)]
        for coefficients in [found.project(mx.array(block), found.rank)]
        for quality in QUALITIES
    ]
    histograms = np.concatenate(every)
    return entropy.learn_tables(histograms[np.random.default_rng(seed).permutation(len(histograms))[:MAX_HISTOGRAMS]])


def _empty_stream() -> KVTCRDStream:
    none, tables = np.zeros(0, np.float32), np.zeros((entropy.CLASSES, 256), np.uint16)
    return KVTCRDStream(
        none, none.astype(np.uint8), none, none, np.zeros((0, 0, 0), np.float16), none.reshape(0, 0), tables
    )


def _apply_gains(rows: Any, gains: Any) -> Any:
    """Each head's part of rows `[n, p]` times its gain `[n, heads]`."""
    return (rows.reshape(*gains.shape, -1) * gains[..., None]).reshape(rows.shape)


def _quantize(coefficients: mx.array, step: float) -> np.ndarray:
    """int32, with a dead zone around 0. Raises InputError for values that are not finite or far beyond any cache."""
    sizes = mx.abs(coefficients) / step
    if sizes.size and not (sizes.max() < MAX_MAGNITUDE).item():
        raise InputError("the cache holds NaN, infinite or enormous values")
    return np.array((mx.sign(coefficients) * mx.floor(sizes + ROUNDING)).astype(mx.int32))


def _used_components(integers: np.ndarray) -> int:
    """Components up to the last that is not all zeros."""
    return int(np.flatnonzero(np.r_[True, integers.any(axis=0)])[-1])


def _dequantize(integers: np.ndarray, step: float) -> mx.array:
    q = mx.array(integers).astype(mx.float32)
    return (q + RECONSTRUCTION_OFFSET * mx.sign(q)) * step

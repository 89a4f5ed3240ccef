"""A rate-distortion codec on KVTC's transform: more bits for directions in which errors change predictions more.

    rows [n, p] --weights, KLT--> coefficients --one step, dead zone--> integers --static tables, rANS--> bytes

Departures from KVTC (arXiv 2511.01815): rows are weighted by the model's sensitivity before the principal components;
one uniform step serves all components, so one calibration serves every ratio, and the quality sets the step; integers are
entropy-coded with fractional bits; values are also scaled by gains that follow from the attention predicted from their
decoded keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from mlxkv.codec.layout import BLOCK_ROWS
from mlxkv.codec.methods.base import (
    BlockCoder,
    CodecConfig,
    CodecMethod,
    StreamArtifacts,
    checked_config,
    checked_streams,
    codec_methods,
)
from mlxkv.codec.samples import Samples
from mlxkv.codec.stages import basis, entropy, weighting
from mlxkv.codec.stages.basis import Basis, combine
from mlxkv.codec.stages.dead_zone import dequantize, quantize
from mlxkv.codec.stages.weighting import MAX_INVERSE, MAX_MEAN, MAX_SLOPE, within
from mlxkv.config import integer
from mlxkv.errors import FormatError, InputError
from mlxkv.kernels import rans
from mlxkv.spec import STREAMS

KEY_STEP_FACTOR = 1.5  # multiplies the keys' step and divides the values'
MIN_SPREAD = 1 / 10  # in steps: a component of a smaller standard deviation is not coded
BASIS_QUALITY = 100  # at which rounding of the basis costs about as much as quantization
REFINE_FROM_QUALITY = 55  # from which on projections correct for rounding of the basis
QUALITIES = range(10, 71, 10)  # at which the tables are learnt
TABLE_BLOCKS, MAX_HISTOGRAMS = 12, 20_000  # from which the tables are learnt, at most


@dataclass(frozen=True, kw_only=True)
class KVTCRDConfig(CodecConfig):
    """Settings of the `kvtc-rd` method. At least one dump needs a sensitivity.

    Parameters
    ----------
    basis_bytes
        Most bytes of the artifacts of all streams together; the basis is rounded more coarsely to fit. None for no bound.
    samples_per_file
        Most tokens to use per dump, evenly spaced; None for all.
    sinks
        First tokens of each dump excluded from training; 0 or more.
    seed
        Seed of all random numbers in calibration.
    """

    basis_bytes: int | None = integer(None, least=1)


@dataclass(frozen=True)
class KVTCRDStream(StreamArtifacts):
    """Artifacts of one stream.

    Parameters
    ----------
    mu
        Mean row `[p]` float32.
    codes, scale, spread
        Basis of weighted rows, as `mlxkv.codec.stages.basis.Basis` stores it.
    weights
        One symmetric matrix per head of each layer, `[layers * H, D, D]` float16.
    attention
        Predictor of attention from keys, `[layers * H, Dk + 1]` float32, in the artifacts of values; otherwise `[0, 0]`.
    tables
        Frequencies `[64, 256]` uint16 of `mlxkv.codec.stages.entropy`.

    Raises
    ------
    FormatError
        When the parts do not belong together or are not finite.
    """

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
        if not (within(self.mu, MAX_MEAN) and within(self.attention, MAX_SLOPE)):
            raise FormatError("the mean or the attention has enormous values: calibrate again")
        if not min(1, self.mu.size) <= self.basis.rank <= 2 * self.mu.size:
            raise FormatError(f"artifacts disagree: {self.basis.rank} components of rows {self.mu.size} wide")
        if self.mu.size and (self.tables.sum(axis=1, dtype=np.int64) != rans.TOTAL).any():
            raise FormatError(f"artifacts have entropy tables that do not sum to {rans.TOTAL}: calibrate again")

    @property
    def width(self) -> int:
        """Width p of the rows."""
        return self.mu.size

    @cached_property
    def basis(self) -> Basis:
        """Basis of weighted rows."""
        return Basis(self.codes, self.scale, self.spread, self.mu.size, self.weights.shape[-1])

    @cached_property
    def unweighted_basis(self) -> tuple[mx.array, mx.array]:
        """Basis times the inverse weights, as `combine` takes it: what it makes of coefficients are unweighted rows.

        Components of whole rows `[whole, p]` and of heads `[heads, D, D]`, float32.
        """
        inverse = weighting.invert_weights(self.weights)
        matrix = mx.contiguous(weighting.apply_weights(self.basis.matrix, inverse))
        heads = self.basis.heads @ mx.array(inverse) if self.basis.heads.size else self.basis.heads
        if not all(within(np.array(part), MAX_INVERSE) for part in (matrix, heads)):
            raise FormatError("the basis has enormous values: calibrate again")
        return matrix, heads


def _checked_quality(quality: object) -> float:
    """Check that a quality is a number from 0 to 100 and return it."""
    if not isinstance(quality, int | float) or isinstance(quality, bool) or not 0 <= quality <= 100:
        raise InputError(f"the quality of kvtc-rd is a number from 0 to 100, not {quality!r}")
    return quality


def step_size(quality: float, name: str) -> float:
    """Return the quantization step of a stream's coefficients; ten points of quality halve it.

    Parameters
    ----------
    quality
        0 to 100.
    name
        "k" or "v".

    Returns
    -------
    float
        Step, in units of weighted coefficients.

    Examples
    --------
    >>> step_size(30, "k"), step_size(40, "k")
    (1.5, 0.75)
    """
    return 2 ** (3 - quality / 10) * (KEY_STEP_FACTOR if name == "k" else 1 / KEY_STEP_FACTOR)


class KVTCRDCoder(BlockCoder):
    """Coder of blocks with weights, a basis and entropy tables.

    Parameters
    ----------
    streams
        Artifacts of "k" and "v".

    Raises
    ------
    FormatError
        When the predictor of attention does not fit the keys.
    """

    uses_lossless_stage = False
    default_quality = 35.0
    window_quality_bonus: ClassVar[float | None] = 30.0  # recent tokens get most attention

    def __init__(self, streams: Mapping[str, KVTCRDStream]) -> None:
        self._parts = dict(streams)
        heads, dim = streams["k"].weights.shape[:2]
        attention = streams["v"].attention
        if streams["k"].attention.size or attention.shape not in ((0, 0), (heads, dim + 1)):
            raise FormatError(f"attention {attention.shape} is not of the keys' {heads} heads of {dim}")

    def check_quality(self, quality: object) -> None:
        """Refuse anything but a number from 0 to 100."""
        _checked_quality(quality)

    def coefficients(self, rows: Mapping[str, mx.array], quality: float) -> dict[str, mx.array]:
        """Return each stream's weighted coefficients, without components too weak for the step of this quality.

        Parameters
        ----------
        rows
            Each stream's rows `[n, p]` float32, keys first.
        quality
            0 to 100.

        Returns
        -------
        dict[str, mx.array]
            Coefficients `[n, components]` float32. Those of values are scaled by gains computed from the quantized keys.
        """
        coefficients: dict[str, mx.array] = {}
        for name, x in rows.items():
            part, step = self._parts[name], step_size(quality, name)
            x = weighting.apply_weights(x - mx.array(part.mu), part.weights)
            if len(part.attention):
                of_keys = step_size(quality, "k")
                x = _apply_gains(x, self._gains(dequantize(quantize(coefficients["k"], of_keys), of_keys)))
            count, refine = part.basis.rank_above(MIN_SPREAD * step), quality >= REFINE_FROM_QUALITY
            coefficients[name] = part.basis.project(x, count, refine, step)
        return coefficients

    def encode(self, rows: Mapping[str, mx.array], quality: float | None) -> dict[str, np.ndarray]:
        """Return each stream's rows as integers `[n, components]` int32."""
        quality = _checked_quality(quality)
        coefficients = self.coefficients(rows, quality)
        return {name: quantize(x, step_size(quality, name)) for name, x in coefficients.items()}

    def pack(self, name: str, codes: np.ndarray) -> bytes:
        """Entropy-code integers `[n, components]` of the strongest components."""
        part = self._parts[name]
        return entropy.encode(np.pad(codes, ((0, 0), (0, part.basis.rank - codes.shape[1]))), part.tables)

    def estimate(self, name: str, codes: np.ndarray) -> float:
        """Estimate the bytes that `pack` makes from code lengths."""
        return entropy.estimate(codes, self._parts[name].tables)

    def is_size(self, name: str, tokens: int, size: int, coding: str) -> bool:
        """Check that the section is stored plain and has at least one byte per row."""
        return coding == "raw" and size >= tokens

    def unpack(self, blocks: Sequence[Mapping[str, bytes]], tokens: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """Return the integers of all blocks, whose lanes are decoded together."""
        sections = [
            entropy.Section(data, self._parts[name].tables, count, self._parts[name].basis.rank)
            for payloads, count in zip(blocks, tokens)
            for name, data in payloads.items()
        ]
        decoded = iter(entropy.decode(sections))
        return [
            {name: (codes := next(decoded))[:, : _used_components(codes)] for name in payloads} for payloads in blocks
        ]

    def decode(self, codes: Mapping[str, np.ndarray], tokens: int, quality: float | None) -> dict[str, mx.array]:
        """Return each stream's rows from their integers."""
        quality = _checked_quality(quality)
        rows = {}
        coefficients = {name: dequantize(integers, step_size(quality, name)) for name, integers in codes.items()}
        for name, of_stream in coefficients.items():
            part = self._parts[name]
            x = combine(of_stream, *part.unweighted_basis)
            if len(part.attention):
                x = _apply_gains(x, 1 / self._gains(coefficients["k"]))
            rows[name] = x + mx.array(part.mu)
        return rows

    def _gains(self, keys: mx.array) -> mx.array:
        """Return the gains on each token's values, `[n, heads]`, from its decoded keys' coefficients `[n, components]`."""
        whole, of_heads, bias = self._attention_predictor
        logs = combine(keys, whole, of_heads) + bias
        return mx.exp(mx.clip(logs, -weighting.MAX_LOG_GAIN, weighting.MAX_LOG_GAIN))

    @cached_property
    def _attention_predictor(self) -> tuple[mx.array, mx.array, mx.array]:
        """Predictor of attention in terms of the keys' coefficients: slopes as `combine` takes them and biases `[heads]`."""
        attention, part = self._parts["v"].attention, self._parts["k"]
        heads, dim = part.weights.shape[:2]
        whole, of_heads = part.unweighted_basis
        slopes = mx.array(attention[:, :-1])
        with np.errstate(over="ignore", invalid="ignore"):  # decoded rows are checked to be finite
            bias = (part.mu.reshape(heads, dim) * attention[:, :-1]).sum(axis=1) + attention[:, -1]
        whole = (whole.reshape(-1, heads, dim) * slopes).sum(axis=-1)
        predictor = whole, of_heads @ slopes[:, :, None] if of_heads.size else of_heads, mx.array(bias)
        mx.eval(predictor)  # at once, as other threads may use it as well
        return predictor


@codec_methods.register("kvtc-rd")
class KVTCRD(CodecMethod):
    """The rate-distortion method.

    Attributes
    ----------
    shrinks
        Whether training shrinks what few tokens tell; False to measure what that is worth.
    attention_tokens
        Measured tokens that attention is learnt from, at most, for each number of its predictor; None for all.
    most_components
        Components of whole rows, at most; None for all.
    """

    shrinks: ClassVar[bool] = True
    attention_tokens: ClassVar[int | None] = None
    most_components: ClassVar[int | None] = None
    config_class = KVTCRDConfig
    artifacts_class = KVTCRDStream

    def train(self, samples: Samples, config: CodecConfig) -> dict[str, KVTCRDStream]:
        """Learn weights, a basis and tables of each stream, and the predictor of attention that scales the values."""
        config = checked_config(KVTCRDConfig, config)
        weights, attention = weighting.learn_weights(samples, shrink=self.shrinks, most=self.attention_tokens)
        budget = config.basis_bytes and int(config.basis_bytes * samples.share) // max(1, len(weights))
        parts: dict[str, KVTCRDStream] = {}
        value_gains: np.ndarray | None = None
        for name, head_weights in weights.items():
            rows, (heads, dim) = samples.rows(name), head_weights.shape[:2]
            predictor = attention if name == "v" else attention[:0, :0]
            if name == "k" and len(attention):
                value_gains = weighting.attention_gains(rows.reshape(-1, heads, dim), attention)
            mu = rows.mean(axis=0, dtype=np.float64).astype(np.float32)
            rows = self._weighted(rows, mu, head_weights.astype(np.float32))
            # Weighted key rows are scaled to a mean square of 1, so that a quality means the same for every model.
            unit = samples.units.setdefault("key row", float(1 / np.sqrt(np.square(rows).mean())))
            rows *= unit
            if len(predictor):
                rows = _apply_gains(rows, value_gains)
            samples.progress(f"principal components of {name}: {len(rows)} tokens x {mu.size}")
            stored_weights = (unit * head_weights).astype(np.float16)
            fixed = mu.nbytes + stored_weights.nbytes + predictor.nbytes + 2 * 256 * entropy.CLASSES
            finest = step_size(BASIS_QUALITY, name) / np.sqrt(mu.size)
            learnt = basis.learn_basis(
                rows,
                finest,
                budget and budget - fixed,
                config.seed,
                dim if self.shrinks else None,
                self.most_components,
            )
            samples.progress(f"tables of {name}")
            tables = _learn_tables(rows, learnt, name, config.seed)
            codes, scale, spread = learnt.codes, learnt.scale, learnt.spread
            parts[name] = KVTCRDStream(mu, codes, scale, spread, stored_weights, predictor, tables)
        return {**dict.fromkeys(STREAMS, _empty_stream()), **parts}

    def _weighted(self, rows: np.ndarray, mu: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Return rows less their mean, weighted."""
        return np.array(weighting.apply_weights(mx.array(rows - mu), weights))

    def coder(self, streams: Mapping[str, StreamArtifacts]) -> KVTCRDCoder:
        """Return a `KVTCRDCoder`."""
        return KVTCRDCoder(checked_streams(KVTCRDStream, streams))

    def facts(self, streams: Mapping[str, StreamArtifacts]) -> dict[str, Any]:
        """Return the number of components of each stream."""
        parts = checked_streams(KVTCRDStream, streams)
        return {"components": {name: part.basis.rank for name, part in parts.items()}}

    def explain(self, streams: Mapping[str, StreamArtifacts], meta: Mapping[str, Any]) -> dict[str, Any]:
        """Describe the bases."""
        facts: dict[str, Any] = {}
        parts = checked_streams(KVTCRDStream, streams)
        for name in STREAMS:
            part = parts[name]
            facts |= {
                f"{name}_width": part.width,
                f"{name}_components": part.basis.rank,
                f"{name}_bits_an_entry": round(8 * part.codes.size / max(1, part.basis.rank * part.width), 2),
            }
        return facts


class QuickKVTCRD(KVTCRD):
    """Training in a third of the time: components of whole rows only as far as they matter most, those of heads for the rest."""

    attention_tokens = 48
    most_components = 1_024

    def _weighted(self, rows: np.ndarray, mu: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Weight rows in place, a few at a time."""
        for start in range(0, len(rows), basis.CHUNK_ROWS):
            part = slice(start, start + basis.CHUNK_ROWS)
            rows[part] = super()._weighted(rows[part], mu, weights)
        mx.clear_cache()
        return rows


def _learn_tables(rows: np.ndarray, learnt: Basis, name: str, seed: int) -> np.ndarray:
    """Learn entropy tables from evenly spaced blocks of weighted rows, each quantized at several qualities."""
    blocks = np.array_split(rows, -(-len(rows) // BLOCK_ROWS))
    steps = [step_size(quality, name) for quality in QUALITIES]
    per_block = [
        entropy.histograms(quantize(coefficients, step))
        for block in blocks[:: -(-len(blocks) // TABLE_BLOCKS)]
        for step, coefficients in zip(steps, learnt.project_at(mx.array(block), steps))
    ]
    histograms = np.concatenate(per_block)
    return entropy.learn_tables(histograms[np.random.default_rng(seed).permutation(len(histograms))[:MAX_HISTOGRAMS]])


def _empty_stream() -> KVTCRDStream:
    """Return the artifacts of a stream of width 0."""
    none, tables = np.zeros(0, np.float32), np.zeros((entropy.CLASSES, 256), np.uint16)
    return KVTCRDStream(
        none, none.astype(np.uint8), none, none, np.zeros((0, 0, 0), np.float16), none.reshape(0, 0), tables
    )


def _apply_gains(rows: Any, gains: Any) -> Any:
    """Multiply each head's part of rows `[n, p]` by its gain `[n, heads]`."""
    return (rows.reshape(*gains.shape, -1) * gains[..., None]).reshape(rows.shape)


def _used_components(integers: np.ndarray) -> int:
    """Return the number of components up to the last that is not all zeros."""
    return int(np.flatnonzero(np.r_[True, integers.any(axis=0)])[-1])

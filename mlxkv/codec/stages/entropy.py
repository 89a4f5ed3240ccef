"""Entropy coding of quantized coefficients: static tables, chosen for a block by what is in it.

A table stands for a class of components, by how large their integers are. A block names the class of each of its
components, so that it follows its file where that is unlike the calibration, and a shift for each token, since some are
larger than others in all components alike: what is coded with table class + shift needs no other symbol to be decoded,
so lanes stay parallel. Tables are learnt in calibration and kept as integers: every device reads the same.

A component's class 0 is all zeros and costs nothing more.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import NamedTuple

import numpy as np

from mlxkv.errors import FormatError, InputError
from mlxkv.kernels import rans

CLASSES = 64  # tables; with class 0 one more
SHIFTS = 4  # a token's classes may be so many higher or lower
MAX_MAGNITUDE = 127
ESCAPE = 255  # the symbol of what has none: the value follows in 32 bits
# Of the symbols: 0, 1, -1, 2, -2, ...
_VALUES = (np.arange(256, dtype=np.int32) + 1) // 2 * np.tile(np.array([-1, 1], np.int32), 128)
_MISSING_BITS = 32.0 + rans.SCALE_BITS
_ROUNDS = 12  # of Lloyd's algorithm
_LEAST = 2.0**-15  # of a table's sum: what is rarer is escaped, as 1/4096 is the least frequency there is
_TAIL = 0.01  # share of a table that goes to a geometric tail, for magnitudes that calibration has not seen
_LANE_BYTES = 512  # coded bytes to a lane, whose state and count take about 5
_LANE_SYMBOLS = 2**15  # at most: bounds a reader's steps and keeps counts in 16 bits
_MOST_FILLED = 4  # times the symbols that there are, to decode sections together
_HEADER = struct.Struct("<III")  # lanes, escaped values, bytes of the deflated model


def histograms(integers: np.ndarray) -> np.ndarray:
    """How often each magnitude occurs in each component of integers `[n, r]`: int64 `[r, 129]`, the last for beyond."""
    magnitudes = np.minimum(np.abs(integers), MAX_MAGNITUDE + 1)
    width = MAX_MAGNITUDE + 2
    places = magnitudes + width * np.arange(integers.shape[1])
    return np.bincount(places.ravel(), minlength=width * integers.shape[1]).reshape(-1, width)


def learn_tables(samples: np.ndarray) -> np.ndarray:
    """Tables `[64, 256]` uint16 from histograms `[N, 129]` of components in blocks at several steps; smallest first.

    Lloyd's algorithm in code length, from classes that are equally wide in the logarithm of the mean magnitude.
    Raises InputError when nothing but zeros was seen.
    """
    samples = samples[samples[:, 1:].any(axis=1)].astype(np.float64)
    if not len(samples):
        raise InputError("no table can be learnt from coefficients that are all zero")
    means = np.log((samples @ np.arange(samples.shape[1])) / samples.sum(axis=1))
    edges = np.linspace(means.min(), means.max(), CLASSES + 1)[1:-1]
    centers = np.exp(np.r_[means.min(), (edges[1:] + edges[:-1]) / 2, means.max()])
    chosen = np.searchsorted(edges, means)
    for _ in range(_ROUNDS):
        tables = _tables(np.stack([samples[chosen == k].sum(axis=0) for k in range(CLASSES)]), centers)
        chosen = (samples @ _magnitude_bits(tables).T).argmin(axis=1)
    return tables[np.argsort(tables @ ((np.arange(256) + 1) // 2 % (MAX_MAGNITUDE + 1)), kind="stable")]


def _tables(counts: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Frequencies from magnitudes' counts `[K, 129]`; a class that nothing fell into has its tail alone."""
    magnitudes = np.arange(counts.shape[1])
    total = counts.sum(axis=1, keepdims=True)
    means = np.where(total > 0, counts @ magnitudes[:, None] / np.maximum(total, 1), centers[:, None])
    tail = (means / (1 + means)) ** magnitudes / (1 + means)  # geometric, of the same mean
    shares = np.where(total > 0, (1 - _TAIL) * counts / np.maximum(total, 1) + _TAIL * tail, tail)
    signed = np.zeros((len(counts), 256))
    signed[:, 0], signed[:, ESCAPE] = shares[:, 0], shares[:, -1]
    signed[:, 1:ESCAPE:2] = signed[:, 2:ESCAPE:2] = shares[:, 1:-1] / 2
    signed[signed < _LEAST] = 0
    signed[:, ESCAPE] = np.maximum(signed[:, ESCAPE], _LEAST)
    return rans.frequencies(np.rint(signed * 2.0**30).astype(np.int64))


def _magnitude_bits(tables: np.ndarray) -> np.ndarray:
    """Bits of each magnitude with its sign, `[K, 129]`; what a table lacks is escaped."""
    bits = _symbol_bits(tables)
    return np.concatenate([bits[:, :1], bits[:, 1:ESCAPE:2], np.full((len(tables), 1), _MISSING_BITS)], axis=1)


def _symbol_bits(tables: np.ndarray) -> np.ndarray:
    bits = rans.SCALE_BITS - np.log2(np.maximum(tables, 1))
    return np.where(tables > 0, bits, _MISSING_BITS)


@dataclass(frozen=True)
class _BlockPlan:
    """classes: `[r]`, 0 for what is not coded. symbols, which, escaped: `[n, coded]`. shifts: `[n]`."""

    classes: np.ndarray
    symbols: np.ndarray
    which: np.ndarray
    shifts: np.ndarray
    escaped: np.ndarray
    bits: float
    lanes: int


def _plan_block(integers: np.ndarray, tables: np.ndarray) -> _BlockPlan:
    counts = histograms(integers)
    classes = np.where(counts[:, 1:].any(axis=1), (counts @ _magnitude_bits(tables).T).argmin(axis=1) + 1, 0)
    coded = np.flatnonzero(classes)
    values = integers[:, coded]
    symbols = (2 * np.minimum(np.abs(values), MAX_MAGNITUDE) - (values > 0)).astype(np.uint8)
    shifts = _best_shifts(symbols, classes[coded] - 1, tables)
    which = _tables_of(classes[coded] - 1, shifts)
    escaped = tables[which, symbols] == 0
    escaped |= np.abs(values) > MAX_MAGNITUDE
    symbols[escaped] = ESCAPE
    bits = float(_symbol_bits(tables)[which, symbols].sum())
    lanes = max(1, -(-symbols.size // _LANE_SYMBOLS), int(bits) // (8 * _LANE_BYTES))
    return _BlockPlan(classes, symbols, which, shifts, escaped, bits, lanes)


def estimate(integers: np.ndarray, tables: np.ndarray) -> float:
    """About how many bytes `encode` makes, from code lengths alone."""
    plan = _plan_block(integers, tables)
    return plan.bits / 8 + len(integers) + 4 * plan.escaped.sum() + 5 * plan.lanes + plan.classes.size / 3


def encode(integers: np.ndarray, tables: np.ndarray) -> bytes:
    """Integers `[n, r]` int32 above -2**31, tokens by components, to bytes that `decode` with the same tables reads."""
    plan = _plan_block(integers, tables)
    streams = rans.encode(plan.symbols.ravel(), tables, plan.which.ravel(), 1, plan.lanes)
    words = streams.counts.astype("<u2").tobytes()
    deltas = np.diff(plan.classes, prepend=0).astype(np.uint8).tobytes()
    model = zlib.compress(deltas + words[::2] + words[1::2], 9)  # all low bytes, then all high ones
    escaped = integers[:, np.flatnonzero(plan.classes)][plan.escaped]
    parts = [
        _HEADER.pack(plan.lanes, len(escaped), len(model)),
        model,
        plan.shifts.astype(np.int8).tobytes(),
        escaped.astype("<i4").tobytes(),
        streams.states.astype("<u4").tobytes(),
        streams.words.astype("<u2").tobytes(),
    ]
    return b"".join(parts)


class Section(NamedTuple):
    """What `encode` made of integers `[tokens, components]` with these tables."""

    data: bytes
    tables: np.ndarray
    tokens: int
    components: int


def decode(sections: Sequence[Section]) -> list[np.ndarray]:
    """The integers `[tokens, components]` int32 that `encode` got, of each section; of three different tables at most.

    All lanes take their steps together: those of one section are too few to keep a device busy. Raises FormatError for
    damaged bytes; memory is bounded by tokens and components, and steps by the length of data.
    """
    read = [_parse_section(section) for section in sections]
    lanes, steps = [each.streams.states.size for each in read], max(each.steps for each in read)
    if len(read) > 1 and steps * sum(lanes) > _MOST_FILLED * sum(each.which.size for each in read):
        return [decode([section])[0] for section in sections]
    kinds = list({id(section.tables): section.tables for section in sections}.values())
    certain = np.zeros((1, 256), np.uint16)  # its symbol 0 changes no state and takes no word: fills up what is shorter
    certain[0, 0] = rans.TOTAL
    columns = []
    for section, each, count in zip(sections, read, lanes):
        column = np.full(steps * count, len(kinds) * CLASSES, np.uint8)
        kind = next(i for i, tables in enumerate(kinds) if tables is section.tables)
        column[: each.which.size] = each.which + np.uint8(kind * CLASSES)
        columns.append(column.reshape(steps, count))
    which = np.hstack(columns)
    streams = rans.Streams(*(np.concatenate(parts) for parts in zip(*(astuple(each.streams) for each in read))))
    symbols = rans.decode(streams, np.concatenate([*kinds, certain]), which.ravel(), 1, which.size).reshape(which.shape)
    parts = np.split(symbols, np.cumsum(lanes)[:-1], axis=1)
    return [_integers(section, each, part.ravel()) for section, each, part in zip(sections, read, parts)]


@dataclass(frozen=True)
class _ParsedSection:
    """coded: components of a class other than 0. which: `[n * coded]`, the table of each symbol. escaped: `[e]`."""

    coded: np.ndarray
    which: np.ndarray
    streams: rans.Streams
    escaped: np.ndarray

    @property
    def steps(self) -> int:
        return -(-self.which.size // self.streams.states.size)


def _parse_section(section: Section) -> _ParsedSection:
    data, tokens = section.data, section.tokens
    if len(data) < _HEADER.size:
        raise FormatError("the coded coefficients are truncated")
    lanes, escapes, length = _HEADER.unpack_from(data)
    starts = np.cumsum([_HEADER.size, length, tokens, 4 * escapes, 4 * lanes])
    if starts[-1] > len(data) or (len(data) - starts[-1]) % 2:
        raise FormatError(f"the coded coefficients claim {lanes} lanes, {escapes} escapes, {length} bytes of classes")
    classes, counts = _parse_model(data[starts[0] : starts[1]], section.components, lanes)
    shifts = np.frombuffer(data, np.int8, tokens, starts[1])
    if np.abs(shifts.astype(int)).max(initial=0) > SHIFTS:
        raise FormatError(f"shifts of coded coefficients are -{SHIFTS} to {SHIFTS}")
    coded = np.flatnonzero(classes)
    size = tokens * len(coded)
    if lanes < 1 or lanes * _LANE_SYMBOLS < size:
        raise FormatError(f"{size} coefficients in {lanes} lanes: too many to a lane")
    streams = rans.Streams(
        words=np.frombuffer(data, "<u2", offset=starts[4]).astype(np.uint16),
        counts=counts,
        states=np.frombuffer(data, "<u4", lanes, starts[3]).astype(np.uint32),
    )
    which = _tables_of(classes[coded].astype(int) - 1, shifts).ravel()
    return _ParsedSection(coded, which, streams, np.frombuffer(data, "<i4", escapes, starts[2]))


def _integers(section: Section, read: _ParsedSection, symbols: np.ndarray) -> np.ndarray:
    """From one section's symbols, and what fills them up behind."""
    found = np.zeros((section.tokens, int(np.r_[-1, read.coded][-1]) + 1), np.uint8)
    found[:, read.coded] = symbols[: read.which.size].reshape(section.tokens, len(read.coded))
    integers = np.zeros((section.tokens, section.components), np.int32)
    integers[:, : found.shape[1]] = _VALUES.take(found)
    escaped = found == ESCAPE
    if np.count_nonzero(escaped) != read.escaped.size:
        raise FormatError(f"{read.escaped.size} escaped coefficients do not fit the {np.count_nonzero(escaped)} coded")
    integers[:, : found.shape[1]][escaped] = read.escaped
    return integers


def _parse_model(data: bytes, components: int, lanes: int) -> tuple[np.ndarray, np.ndarray]:
    """Classes `[r]`, and how many words each lane has, `[lanes]` uint32."""
    inflater = zlib.decompressobj()
    try:
        model = inflater.decompress(data, components + 2 * lanes + 1)
    except zlib.error as error:
        raise FormatError(f"the classes of coded coefficients do not inflate: {error}") from None
    if len(model) != components + 2 * lanes or not inflater.eof or inflater.unused_data:
        raise FormatError(f"the classes of coded coefficients are not of {components} components and {lanes} lanes")
    classes = np.cumsum(np.frombuffer(model, np.uint8, components), dtype=np.uint8)
    if classes.max(initial=0) > CLASSES:
        raise FormatError(f"classes of coded coefficients are 0 to {CLASSES}, not {classes.max()}")
    planes = np.frombuffer(model, np.uint8, 2 * lanes, components).astype(np.uint32)
    return classes, planes[:lanes] | planes[lanes:] << 8


def _tables_of(classes: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """The table of each token and component, uint8 `[n, r]`."""
    return (classes + shifts[:, None].astype(int)).clip(0, CLASSES - 1).astype(np.uint8)


def _best_shifts(symbols: np.ndarray, classes: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """The shift of each token that makes its code shortest, judged by every fourth component; int `[n]`."""
    prices = _symbol_bits(tables).astype(np.float32)
    shifts = np.array(sorted(range(-SHIFTS, SHIFTS + 1), key=abs))
    judged = symbols[:, ::4].T
    bits = [np.zeros(len(symbols), np.float32) for _ in shifts]
    for total, shift in zip(bits, shifts):
        rows = prices[(classes[::4] + shift).clip(0, CLASSES - 1)]
        total += np.take_along_axis(rows, judged, axis=1).sum(axis=0)
    return shifts[np.argmin(bits, axis=0)]

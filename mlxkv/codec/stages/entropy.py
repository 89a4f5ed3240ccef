"""Entropy coding of quantized coefficients with static frequency tables, chosen for each block by its contents.

There is one table for each class of components; classes are ordered by the size of the integers. A block stores the class of
each of its components, so that it adapts to text unlike the calibration, and a shift for each token. The shift here is an
offset on the table index, not on values: some tokens are larger than others in all components alike. A symbol is coded with
table class + shift and needs no other symbol to be decoded, so lanes stay parallel. Tables are learnt in calibration and
stored as integers, so every device decodes the same values.

Components of class 0 are all zeros and have no symbols.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from mlxkv.errors import FormatError, InputError
from mlxkv.kernels import rans

CLASSES = 64  # of components that are not all zeros, one table per class; class 0 has none
SHIFTS = 4  # largest shift of a token: an offset on table indices, up or down
MAX_MAGNITUDE = 127  # largest magnitude that has a symbol of its own
ESCAPE = 255  # symbol of values without one: they are stored apart in 32 bits
# The symbols stand for 0, 1, -1, 2, -2, ...
_SYMBOL_VALUES = ((np.arange(256) + 1) // 2 * np.tile([-1, 1], 128)).astype(np.int8)
_MISSING_BITS = 32.0 + rans.SCALE_BITS
_LLOYD_ROUNDS = 12  # of Lloyd's algorithm
_MIN_SHARE = 2.0**-15  # of a table: rarer symbols are escaped, as 1/4096 is the smallest frequency
_TAIL_SHARE = 0.01  # of a table is given to a geometric tail, for magnitudes that did not occur in calibration
_LANE_BYTES = 512  # coded bytes per lane; its state and word count take about 5
_LANE_SYMBOLS = 2**15  # per lane, at most: bounds a reader's steps and keeps word counts in 16 bits
_MAX_PADDING = 4  # times the coded symbols; with more padding, sections are decoded one by one
WIDE_SHIFTS = 63  # largest shift with even tables, where tokens may be of very different sizes
_LEAST_VARIANCE = 1 << 10  # of even tables, in 2**-16 squared steps: a standard deviation of 1/8
_CUBE_ROOTS = (65536, 82570, 104032)
_NEAR, _FAR = 8, 1000  # magnitudes of whose intervals ten points are taken; magnitudes that are counted
_LEAST_COUNT = 1 << 15  # of 2**30: as _MIN_SHARE
_FIT_ROUNDS, _FLOOR = 3, 2.0**-20
_HEADER = struct.Struct("<III")  # lanes, escaped values, bytes of the deflated model


def histograms(integers: np.ndarray) -> np.ndarray:
    """Count how often each magnitude occurs in each component.

    Parameters
    ----------
    integers
        Quantized coefficients `[n, r]`, tokens by components.

    Returns
    -------
    np.ndarray
        Counts `[r, 129]` int64 of magnitudes 0 to 127, and in the last column of all larger ones.

    Examples
    --------
    >>> histograms(np.array([[0, 200], [-1, 0]]))[:, [0, 1, 128]].tolist()
    [[1, 1, 0], [1, 0, 1]]
    """
    magnitudes = np.minimum(np.abs(integers), MAX_MAGNITUDE + 1)
    width = MAX_MAGNITUDE + 2
    places = magnitudes + width * np.arange(integers.shape[1])
    return np.bincount(places.ravel(), minlength=width * integers.shape[1]).reshape(-1, width)


def learn_tables(samples: np.ndarray) -> np.ndarray:
    """Learn the tables of all classes.

    Parameters
    ----------
    samples
        Histograms `[N, 129]` of components in blocks at several steps.

    Returns
    -------
    np.ndarray
        Frequencies `[64, 256]` uint16, smallest coefficients first.

    Raises
    ------
    InputError
        When all samples are zero.

    Notes
    -----
    Lloyd's algorithm with code length as the distance, starting from classes of equal width in the logarithm of the mean
    magnitude.
    """
    samples = samples[samples[:, 1:].any(axis=1)].astype(np.float64)
    if not len(samples):
        raise InputError("no table can be learnt from coefficients that are all zero")
    means = np.log((samples @ np.arange(samples.shape[1])) / samples.sum(axis=1))
    edges = np.linspace(means.min(), means.max(), CLASSES + 1)[1:-1]
    centers = np.exp(np.r_[means.min(), (edges[1:] + edges[:-1]) / 2, means.max()])
    chosen = np.searchsorted(edges, means)
    for _ in range(_LLOYD_ROUNDS):
        tables = _frequency_tables(np.stack([samples[chosen == k].sum(axis=0) for k in range(CLASSES)]), centers)
        chosen = (samples @ _magnitude_bits(tables).T).argmin(axis=1)
    return tables[np.argsort(tables @ ((np.arange(256) + 1) // 2 % (MAX_MAGNITUDE + 1)), kind="stable")]


def _frequency_tables(counts: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Return frequencies from counts of magnitudes `[K, 129]`; a class without samples gets a geometric tail only."""
    magnitudes = np.arange(counts.shape[1])
    total = counts.sum(axis=1, keepdims=True)
    means = np.where(total > 0, counts @ magnitudes[:, None] / np.maximum(total, 1), centers[:, None])
    tail = (means / (1 + means)) ** magnitudes / (1 + means)  # geometric, of the same mean
    shares = np.where(total > 0, (1 - _TAIL_SHARE) * counts / np.maximum(total, 1) + _TAIL_SHARE * tail, tail)
    signed = np.zeros((len(counts), 256))
    signed[:, 0], signed[:, ESCAPE] = shares[:, 0], shares[:, -1]
    signed[:, 1:ESCAPE:2] = signed[:, 2:ESCAPE:2] = shares[:, 1:-1] / 2
    signed[signed < _MIN_SHARE] = 0
    signed[:, ESCAPE] = np.maximum(signed[:, ESCAPE], _MIN_SHARE)
    return rans.frequencies(np.rint(signed * 2.0**30).astype(np.int64))


@cache
def even_tables() -> np.ndarray:
    """Return tables that need no calibration: of coefficients of all sizes, each class 2**(1/6) times as large as that before.

    Returns
    -------
    np.ndarray
        Frequencies `[64, 256]` uint16, smallest coefficients first, the same on every machine: they are made of integers alone.
        Coefficients have Student's t distribution with 9 degrees of freedom, and the dead zone of `dead_zone`.
    """
    variances = [(_LEAST_VARIANCE * _CUBE_ROOTS[k % 3]) << k // 3 for k in range(CLASSES)]  # in 2**-32 squared steps
    return rans.frequencies(np.array([_student_counts(variance) for variance in variances], np.int64))


def _student_counts(variance: int) -> list[int]:
    """Return counts by symbol, from densities at ten points of each small interval; the last is of all other magnitudes."""

    def density(twentieths: int) -> int:
        return (1 << 400) // (7 * variance + (twentieths**2 << 32) // 400) ** 5

    near = [
        density(2 * point + 1) for point in range(6 + 10 * _NEAR)
    ]  # a tenth of a step apart; up to 0.6 is rounded to 0
    bins = [2 * sum(near[:6]), *(sum(near[at : at + 10]) for at in range(6, len(near), 10))]
    bins += [10 * density(20 * magnitude + 2) for magnitude in range(_NEAR + 1, _FAR)]
    total = bins[0] + 2 * sum(bins[1:])
    shares = [(count << 30) // total for count in bins]
    symbols = [shares[(symbol + 1) // 2] for symbol in range(ESCAPE)]
    rest = 2 * sum(shares[MAX_MAGNITUDE + 1 :])
    return [*(count if count >= _LEAST_COUNT else 0 for count in symbols), max(_LEAST_COUNT, rest)]


class Sizes(NamedTuple):
    """Sizes of the coefficients of a block, where both components and tokens are of very different sizes.

    Parameters
    ----------
    classes
        Classes `[r]` of components, 1 to 64.
    shifts
        Offsets on table indices `[n]` of tokens.
    """

    classes: np.ndarray
    shifts: np.ndarray


def sizes_of(coefficients: np.ndarray) -> Sizes:
    """Return the sizes of coefficients for `even_tables`: a coefficient's is that of its component times that of its token.

    Parameters
    ----------
    coefficients
        Coefficients `[n, r]` float32 in steps.

    Returns
    -------
    Sizes
        Classes, and shifts from -63 to 63.
    """
    energy = np.square(coefficients)
    rows, columns = np.ones(len(energy), np.float32), np.ones(energy.shape[1], np.float32)
    for _ in range(_FIT_ROUNDS):
        columns = (1 / rows) @ energy / len(energy) + _FLOOR
        rows = energy @ (1 / columns) / energy.shape[1] + _FLOOR
        rows /= np.exp(np.log(rows).mean())
    shifts = np.rint(3 * np.log2(rows)).clip(-WIDE_SHIFTS, WIDE_SHIFTS)
    classes = np.rint(3 * np.log2(columns * 2.0**16 / _LEAST_VARIANCE)).clip(0, CLASSES - 1) + 1
    return Sizes(classes.astype(np.uint8), shifts.astype(np.int8))


def _magnitude_bits(tables: np.ndarray) -> np.ndarray:
    """Return the bits of each magnitude with its sign, `[K, 129]`; magnitudes that a table lacks are escaped."""
    bits = _symbol_bits(tables)
    return np.concatenate([bits[:, :1], bits[:, 1:ESCAPE:2], np.full((len(tables), 1), _MISSING_BITS)], axis=1)


def _symbol_bits(tables: np.ndarray) -> np.ndarray:
    """Return the bits of each symbol, `[K, 256]`."""
    bits = rans.SCALE_BITS - np.log2(np.maximum(tables, 1))
    return np.where(tables > 0, bits, _MISSING_BITS)


@dataclass(frozen=True)
class _BlockPlan:
    """Coding of a block.

    classes: `[r]`, 0 for components without symbols. symbols, table_of (index of the table), escaped: `[n, coded]`.
    shifts: `[n]`, offsets on table indices.
    """

    classes: np.ndarray
    symbols: np.ndarray
    table_of: np.ndarray
    shifts: np.ndarray
    escaped: np.ndarray
    bits: float
    lanes: int


def _plan_block(integers: np.ndarray, tables: np.ndarray, sizes: Sizes | None) -> _BlockPlan:
    """Choose classes and shifts, unless they are given, and symbols and lanes of integers `[n, r]`."""
    if sizes is None:
        counts = histograms(integers)
        classes = np.where(counts[:, 1:].any(axis=1), (counts @ _magnitude_bits(tables).T).argmin(axis=1) + 1, 0)
    else:
        classes = np.where(integers.any(axis=0), sizes.classes.astype(int), 0)
    coded = np.flatnonzero(classes)
    values = integers[:, coded]
    symbols = (2 * np.minimum(np.abs(values), MAX_MAGNITUDE) - (values > 0)).astype(np.uint8)
    shifts = _best_shifts(symbols, classes[coded] - 1, tables) if sizes is None else sizes.shifts
    table_of = _table_indices(classes[coded] - 1, shifts)
    escaped = tables[table_of, symbols] == 0
    escaped |= np.abs(values) > MAX_MAGNITUDE
    symbols[escaped] = ESCAPE
    bits = float(_symbol_bits(tables)[table_of, symbols].sum())
    lanes = max(1, -(-symbols.size // _LANE_SYMBOLS), int(bits) // (8 * _LANE_BYTES))
    return _BlockPlan(classes, symbols, table_of, shifts, escaped, bits, lanes)


def estimate(integers: np.ndarray, tables: np.ndarray, sizes: Sizes | None = None) -> float:
    """Estimate how many bytes `encode` makes, from code lengths alone.

    Parameters
    ----------
    integers
        Quantized coefficients `[n, r]` int32.
    tables
        Frequencies `[64, 256]` of `learn_tables` or `even_tables`.
    sizes
        Classes and shifts; None to choose those with the shortest code.

    Returns
    -------
    float
        Bytes.
    """
    plan = _plan_block(integers, tables, sizes)
    return float(plan.bits / 8 + len(integers) + 4 * plan.escaped.sum() + 5 * plan.lanes + plan.classes.size / 3)


def encode(integers: np.ndarray, tables: np.ndarray, sizes: Sizes | None = None) -> bytes:
    """Code integers to bytes.

    Parameters
    ----------
    integers
        Quantized coefficients `[n, r]` int32 above -2**31, tokens by components.
    tables
        Frequencies `[64, 256]` of `learn_tables` or `even_tables`.
    sizes
        Classes and shifts; None to choose those with the shortest code.

    Returns
    -------
    bytes
        A section that `decode` reads with the same tables.

    Examples
    --------
    >>> random = np.random.default_rng(0)
    >>> integers = np.rint(random.standard_normal((64, 3)) * [9, 3, 1]).astype(np.int32)
    >>> tables = learn_tables(histograms(integers))
    >>> data = encode(integers, tables)
    >>> np.array_equal(decode([Section(data, tables, tokens=64, components=3)])[0], integers)
    True
    """
    integers = integers.astype(np.int32, copy=False)  # those that `decode` returned may be narrower
    plan = _plan_block(integers, tables, sizes)
    streams = rans.encode(plan.symbols.ravel(), tables, plan.table_of.ravel(), 1, plan.lanes)
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
    """Coded integers `[tokens, components]` and the tables to decode them with.

    Parameters
    ----------
    data
        Bytes that `encode` made.
    tables
        Frequencies `[64, 256]` that it used.
    tokens
        Number of tokens n.
    components
        Number of components r.
    most_shift
        Largest shift of a token, up or down.
    """

    data: bytes
    tables: np.ndarray
    tokens: int
    components: int
    most_shift: int = SHIFTS


def decode(sections: Sequence[Section]) -> list[np.ndarray]:
    """Decode sections together, since one section has too few lanes to keep a device busy.

    Parameters
    ----------
    sections
        Coded integers, with three different tables at most.

    Returns
    -------
    list[np.ndarray]
        Integers `[tokens, components]` of each section, int8 where they fit and otherwise int32.

    Raises
    ------
    FormatError
        For damaged bytes. Memory is bounded by tokens and components, and steps by the length of the data.
    """
    parsed = [_parse_section(section) for section in sections]
    lanes, steps = [each.streams.states.size for each in parsed], max(each.steps for each in parsed)
    if len(parsed) > 1 and steps * sum(lanes) > _MAX_PADDING * sum(each.table_of.size for each in parsed):
        return [decode([section])[0] for section in sections]
    table_sets = list({id(section.tables): section.tables for section in sections}.values())
    padding = np.zeros((1, 256), np.uint16)  # its symbol 0 changes no state and reads no word: pads shorter sections
    padding[0, 0] = rans.TOTAL
    columns = []
    for section, each, count in zip(sections, parsed, lanes):
        column = np.full(steps * count, len(table_sets) * CLASSES, np.uint8)
        index = next(i for i, tables in enumerate(table_sets) if tables is section.tables)
        column[: each.table_of.size] = each.table_of + np.uint8(index * CLASSES)
        columns.append(column.reshape(steps, count))
    table_of = np.hstack(columns)
    streams = rans.Streams(*(np.concatenate(parts) for parts in zip(*(astuple(each.streams) for each in parsed))))
    tables = np.concatenate([*table_sets, padding])
    symbols = rans.decode(streams, tables, table_of.ravel(), 1, table_of.size).reshape(table_of.shape)
    parts = np.split(symbols, np.cumsum(lanes)[:-1], axis=1)
    return [_integers(section, each, part.ravel()) for section, each, part in zip(sections, parsed, parts)]


@dataclass(frozen=True)
class _ParsedSection:
    """Parts of a section. coded: components with symbols. table_of: `[n * coded]`, the table of each symbol. escaped: `[e]`."""

    coded: np.ndarray
    table_of: np.ndarray
    streams: rans.Streams
    escaped: np.ndarray

    @property
    def steps(self) -> int:
        return -(-self.table_of.size // self.streams.states.size)


def _parse_section(section: Section) -> _ParsedSection:
    """Split a section's bytes into its parts, checking each count before it allocates anything."""
    data, tokens = section.data, section.tokens
    if len(data) < _HEADER.size:
        raise FormatError("the coded coefficients are truncated")
    lanes, escapes, length = _HEADER.unpack_from(data)
    starts = np.cumsum([_HEADER.size, length, tokens, 4 * escapes, 4 * lanes])
    if starts[-1] > len(data) or (len(data) - starts[-1]) % 2:
        raise FormatError(f"the coded coefficients claim {lanes} lanes, {escapes} escapes, {length} bytes of classes")
    classes, counts = _parse_model(data[starts[0] : starts[1]], section.components, lanes)
    shifts = np.frombuffer(data, np.int8, tokens, starts[1])
    if np.abs(shifts.astype(int)).max(initial=0) > section.most_shift:
        raise FormatError(f"shifts of coded coefficients are -{section.most_shift} to {section.most_shift}")
    coded = np.flatnonzero(classes)
    size = tokens * len(coded)
    if lanes < 1 or lanes * _LANE_SYMBOLS < size:
        raise FormatError(f"{size} coefficients in {lanes} lanes: too many to a lane")
    streams = rans.Streams(
        words=np.frombuffer(data, "<u2", offset=starts[4]).astype(np.uint16),
        counts=counts,
        states=np.frombuffer(data, "<u4", lanes, starts[3]).astype(np.uint32),
    )
    table_of = _table_indices(classes[coded].astype(int) - 1, shifts).ravel()
    return _ParsedSection(coded, table_of, streams, np.frombuffer(data, "<i4", escapes, starts[2]))


def _integers(section: Section, parsed: _ParsedSection, symbols: np.ndarray) -> np.ndarray:
    """Return the integers of one section from its symbols; padding after them is ignored."""
    coded = symbols[: parsed.table_of.size].reshape(section.tokens, len(parsed.coded))
    escapes = np.count_nonzero(coded == ESCAPE)
    if escapes != parsed.escaped.size:
        raise FormatError(f"{parsed.escaped.size} escaped coefficients do not fit the {escapes} coded")
    all_symbols = coded
    if len(parsed.coded) < section.components:
        all_symbols = np.zeros((section.tokens, section.components), np.uint8)
        all_symbols[:, parsed.coded] = coded
    integers = _SYMBOL_VALUES.take(all_symbols)
    if escapes:
        integers = integers.astype(np.int32)
        integers[all_symbols == ESCAPE] = parsed.escaped
    return integers


def _parse_model(data: bytes, components: int, lanes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return classes `[r]`, and the number of words of each lane, `[lanes]` uint32."""
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


def _table_indices(classes: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Return the table of each token and component, uint8 `[n, r]`."""
    places = classes.astype(np.int8) + shifts.astype(np.int8)[:, None]  # at most 63 + WIDE_SHIFTS
    return np.minimum(np.maximum(places, 0, out=places), CLASSES - 1, out=places).view(np.uint8)


def _best_shifts(symbols: np.ndarray, classes: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Return each token's offset on table indices with the shortest code, judged by every fourth component; int `[n]`."""
    symbol_bits = _symbol_bits(tables).astype(np.float32)
    shifts = np.array(sorted(range(-SHIFTS, SHIFTS + 1), key=abs))
    sampled = symbols[:, ::4].T
    bits = [np.zeros(len(symbols), np.float32) for _ in shifts]
    for total, shift in zip(bits, shifts):
        rows = symbol_bits[(classes[::4] + shift).clip(0, CLASSES - 1)]
        total += np.take_along_axis(rows, sampled, axis=1).sum(axis=0)
    return shifts[np.argmin(bits, axis=0)]

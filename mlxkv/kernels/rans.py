"""Entropy coding: interleaved rANS over bytes, one lane (a GPU thread) a stream.

rANS: Duda, arXiv 1311.2540; interleaving: Giesen, arXiv 1402.3392. States have 32 bits and stay at 2**16 or above,
words have 16 bits, frequencies 12. Symbol i belongs to lane i % lanes and is coded with table which[i // chunk]: static
tables, so that lanes need nothing of each other. Integers only: every device makes and reads the same words.

Departure from Giesen: lanes do not share one stream of words but have their own, back to back, because GPU threads
of different groups cannot agree on whose word is next. That costs each lane a count of its words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxkv.errors import FormatError, InputError
from mlxkv.kernels import metal
from mlxkv.kernels.metal import Kernel
from mlxkv.kernels.operations import Example, Operation, register

SCALE_BITS = 12
TOTAL = 1 << SCALE_BITS  # every table's sum
LOW = 1 << 16  # the smallest state, with which lanes begin to encode and end to decode
MAX_TABLES = 256
MAX_SYMBOLS = 2**31  # the kernels count symbols in 32 bits
_BLOCK = 1 << 16  # symbols that the reference looks up at once
_ENCODE = Kernel("rans_encode", ("symbols", "table", "which", "params"), ("low", "pushed", "states"))
_DECODE = Kernel(
    "rans_decode", ("words", "starts", "states", "table", "which", "params"), ("symbols", "final_states", "ends")
)


@dataclass(frozen=True)
class Streams:
    """What `encode` makes. words: `[W]` uint16, lane after lane, each in the order of reading; counts: `[lanes]`
    uint32, words of each lane; states: `[lanes]` uint32, the state each lane starts to decode from."""

    words: np.ndarray
    counts: np.ndarray
    states: np.ndarray


def frequencies(counts: np.ndarray) -> np.ndarray:
    """Tables `[K, 256]` uint16 that sum to 4,096 from histograms `[K, 256]`, each symbol that occurs at least 1.

    Sainte-Lague apportionment, which minimises the code length up to the step from log(1 + 1/f) to 1 / (f + 1/2).
    Integers and ties to the lower symbol: equal counts give equal tables everywhere. An empty histogram gives all
    to symbol 0. Raises InputError for another shape, negative counts or a sum above 2**40.
    """
    wide = np.asarray(counts).astype(np.int64)
    if wide.ndim != 2 or wide.shape[1] != 256 or wide.min(initial=0) < 0 or wide.max(initial=0) > 2**40:
        raise InputError(f"histograms are [K, 256] counts from 0 to 2**40, not {wide.shape}")
    wide[wide.sum(1) == 0, 0] = 1
    total = wide.sum(1, keepdims=True)
    if total.max(initial=0) > 2**40:
        raise InputError("a histogram may count at most 2**40 symbols")
    table = np.maximum((wide * TOTAL + total // 2) // total, wide > 0)
    while (off := TOTAL - table.sum(1)).any():
        short, long = np.flatnonzero(off > 0), np.flatnonzero(off < 0)
        gain = (wide[short] << 20) // (2 * table[short] + 1)
        table[short, gain.argmax(1)] += 1
        loss = np.where(table[long] > 1, (wide[long] << 20) // (2 * table[long] - 1), np.iinfo(np.int64).max)
        table[long, loss.argmin(1)] -= 1
    return table.astype(np.uint16)


def encode(symbols: np.ndarray, tables: np.ndarray, which: np.ndarray, chunk: int, lanes: int) -> Streams:
    """Code symbols `[N]` uint8 with tables `[K, 256]` uint16, which `[ceil(N / chunk)]` uint8 tells whose turn it is.

    Raises InputError for tables that do not sum to 4,096, shapes that do not fit, and a symbol of frequency 0.
    """
    return (metal_encode if metal.available() else reference_encode)(symbols, tables, which, chunk, lanes)


def decode(streams: Streams, tables: np.ndarray, which: np.ndarray, chunk: int, size: int) -> np.ndarray:
    """The inverse of `encode`: symbols `[size]` uint8.

    Reads nothing out of bounds, whatever it is given. Raises FormatError for tables or shapes that do not fit, and
    for lanes that do not end in state 2**16 exactly at the end of their words.
    """
    return (metal_decode if metal.available() else reference_decode)(streams, tables, which, chunk, size)


def reference_encode(symbols: np.ndarray, tables: np.ndarray, which: np.ndarray, chunk: int, lanes: int) -> Streams:
    """`encode` in NumPy: a loop over steps, all lanes at once."""
    _check_symbols(symbols, tables, which, chunk, lanes)
    table, states = _encode_table(tables), np.full(lanes, LOW, np.uint32)
    low, pushed = np.empty(symbols.size, np.uint16), np.empty(symbols.size, bool)
    shift, quotient = np.empty_like(states), np.empty_like(states)
    for start, stop in reversed(list(_blocks(symbols.size, lanes))):
        entries = table[_per_symbol(which, chunk, start, stop) * 256 + symbols[start:stop]]
        frequency, first = entries & 0xFFFF, entries >> 16
        if not frequency.all():
            raise InputError("a symbol has frequency 0 in its table")
        rest = TOTAL - frequency
        for step in range((stop - start - 1) // lanes, -1, -1):
            there = slice(step * lanes, min((step + 1) * lanes, stop - start))
            here = slice(start + there.start, start + there.stop)
            f, full, width = frequency[there], pushed[here], there.stop - there.start
            x, s, q = states[:width], shift[:width], quotient[:width]
            np.greater_equal(np.right_shift(x, 20, out=s), f, out=full)
            low[here] = x & 0xFFFF
            np.right_shift(x, np.left_shift(full.view(np.uint8), 4, out=s), out=x)
            np.multiply(np.floor_divide(x, f, out=q), rest[there], out=q)
            np.add(np.add(x, q, out=x), first[there], out=x)
    return _compact(low, pushed, states)


def metal_encode(symbols: np.ndarray, tables: np.ndarray, which: np.ndarray, chunk: int, lanes: int) -> Streams:
    """`encode` by the kernel."""
    _check_symbols(symbols, tables, which, chunk, lanes)
    if symbols.size == 0:
        return _compact(np.empty(0, np.uint16), np.empty(0, bool), np.full(lanes, LOW, np.uint32))
    low, pushed, states = _ENCODE(
        inputs=[
            mx.array(symbols),
            mx.array(_encode_table(tables)),
            mx.array(which),
            mx.array([symbols.size, chunk, lanes], mx.uint32),
        ],
        grid=(lanes, 1, 1),
        threadgroup=(min(lanes, 64), 1, 1),
        output_shapes=[symbols.shape, symbols.shape, (lanes,)],
        output_dtypes=[mx.uint16, mx.uint8, mx.uint32],
    )
    if not np.array(states).all():
        raise InputError("a symbol has frequency 0 in its table")
    return _compact(np.array(low), np.array(pushed).view(bool), np.array(states))


def reference_decode(streams: Streams, tables: np.ndarray, which: np.ndarray, chunk: int, size: int) -> np.ndarray:
    """`decode` in NumPy: a loop over steps, all lanes at once."""
    starts, table = _check_streams(streams, tables, which, chunk, size)
    words = streams.words.astype(np.uint32) if streams.words.size else np.zeros(1, np.uint32)
    frequencies, places = ((table >> SCALE_BITS) & (TOTAL - 1)) + 1, table & (TOTAL - 1)
    lanes, states, nexts = streams.states.size, streams.states.copy(), starts.astype(np.int64)
    full, part, grown = np.empty(lanes, bool), np.empty_like(states), np.empty_like(states)
    symbols = np.empty(size, np.uint8)
    for start, stop in _blocks(size, lanes):
        slots = _per_symbol(which, chunk, start, stop) << SCALE_BITS
        for first in range(0, stop - start, lanes):
            slot = slots[first : first + lanes]
            x, n, f, p, g = (a[: slot.size] for a in (states, nexts, full, part, grown))
            np.bitwise_or(slot, np.bitwise_and(x, TOTAL - 1, out=p), out=slot)
            np.multiply(np.right_shift(x, SCALE_BITS, out=x), frequencies.take(slot, out=p, mode="clip"), out=x)
            np.add(x, places.take(slot, out=p, mode="clip"), out=x)
            # Every lane looks at its next word, those whose state is low take it.
            np.bitwise_or(np.left_shift(x, 16, out=g), words.take(n, out=p, mode="clip"), out=g)
            np.copyto(x, g, where=np.less(x, LOW, out=f))
            np.add(n, f, out=n)
        symbols[start:stop] = table[slots] >> 24
    _check_ends(streams, starts, states, nexts)
    return symbols


def metal_decode(streams: Streams, tables: np.ndarray, which: np.ndarray, chunk: int, size: int) -> np.ndarray:
    """`decode` by the kernel."""
    starts, table = _check_streams(streams, tables, which, chunk, size)
    if size == 0:
        _check_ends(streams, starts, streams.states, starts)
        return np.empty(0, np.uint8)
    words, lanes = streams.words if streams.words.size else np.zeros(1, np.uint16), streams.states.size
    symbols, states, ends = _DECODE(
        inputs=[
            mx.array(words),
            mx.array(starts),
            mx.array(streams.states),
            mx.array(table),
            mx.array(which),
            mx.array([size, chunk, lanes, words.size - 1], mx.uint32),
        ],
        grid=(lanes, 1, 1),
        threadgroup=(min(lanes, 64), 1, 1),
        output_shapes=[(size,), (lanes,), (lanes,)],
        output_dtypes=[mx.uint8, mx.uint32, mx.uint32],
    )
    _check_ends(streams, starts, np.array(states), np.array(ends))
    return np.array(symbols)


def _blocks(size: int, lanes: int) -> Iterator[tuple[int, int]]:
    """Start and stop of runs of whole steps, about _BLOCK symbols each."""
    block = max(1, _BLOCK // lanes) * lanes
    return ((start, min(start + block, size)) for start in range(0, size, block))


def _per_symbol(which: np.ndarray, chunk: int, start: int, stop: int) -> np.ndarray:
    """The table of each of the symbols start .. stop, int64."""
    return which[np.arange(start, stop) // chunk].astype(np.int64)


def _encode_table(tables: np.ndarray) -> np.ndarray:
    """`[K * 256]` uint32: the frequencies before a symbol's in the high half, its own in the low half."""
    wide = tables.astype(np.uint32)
    return (((wide.cumsum(1, dtype=np.uint32) - wide) << 16) | wide).ravel()


def _decode_table(tables: np.ndarray) -> np.ndarray:
    """`[K * 4096]` uint32, a slot each: symbol (8 bits), frequency - 1 (12), the slot's place in its symbol (12)."""
    wide = tables.astype(np.uint32)
    entries = np.tile(np.arange(256, dtype=np.uint32), len(wide)) << 24 | ((wide - 1) << SCALE_BITS).ravel()
    firsts = np.repeat((wide.cumsum(1, dtype=np.uint32) - wide).ravel(), wide.ravel())
    slots = np.tile(np.arange(TOTAL, dtype=np.uint32), len(wide))
    return np.repeat(entries, wide.ravel()) | (slots - firsts)


def _compact(low: np.ndarray, pushed: np.ndarray, states: np.ndarray) -> Streams:
    """The words that were pushed, lane after lane, from each symbol's candidate."""
    lanes, missing = states.size, -low.size % states.size
    kept = np.ascontiguousarray(np.pad(pushed, (0, missing)).reshape(-1, lanes).T)
    words = np.ascontiguousarray(np.pad(low, (0, missing)).reshape(-1, lanes).T)[kept]
    return Streams(words, kept.sum(1, dtype=np.uint32), states)


def _check_model(
    tables: np.ndarray, which: np.ndarray, chunk: int, lanes: int, size: int, error: type[Exception]
) -> None:
    if tables.ndim != 2 or tables.shape[1] != 256 or not 1 <= len(tables) <= MAX_TABLES or tables.dtype != np.uint16:
        raise error(f"frequency tables are [1 to 256, 256] uint16, not {tables.shape} {tables.dtype}")
    if (tables.sum(1, dtype=np.int64) != TOTAL).any():
        raise error(f"frequencies of a table must sum to {TOTAL}")
    if not (1 <= chunk < MAX_SYMBOLS and 1 <= lanes < MAX_SYMBOLS and 0 <= size < MAX_SYMBOLS):
        raise error(
            f"chunk, lanes and symbols must be below 2**31 and the first two 1 or more: {chunk}, {lanes}, {size}"
        )
    if which.shape != (-(-size // chunk),) or which.dtype != np.uint8 or which.max(initial=0) >= len(tables):
        raise error(f"{size} symbols in chunks of {chunk} do not fit the choice of tables")


def _check_symbols(symbols: np.ndarray, tables: np.ndarray, which: np.ndarray, chunk: int, lanes: int) -> None:
    if symbols.ndim != 1 or symbols.dtype != np.uint8:
        raise InputError(f"symbols are [N] uint8, not {symbols.shape} {symbols.dtype}")
    _check_model(tables, which, chunk, lanes, symbols.size, InputError)


def _check_streams(
    streams: Streams, tables: np.ndarray, which: np.ndarray, chunk: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where each lane's words start, uint32, and the decoding table."""
    _check_model(tables, which, chunk, streams.states.size, size, FormatError)
    kinds = [str(part.dtype) for part in (streams.words, streams.counts, streams.states)]
    if kinds != ["uint16", "uint32", "uint32"]:
        raise FormatError(f"words, counts and states are uint16, uint32 and uint32, not {', '.join(kinds)}")
    ends = streams.counts.cumsum(dtype=np.int64)
    if streams.counts.shape != streams.states.shape or ends[-1] != streams.words.size:
        raise FormatError(f"the lanes' {ends[-1]} words are not the {streams.words.size} that there are")
    return (ends - streams.counts).astype(np.uint32), _decode_table(tables)


def _check_ends(streams: Streams, starts: np.ndarray, states: np.ndarray, ends: np.ndarray) -> None:
    if (states != LOW).any() or (ends != starts + streams.counts).any():
        raise FormatError("the entropy-coded words are damaged: a lane does not end where it began")


def _example(tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, int]:
    """1,024 bytes a token from one table."""
    symbols = np.minimum(np.random.default_rng(0).geometric(0.2, tokens * 1024), 255).astype(np.uint8)
    tables = frequencies(np.bincount(symbols, minlength=256)[None])
    return symbols, tables, np.zeros(-(-symbols.size // 4096), np.uint8), 4096, 4096


def _example_streams(tokens: int) -> tuple:
    symbols, *model, _ = _example(tokens)
    return reference_encode(*_example(tokens)), *model, symbols.size


register(
    Operation(
        "rans.encode", encode, reference_encode, metal_encode, (Example("1,024 bytes a token, 4,096 lanes", _example),)
    )
)
register(
    Operation(
        "rans.decode",
        decode,
        reference_decode,
        metal_decode,
        (Example("1,024 bytes a token, 4,096 lanes", _example_streams),),
    )
)

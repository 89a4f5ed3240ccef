"""Entropy coding: interleaved rANS over bytes. A lane is a sequence of symbols that one GPU thread codes on its own.

rANS: Duda, arXiv 1311.2540; interleaving: Giesen, arXiv 1402.3392. States have 32 bits and stay at 2**16 or above,
words have 16 bits, frequencies 12. Symbol i belongs to lane i % lanes and has the table
`table_of[i // chunk_size]`: static tables, so lanes are independent of each other. Integers only: every device makes
and reads the same words.

Departure from Giesen: lanes do not share one stream of words but have their own, back to back, because GPU threads
of different groups cannot agree on whose word is next. So the number of words is stored for each lane.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxkv.errors import FormatError, InputError
from mlxkv.kernels import metal
from mlxkv.kernels._rans_tables import SCALE_BITS as SCALE_BITS
from mlxkv.kernels._rans_tables import TOTAL as TOTAL
from mlxkv.kernels._rans_tables import decode_table, encode_table
from mlxkv.kernels._rans_tables import frequencies as frequencies
from mlxkv.kernels.metal import Kernel
from mlxkv.kernels.operations import Example, Operation, register

MIN_STATE = 1 << 16  # smallest state: lanes start encoding and end decoding with it
MAX_TABLES = 256
MAX_SYMBOLS = 2**31  # the kernels count symbols in 32 bits
_BLOCK = 1 << 16  # symbols that the reference looks up at once
_ENCODE = Kernel("rans_encode", ("symbols", "table", "which", "params"), ("low", "pushed", "states"))
_DECODE = Kernel(
    "rans_decode", ("words", "starts", "states", "table", "which", "params"), ("symbols", "final_states", "ends")
)


@dataclass(frozen=True)
class Streams:
    """Coded symbols, as `encode` returns them.

    Parameters
    ----------
    words
        uint16 `[W]`, lane after lane, each in the order of reading.
    counts
        uint32 `[lanes]`, words of each lane.
    states
        uint32 `[lanes]`, the state from which each lane starts to decode.
    """

    words: np.ndarray
    counts: np.ndarray
    states: np.ndarray


def encode(symbols: np.ndarray, tables: np.ndarray, table_of: np.ndarray, chunk_size: int, lanes: int) -> Streams:
    """Code bytes, each chunk of them with one of several tables.

    Parameters
    ----------
    symbols
        uint8 `[N]`, fewer than 2**31.
    tables
        uint16 `[K, 256]`, K from 1 to 256, each of which sums to 4,096.
    table_of
        uint8 `[ceil(N / chunk_size)]`, the index of each chunk's table.
    chunk_size
        Symbols of a chunk, at least 1.
    lanes
        Number of lanes that can be decoded in parallel, at least 1.

    Returns
    -------
    Streams
        Words, and each lane's count and state.

    Raises
    ------
    InputError
        For tables that do not sum to 4,096, shapes that do not fit, and a symbol of frequency 0.

    Examples
    --------
    >>> symbols = np.frombuffer(b"abracadabra" * 100, np.uint8)
    >>> tables = frequencies(np.bincount(symbols, minlength=256)[None])
    >>> table_of = np.zeros(1, np.uint8)
    >>> streams = encode(symbols, tables, table_of, chunk_size=2000, lanes=2)
    >>> symbols.nbytes, streams.words.nbytes
    (1100, 280)
    >>> decode(streams, tables, table_of, chunk_size=2000, size=1100)[:11].tobytes()
    b'abracadabra'
    """
    return (metal_encode if metal.available() else reference_encode)(symbols, tables, table_of, chunk_size, lanes)


def decode(streams: Streams, tables: np.ndarray, table_of: np.ndarray, chunk_size: int, size: int) -> np.ndarray:
    """Return the bytes that `encode` coded. It never reads out of bounds, even for damaged input.

    Parameters
    ----------
    streams
        Words, counts and states, from any source.
    tables
        See `encode`.
    table_of
        See `encode`.
    chunk_size
        See `encode`.
    size
        N, the number of symbols.

    Returns
    -------
    np.ndarray
        Symbols uint8 `[N]`.

    Raises
    ------
    FormatError
        For tables or shapes that do not fit, and for lanes that do not end in state 2**16 exactly at the end of their
        words.
    """
    return (metal_decode if metal.available() else reference_decode)(streams, tables, table_of, chunk_size, size)


def reference_encode(
    symbols: np.ndarray, tables: np.ndarray, table_of: np.ndarray, chunk_size: int, lanes: int
) -> Streams:
    """Encode in NumPy: a loop over steps, all lanes at once.

    Parameters
    ----------
    symbols, tables, table_of, chunk_size, lanes
        See `encode`.

    Returns
    -------
    Streams
        See `encode`.

    Raises
    ------
    InputError
        See `encode`.
    """
    _check_symbols(symbols, tables, table_of, chunk_size, lanes)
    table, states = encode_table(tables), np.full(lanes, MIN_STATE, np.uint32)
    low, pushed = np.empty(symbols.size, np.uint16), np.empty(symbols.size, bool)
    shift, quotient = np.empty_like(states), np.empty_like(states)
    for start, stop in reversed(list(_blocks(symbols.size, lanes))):
        entries = table[_per_symbol(table_of, chunk_size, start, stop) * 256 + symbols[start:stop]]
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


def metal_encode(symbols: np.ndarray, tables: np.ndarray, table_of: np.ndarray, chunk_size: int, lanes: int) -> Streams:
    """Encode by the kernel, one thread for each lane.

    Parameters
    ----------
    symbols, tables, table_of, chunk_size, lanes
        See `encode`.

    Returns
    -------
    Streams
        See `encode`.

    Raises
    ------
    InputError
        See `encode`.
    """
    _check_symbols(symbols, tables, table_of, chunk_size, lanes)
    if symbols.size == 0:
        return _compact(np.empty(0, np.uint16), np.empty(0, bool), np.full(lanes, MIN_STATE, np.uint32))
    low, pushed, states = _ENCODE(
        inputs=[
            mx.array(symbols),
            mx.array(encode_table(tables)),
            mx.array(table_of),
            mx.array([symbols.size, chunk_size, lanes], mx.uint32),
        ],
        grid=(lanes, 1, 1),
        threadgroup=(min(lanes, 64), 1, 1),
        output_shapes=[symbols.shape, symbols.shape, (lanes,)],
        output_dtypes=[mx.uint16, mx.uint8, mx.uint32],
    )
    if not np.array(states).all():
        raise InputError("a symbol has frequency 0 in its table")
    return _compact(np.array(low), np.array(pushed).view(bool), np.array(states))


def reference_decode(
    streams: Streams, tables: np.ndarray, table_of: np.ndarray, chunk_size: int, size: int
) -> np.ndarray:
    """Decode in NumPy: a loop over steps, all lanes at once.

    Parameters
    ----------
    streams, tables, table_of, chunk_size, size
        See `decode`.

    Returns
    -------
    np.ndarray
        See `decode`.
    """
    starts, table = _check_streams(streams, tables, table_of, chunk_size, size)
    words = streams.words if streams.words.size else np.zeros(1, np.uint16)
    symbol_of, places = (table >> 24).astype(np.uint8), table & (TOTAL - 1)
    scales = ((((table >> SCALE_BITS) & (TOTAL - 1)) + 1) << 16) | places  # frequency and place, for one look-up
    lanes, states, nexts = streams.states.size, streams.states.copy(), starts.astype(np.int64)
    low, scale, part = np.empty(lanes, bool), np.empty_like(states), np.empty_like(states)
    symbols = np.empty(size, np.uint8)
    for start, stop in _blocks(size, lanes):
        slots = _per_symbol(table_of, chunk_size, start, stop) << SCALE_BITS
        for first in range(0, stop - start, lanes):
            slot = slots[first : first + lanes]
            x, s, p = (a[: slot.size] for a in (states, scale, part))
            np.bitwise_or(slot, np.bitwise_and(x, TOTAL - 1, out=p), out=slot)
            scales.take(slot, out=s, mode="clip")
            np.multiply(np.right_shift(x, SCALE_BITS, out=x), np.right_shift(s, 16, out=p), out=x)
            np.add(x, np.bitwise_and(s, 0xFFFF, out=s), out=x)
            # Few lanes are low after a symbol, so that looking for them pays.
            empty = np.less(x, MIN_STATE, out=low[: slot.size]).nonzero()[0]
            at = nexts[empty]
            x[empty] = (x[empty] << 16) | words.take(at, mode="clip")
            nexts[empty] = at + 1
        symbols[start:stop] = symbol_of.take(slots)
    _check_ends(streams, starts, states, nexts)
    return symbols


def metal_decode(streams: Streams, tables: np.ndarray, table_of: np.ndarray, chunk_size: int, size: int) -> np.ndarray:
    """Decode by the kernel, one thread for each lane.

    Parameters
    ----------
    streams, tables, table_of, chunk_size, size
        See `decode`.

    Returns
    -------
    np.ndarray
        See `decode`.
    """
    starts, table = _check_streams(streams, tables, table_of, chunk_size, size)
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
            mx.array(table_of),
            mx.array([size, chunk_size, lanes, words.size - 1], mx.uint32),
        ],
        grid=(lanes, 1, 1),
        threadgroup=(min(lanes, 64), 1, 1),
        output_shapes=[(size,), (lanes,), (lanes,)],
        output_dtypes=[mx.uint8, mx.uint32, mx.uint32],
    )
    _check_ends(streams, starts, np.array(states), np.array(ends))
    return np.array(symbols)


def _blocks(size: int, lanes: int) -> Iterator[tuple[int, int]]:
    """Return start and stop of runs of whole steps, about _BLOCK symbols each."""
    block = max(1, _BLOCK // lanes) * lanes
    return ((start, min(start + block, size)) for start in range(0, size, block))


def _per_symbol(table_of: np.ndarray, chunk_size: int, start: int, stop: int) -> np.ndarray:
    """Return the table of each of the symbols start .. stop, int64."""
    if chunk_size == 1:
        return table_of[start:stop].astype(np.int64)
    return table_of[np.arange(start, stop) // chunk_size].astype(np.int64)


def _compact(low: np.ndarray, pushed: np.ndarray, states: np.ndarray) -> Streams:
    """Return the words that were pushed, lane after lane, from each symbol's candidate."""
    lanes, missing = states.size, -low.size % states.size
    kept = np.ascontiguousarray(np.pad(pushed, (0, missing)).reshape(-1, lanes).T)
    words = np.ascontiguousarray(np.pad(low, (0, missing)).reshape(-1, lanes).T)[kept]
    return Streams(words, kept.sum(1, dtype=np.uint32), states)


def _check_model(
    tables: np.ndarray, table_of: np.ndarray, chunk_size: int, lanes: int, size: int, error: type[Exception]
) -> None:
    if tables.ndim != 2 or tables.shape[1] != 256 or not 1 <= len(tables) <= MAX_TABLES or tables.dtype != np.uint16:
        raise error(f"frequency tables are [1 to 256, 256] uint16, not {tables.shape} {tables.dtype}")
    if (tables.sum(1, dtype=np.int64) != TOTAL).any():
        raise error(f"frequencies of a table must sum to {TOTAL}")
    if not (1 <= chunk_size < MAX_SYMBOLS and 1 <= lanes < MAX_SYMBOLS and 0 <= size < MAX_SYMBOLS):
        raise error(
            f"chunk, lanes and symbols must be below 2**31 and the first two 1 or more: {chunk_size}, {lanes}, {size}"
        )
    if (
        table_of.shape != (-(-size // chunk_size),)
        or table_of.dtype != np.uint8
        or table_of.max(initial=0) >= len(tables)
    ):
        raise error(f"{size} symbols in chunks of {chunk_size} do not fit the choice of tables")


def _check_symbols(symbols: np.ndarray, tables: np.ndarray, table_of: np.ndarray, chunk_size: int, lanes: int) -> None:
    if symbols.ndim != 1 or symbols.dtype != np.uint8:
        raise InputError(f"symbols are [N] uint8, not {symbols.shape} {symbols.dtype}")
    _check_model(tables, table_of, chunk_size, lanes, symbols.size, InputError)


def _check_streams(
    streams: Streams, tables: np.ndarray, table_of: np.ndarray, chunk_size: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return where each lane's words start, uint32, and the decoding table."""
    _check_model(tables, table_of, chunk_size, streams.states.size, size, FormatError)
    kinds = [str(part.dtype) for part in (streams.words, streams.counts, streams.states)]
    if kinds != ["uint16", "uint32", "uint32"]:
        raise FormatError(f"words, counts and states are uint16, uint32 and uint32, not {', '.join(kinds)}")
    ends = streams.counts.cumsum(dtype=np.int64)
    if streams.counts.shape != streams.states.shape or ends[-1] != streams.words.size:
        raise FormatError(f"the lanes' {ends[-1]} words are not the {streams.words.size} that there are")
    return (ends - streams.counts).astype(np.uint32), decode_table(tables)


def _check_ends(streams: Streams, starts: np.ndarray, states: np.ndarray, ends: np.ndarray) -> None:
    if (states != MIN_STATE).any() or (ends != starts + streams.counts).any():
        raise FormatError("the entropy-coded words are damaged: a lane does not end where it began")


def _example(tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, int]:
    """Return a call for 1,024 bytes per token from one table."""
    symbols = np.minimum(np.random.default_rng(0).geometric(0.2, tokens * 1024), 255).astype(np.uint8)
    tables = frequencies(np.bincount(symbols, minlength=256)[None])
    return symbols, tables, np.zeros(-(-symbols.size // 4096), np.uint8), 4096, 4096


def _example_streams(tokens: int) -> tuple:
    symbols, *model, _ = _example(tokens)
    return reference_encode(*_example(tokens)), *model, symbols.size


register(
    Operation(
        "rans.encode",
        encode,
        reference_encode,
        metal_encode,
        (Example("1,024 bytes per token, 4,096 lanes", _example),),
    )
)
register(
    Operation(
        "rans.decode",
        decode,
        reference_decode,
        metal_decode,
        (Example("1,024 bytes per token, 4,096 lanes", _example_streams),),
    )
)

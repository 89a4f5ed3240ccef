"""Lossless codings of a section's bytes. docs/format.md specifies each.

- raw: the bytes as they are.
- deflate: zlib, level 6.
- rans: interleaved rANS (mlxkv/kernels/rans.py), whose lanes a GPU decodes side by side. The bytes are first split into
  planes where that helps (all low bytes of 16-bit values, then all high bytes), then coded in chunks, each with one of a
  few tables that fit the section's own statistics.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

from mlxkv.errors import FormatError, InputError
from mlxkv.kernels.rans import TOTAL, Streams, frequencies
from mlxkv.kernels.rans import decode as rans_decode
from mlxkv.kernels.rans import encode as rans_encode

CODINGS = ("raw", "deflate", "rans")
MAX_EXPANSION = 1032  # DEFLATE's limit
CHUNK = 512  # bytes that share a table
MAX_TABLES = 32
STRIDES = (1, 2, 4)  # bytes of the values whose planes are split
_HEADER = struct.Struct("<HHII")  # stride, tables, lanes, bytes of the deflated model (tables, choices, lane lengths)
_STRIDE_GAIN = 0.99  # a wider stride must shrink the code to this share: splitting also parts related bytes
_KMEANS_ROUNDS = 3  # a fourth saves 0.01 %
_TABLE_BITS = 130 * 8  # approximate cost of one more table when deflated
_FRACTION_BITS = 12  # of a code length: whole multiples of 2**-12, so that sums are exact in any order
_MISSING_LENGTH = 64 << _FRACTION_BITS  # of a symbol that a table lacks
_LANE_CODED_BYTES = 1024  # coded bytes per lane; its state and word count add about 0.4 %
_LANE_BYTES = 2048  # decoded bytes that require one lane: bounds the expansion, by its state, and a reader's steps


def is_plausible(coding: str, size: int, stored: int) -> bool:
    """Check whether stored bytes can decode to a given size. It bounds the memory that a reader allocates.

    Parameters
    ----------
    coding
        Name of the coding, from any source.
    size
        Bytes when decoded.
    stored
        Bytes in the file.

    Returns
    -------
    bool
        False for an unknown coding and for sizes that it cannot reach.
    """
    if coding == "raw":
        return size == stored
    return coding in CODINGS and size <= MAX_EXPANSION * stored


def encode(coding: str, data: bytes) -> bytes:
    """Return the stored form of data. Safe to call from threads.

    Parameters
    ----------
    coding
        One of `CODINGS`.
    data
        Any bytes.

    Returns
    -------
    bytes
        The coded bytes, which may be longer than the data.

    Raises
    ------
    InputError
        For a coding that does not exist.

    Examples
    --------
    >>> data = bytes(range(16)) * 64
    >>> stored = encode("deflate", data)
    >>> len(stored) < 64, decode("deflate", stored, len(data)) == data
    (True, True)
    """
    if coding not in CODINGS:
        raise InputError(f"no such lossless coding: {coding!r}; there are {', '.join(CODINGS)}")
    if coding == "deflate":
        return zlib.compress(data, 6)
    return _encode_rans(data) if coding == "rans" and data else data


def decode(coding: str, stored: bytes, size: int) -> bytes:
    """Return the data that `encode` stored, within memory bounded by both sizes.

    Parameters
    ----------
    coding
        Name of the coding.
    stored
        The coded bytes, from any source.
    size
        Bytes of the data.

    Returns
    -------
    bytes
        Exactly `size` bytes.

    Raises
    ------
    FormatError
        For an unknown coding, and for bytes that do not decode to exactly `size` bytes.
    """
    if not is_plausible(coding, size, len(stored)):
        raise FormatError(f"{len(stored)} bytes coded as {coding[:20]!r} cannot hold {size} bytes")
    if coding == "deflate":
        return _inflate(stored, size)
    return _decode_rans(stored, size) if coding == "rans" and size else _check_size(stored, size)


def _check_size(stored: bytes, size: int) -> bytes:
    """Check the number of bytes stored as they are and return them."""
    if len(stored) != size:
        raise FormatError(f"{len(stored)} bytes do not decode to {size} bytes")
    return stored


def _inflate(stored: bytes, size: int) -> bytes:
    """Undo DEFLATE, never beyond the declared size."""
    inflater = zlib.decompressobj()
    try:
        data = inflater.decompress(stored, size + 1)
    except zlib.error as error:
        raise FormatError(f"it does not inflate: {error}") from None
    if len(data) != size or not inflater.eof or inflater.unused_data:
        raise FormatError(f"it does not inflate to {size} bytes")
    return data


def _encode_rans(data: bytes) -> bytes:
    """Return the header, the deflated model, the lanes' final states and their words."""
    stride = _best_stride(np.frombuffer(data, np.uint8))
    symbols = np.frombuffer(_split_planes(data, stride), np.uint8)
    chunks = -(-symbols.size // CHUNK)
    places = np.arange(symbols.size) // CHUNK * 256 + symbols
    counts = np.bincount(places, minlength=chunks * 256).reshape(chunks, 256).astype(np.float64)
    tables, which = _choose_tables(counts)
    coded = int((counts * _code_lengths(tables)[which]).sum()) >> (_FRACTION_BITS + 3)
    lanes = max(_min_lanes(len(data)), coded // _LANE_CODED_BYTES)
    streams = rans_encode(symbols, tables, which, CHUNK, lanes)
    counts_bytes = streams.counts.astype("<u4").tobytes()
    model = zlib.compress(
        _split_planes(tables.astype("<u2").tobytes(), 2) + which.tobytes() + _split_planes(counts_bytes, 4), 9
    )
    states, words = streams.states.astype("<u4").tobytes(), streams.words.astype("<u2").tobytes()
    return _HEADER.pack(stride, len(tables), lanes, len(model)) + model + states + words


def _decode_rans(stored: bytes, size: int) -> bytes:
    """Undo `_encode_rans`, checking each count before it allocates anything."""
    if len(stored) < _HEADER.size:
        raise FormatError("its rANS header is truncated")
    stride, tables, lanes, length = _HEADER.unpack_from(stored)
    model_end = _HEADER.size + length
    words_start, chunks = model_end + 4 * lanes, -(-size // CHUNK)
    fits = lanes >= _min_lanes(size) and 1 <= tables <= MAX_TABLES and words_start <= len(stored)
    if stride not in STRIDES or not fits:
        raise FormatError(
            f"its rANS header claims stride {stride}, {lanes} lanes, {tables} tables, a model of {length} bytes"
        )
    if (len(stored) - words_start) % 2:
        raise FormatError("its rANS words end in half a word")
    model = _inflate(stored[_HEADER.size : model_end], 512 * tables + chunks + 4 * lanes)
    symbols = rans_decode(
        Streams(
            words=np.frombuffer(stored, "<u2", offset=words_start).astype(np.uint16),
            counts=np.frombuffer(_join_planes(model[512 * tables + chunks :], 4), "<u4").astype(np.uint32),
            states=np.frombuffer(stored, "<u4", lanes, model_end).astype(np.uint32),
        ),
        np.frombuffer(_join_planes(model[: 512 * tables], 2), "<u2").astype(np.uint16).reshape(tables, 256),
        np.frombuffer(model, np.uint8, chunks, 512 * tables),
        CHUNK,
        size,
    )
    return _join_planes(symbols.tobytes(), stride)


def _min_lanes(size: int) -> int:
    """Return the smallest number of lanes allowed for a number of bytes."""
    return max(1, size // _LANE_BYTES)


def _best_stride(symbols: np.ndarray) -> int:
    """Return the stride whose planes have the shortest code by their own statistics."""
    best, least = 1, np.inf
    for stride in STRIDES:
        planes = [np.bincount(symbols[plane::stride], minlength=256) for plane in range(stride)]
        # Without the tables' cost small data would always look better in more planes.
        if (bits := _ideal_bits(np.array(planes)).sum() + stride * _TABLE_BITS) < _STRIDE_GAIN * least:
            best, least = stride, bits
    return best


def _split_planes(data: bytes, stride: int) -> bytes:
    """Return bytes 0, stride, 2 * stride, ..., then 1, 1 + stride, ...: similar bytes side by side."""
    return data if stride == 1 else b"".join(data[plane::stride] for plane in range(stride))


def _join_planes(data: bytes, stride: int) -> bytes:
    """Undo `_split_planes`."""
    joined, start = np.empty(len(data), np.uint8), 0
    for plane in range(stride):
        stop = start + len(joined[plane::stride])
        joined[plane::stride] = np.frombuffer(data[start:stop], np.uint8)
        start = stop
    return joined.tobytes()


def _choose_tables(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return tables `[K, 256]` uint16 for the chunks' histograms `[C, 256]` float64, and each chunk's choice `[C]` uint8.

    k-means in code length, from equal stretches of chunks; then tables are merged while that saves bits.
    """
    most = min(len(counts), MAX_TABLES)
    choice = np.arange(len(counts)) * most // len(counts)
    for _ in range(_KMEANS_ROUNDS):
        lengths = _code_lengths(frequencies(_cluster_histograms(counts, choice, most))).T
        # Few enough rows at once that BLAS starts no threads, which would compete with those that code other sections.
        choice = np.concatenate([(counts[row : row + 32] @ lengths).argmin(1) for row in range(0, len(counts), 32)])
    names = _merge_clusters(_cluster_histograms(counts, choice, most))
    left, which = np.unique(names[choice], return_inverse=True)
    return frequencies(_cluster_histograms(counts, which, len(left))), which.astype(np.uint8)


def _cluster_histograms(counts: np.ndarray, choice: np.ndarray, clusters: int) -> np.ndarray:
    """Return the summed histogram of each cluster, `[clusters, 256]`."""
    return np.stack([counts[choice == cluster].sum(0) for cluster in range(clusters)])


def _merge_clusters(sums: np.ndarray) -> np.ndarray:
    """Return the cluster that each of the clusters with histograms `[K, 256]` has become, `[K]`."""
    sums, names, bits = sums.copy(), np.arange(len(sums)), _ideal_bits(sums)
    loss = np.full((len(sums), len(sums)), np.inf)
    for i in range(len(sums)):
        loss[i, :i] = _ideal_bits(sums[i] + sums[:i]) - bits[i] - bits[:i]
    while loss.min() < _TABLE_BITS:
        gone, kept = divmod(int(loss.argmin()), len(sums))
        names[names == gone] = kept
        sums[kept] += sums[gone]
        bits[kept] = _ideal_bits(sums[kept])
        loss[gone, :] = loss[:, gone] = np.inf
        others = np.unique(names[names != kept])
        merged = _ideal_bits(sums[kept] + sums[others]) - bits[kept] - bits[others]
        loss[np.maximum(others, kept), np.minimum(others, kept)] = merged
    return names


def _ideal_bits(counts: np.ndarray) -> np.ndarray:
    """Return the code length of histograms `[..., 256]` by their own statistics, in bits."""
    total = counts.sum(-1)
    return total * np.log2(np.maximum(total, 1)) - (counts * np.log2(np.maximum(counts, 1))).sum(-1)


def _code_lengths(tables: np.ndarray) -> np.ndarray:
    """Return the code length of each symbol, `[K, 256]` float64, in units of 2**-12 bit and therefore whole numbers."""
    bits = np.log2(TOTAL) - np.log2(np.maximum(tables, 1))
    return np.where(tables > 0, np.rint(bits * (1 << _FRACTION_BITS)), _MISSING_LENGTH)

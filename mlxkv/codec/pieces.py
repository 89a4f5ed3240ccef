"""Decoding of parts whose headers were checked: entropy coding in one thread, products in another."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, groupby
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx

from mlxkv.codec import unquantized
from mlxkv.codec.layout import CodedBlock
from mlxkv.codec.reading import StoredGroup
from mlxkv.codec.stages.rows import from_plain_rows, from_rows
from mlxkv.dump import stream_key
from mlxkv.errors import FormatError
from mlxkv.io.container import Reader
from mlxkv.kernels import metal

T = TypeVar("T")
PARTS_TOGETHER = 4  # whose rANS lanes are decoded together
PIECES_AHEAD = 2  # that are entropy-decoded while others are multiplied


class Decoded(NamedTuple):
    """Keys or values of one group of layers, from one position on.

    Parameters
    ----------
    group
        Number of the group; 0 is the main one.
    name
        "k" or "v".
    first
        Position of the first token.
    array
        `[layers, 1, H, t, D]`.
    """

    group: int
    name: str
    first: int
    array: mx.array


class CheckedPart(NamedTuple):
    """A part whose header was checked.

    Parameters
    ----------
    reader
        The open container.
    stop
        Position after its last token.
    groups
        Groups of layers that have rows in it.
    blocks
        Blocks of each of them.
    """

    reader: Reader
    stop: int
    groups: list[StoredGroup]
    blocks: list[list[CodedBlock]]


def decode(parts: Sequence[CheckedPart], stop: int, dtype: mx.Dtype) -> Iterator[Decoded]:
    """Yield keys and values of parts, while a thread undoes the entropy coding of those to come.

    Parameters
    ----------
    parts
        Parts in the order of the text.
    stop
        Position after the last token to decode.
    dtype
        Type of the result.

    Yields
    ------
    Decoded
        What `mlxkv.codec.parts.decode_parts` yields.

    Raises
    ------
    FormatError
        When a part is damaged.
    """
    unpacked = _unpack(parts, stop)
    # On Metal rANS launches kernels, which have to come from this thread.
    for piece in unpacked if metal.available() else _ahead(unpacked):
        arrays = list(_restore(piece, dtype))
        oldest = _oldest(piece.group, stop)
        for each in arrays:
            first, last = max(each.first, oldest), min(each.first + each.array.shape[3], stop)
            if first < last:
                array = each.array[..., first - each.first : last - each.first, :]
                mx.async_eval(array)  # type: ignore[no-untyped-call]
                yield each._replace(first=first, array=array)


def _oldest(group: StoredGroup, stop: int) -> int:
    """Return the position of the oldest token that layers still keep before `stop`."""
    return 0 if group.group.window is None else max(0, stop - group.group.window)


class _Piece(NamedTuple):
    """A block of a group of layers that is entropy-decoded, or tokens that are stored unquantized, by stream."""

    group: StoredGroup
    first: int
    block: CodedBlock | None
    codes: Mapping[str, Any]


def _unpack(parts: Sequence[CheckedPart], stop: int) -> Iterator[_Piece]:
    """Yield what is stored of all parts, a few parts at a time so that their lanes are decoded together."""
    for at in range(0, len(parts), PARTS_TOGETHER):
        chosen = [
            (part.reader, group, blocks)
            for part in parts[at : at + PARTS_TOGETHER]
            for group, blocks in zip(part.groups, part.blocks)
            if part.stop > _oldest(group, stop)
        ]
        codes = _unpacked_blocks(chosen)
        for reader, group, blocks in chosen:
            yield from _unquantized(reader, group, "sink")
            for block in blocks:
                yield _Piece(group, group.layout.start + block.start, block, next(codes[group.number]))
            yield from _unquantized(reader, group, "window")


def _unpacked_blocks(
    chosen: Sequence[tuple[Reader, StoredGroup, Sequence[CodedBlock]]],
) -> dict[int, Iterator[Mapping[str, Any]]]:
    """Return the codes of all blocks of each group of layers, by its number."""
    codes: dict[int, Iterator[Mapping[str, Any]]] = {}
    for number in {group.number for _, group, _ in chosen}:
        stored = [each for each in chosen if each[1].number == number]
        runs = [list(run) for _, run in groupby(stored, key=lambda each: id(each[1].coder))]
        codes[number] = chain.from_iterable(_unpacked_run(run) for run in runs)
    return codes


def _unpacked_run(run: Sequence[tuple[Reader, StoredGroup, Sequence[CodedBlock]]]) -> Iterable[Mapping[str, Any]]:
    """Return the codes of blocks of one coder."""
    payloads, counts = [], []
    for reader, group, blocks in run:
        for block in blocks:
            keys = {stream.name: stream_key(group.number, f"{stream.name}.{block.name}") for stream in group.streams}
            payloads.append({name: reader.read(key) for name, key in keys.items()})
            counts.append(block.stop - block.start)
    return run[0][1].coder.unpack(payloads, counts) if counts else ()


def _ahead(pieces: Iterator[T]) -> Iterator[T]:
    """Yield what an iterator does, which runs in another thread and is a few pieces ahead."""
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(next, pieces, None) for _ in range(PIECES_AHEAD))
        try:
            while (piece := waiting.popleft().result()) is not None:
                waiting.append(pool.submit(next, pieces, None))
                yield piece
        finally:
            for future in waiting:
                future.cancel()


def _restore(piece: _Piece, dtype: mx.Dtype) -> Iterator[Decoded]:
    """Yield the arrays of a piece by stream."""
    group, block = piece.group, piece.block
    rows = piece.codes if block is None else group.coder.decode(piece.codes, block.stop - block.start, block.quality)
    for stream in group.streams:
        if block is None:
            array = mx.array(rows[stream.name]).astype(dtype)
        elif group.coder.undoes_rotation:
            array = from_rows(stream, rows[stream.name], 1, piece.first, dtype)
        else:
            array = from_plain_rows(stream, rows[stream.name], 1, dtype)
        yield Decoded(group.number, stream.name, piece.first, array)


def _unquantized(reader: Reader, group: StoredGroup, end: str) -> Iterator[_Piece]:
    """Yield tokens of a group that are stored unquantized at its beginning or its end, where there are any."""
    layout = group.layout
    at, tokens = (0, layout.middle.start) if end == "sink" else (layout.middle.stop, layout.length - layout.middle.stop)
    if tokens and (end == "sink" or reader.header.get("window_quality") is None):
        arrays = {}
        for stream in group.streams:
            key = stream_key(group.number, f"{stream.name}.{end}")
            needed = (stream.layers, 1, stream.heads, tokens, stream.dim)
            if (shape := tuple(unquantized.read_description(reader, key)[1])) != needed:
                raise FormatError(f"{reader.name}: {key} has shape {shape}, its layout needs {needed}")
            arrays[stream.name] = unquantized.read_array(reader, key)
        yield _Piece(group, layout.start + at, None, arrays)

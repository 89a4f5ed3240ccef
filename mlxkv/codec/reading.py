"""Reading a compressed cache: its header is checked against the artifacts before anything of its size is allocated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxkv.codec import unquantized
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.layout import DECODE_ROWS, CodedBlock, Layout, check_layouts, coded_streams
from mlxkv.codec.methods.base import BlockCoder
from mlxkv.codec.stages.rows import from_plain_rows, from_rows
from mlxkv.dump import stream_key
from mlxkv.errors import FormatError, InputError, MismatchError
from mlxkv.io.container import Reader
from mlxkv.io.inputs import check_decoded_size
from mlxkv.spec import MAX_LAYERS, STREAMS, Group, Stream

Progress = Callable[[int], None]
WORKING_BYTES = 40  # for each number of a block that is being decoded, at most
FREE_NUMBERS = 2**24  # of a block of a file that describes its cache itself; for more, decoding counts as well
_DTYPES = {"float16": np.float16, "float32": np.float32, "bfloat16": np.float32}


class DecodedTokens(NamedTuple):
    """A part of a cache, decoded.

    Parameters
    ----------
    arrays
        Keys and values `[layers, B, H, t, D]`, by the names of `mlxkv.dump.stream_key`. Those of windows are there if the part
        ends with the last token.
    start, stop
        The tokens, from `start` up to `stop`.
    total
        Number of tokens of the whole cache.
    """

    arrays: dict[str, np.ndarray]
    start: int
    stop: int
    total: int


class StoredGroup(NamedTuple):
    """A group of layers in a file.

    Parameters
    ----------
    number
        Its number; 0 is the main one.
    group
        Its description.
    layout
        Layout of its tokens.
    coder
        Coder of its blocks.
    """

    number: int
    group: Group
    layout: Layout
    coder: BlockCoder

    @property
    def streams(self) -> list[Stream]:
        """Streams that are coded."""
        return coded_streams(self.group)

    @property
    def width(self) -> int:
        """Width of the rows of both streams together."""
        return sum(stream.width for stream in self.streams)


def header_object(reader: Reader, key: str) -> dict[str, Any]:
    """Return an object of the header.

    Parameters
    ----------
    reader
        The open container.
    key
        Key of the header.

    Returns
    -------
    dict
        The JSON object.

    Raises
    ------
    FormatError
        When there is no object under this key.
    """
    value = reader.header.get(key)
    if not isinstance(value, dict):
        raise FormatError(f"{reader.name} has no {key} in its header")
    return value


def read_layouts(reader: Reader) -> list[Layout]:
    """Read the layouts of all groups of layers from the header.

    Parameters
    ----------
    reader
        The open container.

    Returns
    -------
    list[Layout]
        That of the main group, then those of the others.

    Raises
    ------
    FormatError
        When the header does not describe them.
    """
    others = reader.header.get("groups", [])
    if not isinstance(others, list) or len(others) > MAX_LAYERS:
        raise FormatError(f"{reader.name} has groups of layers {str(others)[:80]}, not a list of layouts")
    try:
        return [Layout.from_json(data) for data in (header_object(reader, "layout"), *others)]
    except FormatError as error:
        raise FormatError(f"{reader.name}: {error}") from None


def read_groups(reader: Reader, artifacts: CalibrationArtifacts, coders: Sequence[BlockCoder]) -> list[StoredGroup]:
    """Read which groups of layers a file has, and check that they are those of the artifacts.

    Parameters
    ----------
    reader
        The open container.
    artifacts
        The calibration.
    coders
        Its coders of blocks, one for each group.

    Returns
    -------
    list[StoredGroup]
        All groups, the main one first.

    Raises
    ------
    FormatError
        When their layouts are not of one text, or not of these layers.
    """
    layouts, groups = read_layouts(reader), artifacts.spec.groups
    try:
        check_layouts(layouts, artifacts.spec)
    except FormatError as error:
        raise FormatError(f"{reader.name}: {error}") from None
    return [StoredGroup(i, *parts) for i, parts in enumerate(zip(groups, layouts, coders))]


def read_dtype(reader: Reader) -> np.dtype:
    """Read the type that keys and values are decoded to.

    Parameters
    ----------
    reader
        The open container.

    Returns
    -------
    np.dtype
        float16 or float32.

    Raises
    ------
    FormatError
        When the header names another type.
    """
    name = reader.header.get("dtype")
    if not isinstance(name, str) or name not in _DTYPES:
        raise FormatError(f"{reader.name} has unknown dtype {str(name)[:80]!r}")
    return np.dtype(_DTYPES[name])


def check_origin(reader: Reader, artifacts: CalibrationArtifacts) -> None:
    """Check that a file was made with these artifacts.

    Parameters
    ----------
    reader
        The open container.
    artifacts
        The calibration.

    Raises
    ------
    FormatError
        For a file of another method.
    MismatchError
        For a file of other artifacts.
    """
    method = artifacts.method_name
    if reader.header.get("method") != method:
        raise FormatError(
            f"{reader.name} was coded by method {str(reader.header.get('method'))[:80]!r};"
            f" these artifacts are of {method!r}"
        )
    if reader.header.get("artifacts") != artifacts.fingerprint:
        raise MismatchError(
            f"{reader.name} needs artifacts {str(reader.header.get('artifacts'))[:80]},"
            f" these are {artifacts.fingerprint}"
        )
    if reader.header.get("uncalibrated") != artifacts.recipe:
        raise FormatError(f"{reader.name} describes another cache than the one that it was made with")


def read_coded_blocks(reader: Reader, groups: Sequence[StoredGroup]) -> list[list[CodedBlock]]:
    """Check the quality and the section sizes of all coded blocks and return the blocks.

    Parameters
    ----------
    reader
        The open container.
    groups
        All its groups of layers.

    Returns
    -------
    list[list[CodedBlock]]
        The blocks of each group in the order of tokens.

    Raises
    ------
    FormatError
        When a section is missing, of an impossible size or not described.
    """
    quality, window_quality = reader.header.get("quality"), reader.header.get("window_quality")
    try:
        for each in (quality,) if window_quality is None else (quality, window_quality):
            groups[0].coder.check_quality(each)
    except InputError as error:
        raise FormatError(f"{reader.name}: {error}") from None
    undescribed = set(reader.sections) - set(header_object(reader, "raw"))
    count = sum(each.layout.count_blocks(window_quality is not None) for each in groups if each.streams)
    if count > len(reader.sections):  # a forged layout must not cost more than the file's own bytes pay for
        raise FormatError(f"{reader.name} has {len(reader.sections)} sections; its layout needs {count} blocks")
    found = []
    for each in groups:
        blocks = list(each.layout.coded_blocks(quality, window_quality)) if each.streams else []
        for block in blocks:
            undescribed -= _check_block(reader, each, block)
        found.append(blocks)
    if undescribed:
        raise FormatError(
            f"{reader.name} has sections that its header does not describe: {', '.join(sorted(undescribed)[:5])[:200]}"
        )
    return found


def _check_block(reader: Reader, group: StoredGroup, block: CodedBlock) -> set[str]:
    """Check that a block's sections are there and may have their sizes; return their names."""
    keys, tokens = set(), group.layout.batch * (block.stop - block.start)
    for stream in group.streams:
        key = stream_key(group.number, f"{stream.name}.{block.name}")
        section = reader.sections.get(key)
        if section is None or not group.coder.is_size(stream.name, tokens, section.size, section.coding):
            claim = f"has {section.size} bytes" if section else "is missing"
            raise FormatError(f"{reader.name}: section {key} of {tokens} tokens {claim}")
        keys.add(key)
    return keys


def read_unquantized_tokens(reader: Reader, group: StoredGroup) -> dict[str, np.ndarray]:
    """Read the sinks of a group of layers, and the recent tokens where they are stored unquantized.

    Parameters
    ----------
    reader
        The open container.
    group
        The group.

    Returns
    -------
    dict[str, np.ndarray]
        Arrays `[layers, B, H, t, D]` by the names of `mlxkv.codec.unquantized.CACHE_SECTIONS`.

    Raises
    ------
    FormatError
        When a shape does not fit the layout.
    """
    arrays: dict[str, np.ndarray] = {}
    layout, window_is_coded = group.layout, reader.header.get("window_quality") is not None
    for name in unquantized.SINK_SECTIONS if window_is_coded else unquantized.CACHE_SECTIONS:
        stream, key = group.group.stream(name[0]), stream_key(group.number, name)
        tokens = layout.middle.start if name.endswith("sink") else layout.length - layout.middle.stop
        needed = (stream.layers, layout.batch, stream.heads, tokens, stream.dim)
        shape = tuple(unquantized.read_description(reader, key)[1])
        if shape != needed:
            raise FormatError(f"{reader.name}: {key} has shape {shape}, its layout needs {needed}")
        arrays[name] = unquantized.read_array(reader, key)
    return arrays


def decode_tokens(
    reader: Reader,
    artifacts: CalibrationArtifacts,
    coders: Sequence[BlockCoder],
    tokens: tuple[int, int] | None,
    progress: Progress | None,
    limit: int | None = None,
    main_only: bool = False,
) -> DecodedTokens:
    """Decode a cache or a part of it, reading only the blocks of those tokens.

    Parameters
    ----------
    reader
        The open container.
    artifacts
        The calibration that it was made with.
    coders
        The coders of these artifacts, one for each group of layers.
    tokens
        First token and the token after the last one; None for all.
    progress
        Called with the number of tokens of each block of the main group that is done.
    limit
        Bytes that these tokens may decode to; None for 256 MiB or 200 times the file's own, whichever is more.
    main_only
        Whether to leave out all groups but the main one.

    Returns
    -------
    DecodedTokens
        Keys and values of these tokens. Windows are complete, wherever the part begins.

    Raises
    ------
    InputError
        For tokens that the container does not have, for a part of a cache that is all windows, and for more bytes than
        the limit.
    FormatError
        For a damaged container, or one of another method.
    MismatchError
        For a container of other artifacts.
    """
    check_origin(reader, artifacts)
    groups, dtype = read_groups(reader, artifacts, coders), read_dtype(reader)
    blocks, total = read_coded_blocks(reader, groups), groups[0].layout.tokens
    first, last = tokens or (0, total)
    if not 0 <= first < last <= total:
        raise InputError(f"{reader.name} holds tokens 0 to {total}; {first} to {last} is no part of them")
    if groups[0].group.window is not None and (first, last) != (0, total):
        raise InputError(
            f"{reader.name} is of layers that keep the newest {groups[0].group.window} tokens alone: read all of it"
        )
    chosen = [groups[0]] if main_only else [each for each in groups if each.group.window is None or last == total]
    parts = {g.number: (0, g.layout.length) if g.group.window is not None else (first, last) for g in chosen}
    sizes = [
        g.width * _decoded_bytes(g.layout, *parts[g.number], dtype.itemsize, free_rows(g, artifacts)) for g in chosen
    ]
    check_decoded_size(reader.name, sum(sizes), reader.size, limit)
    arrays: dict[str, np.ndarray] = {}
    for each in chosen:
        report = None if each.number else progress
        decoded = _decode_group(reader, each, blocks[each.number], parts[each.number], dtype, report)
        arrays |= {stream_key(each.number, name): array for name, array in decoded.items()}
    return DecodedTokens(arrays, first, last, total)


def _decode_group(
    reader: Reader,
    group: StoredGroup,
    blocks: Sequence[CodedBlock],
    part: tuple[int, int],
    dtype: np.dtype,
    progress: Progress | None,
) -> dict[str, np.ndarray]:
    """Return keys and values of a part of the tokens that a group keeps."""
    layout, (first, last) = group.layout, part
    outputs: dict[str, np.ndarray] = {}

    def place(name: str, start: int, array: np.ndarray) -> None:
        """Copy tokens that begin with the one at `start` into the output, as far as they were requested."""
        a, b = max(start, first), min(start + array.shape[3], last)
        if a < b:
            outputs[name][..., a - first : b - first, :] = array[..., a - start : b - start, :]

    stored = read_unquantized_tokens(reader, group)
    for name in STREAMS:
        stream = group.group.stream(name)
        outputs[name] = np.empty((stream.layers, layout.batch, stream.heads, last - first, stream.dim), dtype)
        place(name, 0, stored[f"{name}.sink"])
        if f"{name}.window" in stored:
            place(name, layout.middle.stop, stored[f"{name}.window"])
    target = mx.float16 if dtype == np.float16 else mx.float32
    for batch in layout.decode_batches(blocks, first, last):
        payloads = [
            {
                stream.name: reader.read(stream_key(group.number, f"{stream.name}.{block.name}"))
                for stream in group.streams
            }
            for block in batch
        ]
        counts = [layout.batch * (block.stop - block.start) for block in batch]
        for codes, count, block in zip(group.coder.unpack(payloads, counts), counts, batch):
            rows = group.coder.decode(codes, count, block.quality)
            for stream in group.streams:
                if group.coder.undoes_rotation:
                    restored = from_rows(stream, rows[stream.name], layout.batch, layout.start + block.start, target)
                else:
                    restored = from_plain_rows(stream, rows[stream.name], layout.batch, target)
                place(stream.name, block.start, np.array(restored))
            if progress:
                progress(block.stop - block.start)
    return outputs


def free_rows(group: StoredGroup, artifacts: CalibrationArtifacts) -> int:
    """Return the rows of a block whose decoding is not counted. A calibration pays for its width; a file may state any.

    Parameters
    ----------
    group
        The group of layers.
    artifacts
        The calibration that the file was made with.

    Returns
    -------
    int
        Number of rows.
    """
    return DECODE_ROWS if artifacts.recipe is None else FREE_NUMBERS // max(1, group.width)


def _decoded_bytes(layout: Layout, first: int, last: int, item_bytes: int, free_rows: int) -> int:
    """Return how many bytes some tokens decode to, for each number of a row, before any of them is decoded."""
    # A part is cut out of whole blocks, sinks and recent tokens, which may be larger.
    largest = max(last - first, layout.block_tokens, layout.length - len(layout.middle))
    # Writers' blocks are small, but a file can be one block, which takes far more while it is decoded.
    block_rows = layout.batch * min(layout.block_tokens, layout.length)
    working = WORKING_BYTES * max(0, block_rows - free_rows)
    return layout.batch * min(largest, layout.length) * item_bytes + working

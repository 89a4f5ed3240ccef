"""Reading a compressed cache: its header is checked against the artifacts before anything of its size is allocated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxkv.codec import unquantized
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.layout import DECODE_ROWS, CodedBlock, Layout
from mlxkv.codec.methods.base import BlockCoder
from mlxkv.codec.stages.rows import from_rows
from mlxkv.dump import KVDump
from mlxkv.errors import FormatError, InputError, MismatchError
from mlxkv.identity import same_model
from mlxkv.io.container import Reader, Section
from mlxkv.io.inputs import check_decoded_size
from mlxkv.spec import STREAMS, CacheSpec

Progress = Callable[[int], None]
WORKING_BYTES = 40  # for each number of a block that is being decoded, at most
_DTYPES = {"float16": np.float16, "float32": np.float32, "bfloat16": np.float32}


class DecodedTokens(NamedTuple):
    """A part of a cache, decoded.

    Parameters
    ----------
    arrays
        Keys and values by stream, `[layers, B, H, t, D]` each.
    start, stop
        The tokens, from `start` up to `stop`.
    """

    arrays: dict[str, np.ndarray]
    start: int
    stop: int


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


def read_layout(reader: Reader) -> Layout:
    """Read the layout of the tokens from the header.

    Parameters
    ----------
    reader
        The open container.

    Returns
    -------
    Layout
        The layout.

    Raises
    ------
    FormatError
        When the header does not describe one.
    """
    data = header_object(reader, "layout")
    try:
        return Layout.from_json(data)
    except FormatError as error:
        raise FormatError(f"{reader.name}: {error}") from None


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


def read_coded_blocks(reader: Reader, layout: Layout, spec: CacheSpec, coder: BlockCoder) -> list[CodedBlock]:
    """Check the quality and the section sizes of all coded blocks and return the blocks.

    Parameters
    ----------
    reader
        The open container.
    layout
        Its layout.
    spec
        Description of the cache.
    coder
        The method's coder.

    Returns
    -------
    list[CodedBlock]
        The blocks in the order of tokens.

    Raises
    ------
    FormatError
        When a section is missing, of an impossible size or not described.
    """
    quality, window_quality = reader.header.get("quality"), reader.header.get("window_quality")
    try:
        for each in (quality,) if window_quality is None else (quality, window_quality):
            coder.check_quality(each)
    except InputError as error:
        raise FormatError(f"{reader.name}: {error}") from None
    undescribed, blocks = set(reader.sections) - set(header_object(reader, "raw")), []
    count = layout.count_blocks(window_quality is not None)
    if count > len(reader.sections):  # a forged layout must not cost more than the file's own bytes pay for
        raise FormatError(f"{reader.name} has {len(reader.sections)} sections; its layout needs {count} blocks")
    streams = [name for name in STREAMS if spec.stream(name).width]
    for block in layout.coded_blocks(quality, window_quality):
        for name in streams:
            key, tokens = f"{name}.{block.name}", layout.batch * (block.stop - block.start)
            section = reader.sections.get(key)
            if section is None or not coder.is_size(name, tokens, section.size, section.coding):
                claim = f"has {section.size} bytes" if section else "is missing"
                raise FormatError(f"{reader.name}: section {key} of {tokens} tokens {claim}")
            undescribed.discard(key)
        blocks.append(block)
    if undescribed:
        raise FormatError(
            f"{reader.name} has sections that its header does not describe: {', '.join(sorted(undescribed)[:5])[:200]}"
        )
    return blocks


def read_unquantized_tokens(reader: Reader, layout: Layout, spec: CacheSpec) -> dict[str, np.ndarray]:
    """Read the sinks, and the recent tokens where they are stored unquantized.

    Parameters
    ----------
    reader
        The open container.
    layout
        Its layout.
    spec
        Description of the cache.

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
    window_is_coded = reader.header.get("window_quality") is not None
    for name in unquantized.SINK_SECTIONS if window_is_coded else unquantized.CACHE_SECTIONS:
        stream = spec.stream(name[0])
        tokens = layout.middle.start if name.endswith("sink") else layout.length - layout.middle.stop
        needed = (stream.layers, layout.batch, stream.heads, tokens, stream.dim)
        shape = tuple(unquantized.read_description(reader, name)[1])
        if shape != needed:
            raise FormatError(f"{reader.name}: {name} has shape {shape}, its layout needs {needed}")
        arrays[name] = unquantized.read_array(reader, name)
    return arrays


def decode_tokens(
    reader: Reader,
    artifacts: CalibrationArtifacts,
    coder: BlockCoder,
    tokens: tuple[int, int] | None,
    progress: Progress | None,
    limit: int | None = None,
) -> DecodedTokens:
    """Decode a cache or a part of it, reading only the blocks of those tokens.

    Parameters
    ----------
    reader
        The open container.
    artifacts
        The calibration that it was made with.
    coder
        The coder of these artifacts.
    tokens
        First token and the token after the last one; None for all.
    progress
        Called with the number of tokens of each block that is done.
    limit
        Bytes that these tokens may decode to; None for 256 MiB or 200 times the file's own, whichever is more.

    Returns
    -------
    DecodedTokens
        Keys and values of these tokens.

    Raises
    ------
    InputError
        For tokens that the container does not have, and for more bytes than the limit.
    FormatError
        For a damaged container, or one of another method.
    MismatchError
        For a container of other artifacts.
    """
    check_origin(reader, artifacts)
    spec, layout, dtype = artifacts.spec, read_layout(reader), read_dtype(reader)
    blocks = read_coded_blocks(reader, layout, spec, coder)
    first, last = tokens or (0, layout.length)
    if not 0 <= first < last <= layout.length:
        raise InputError(f"{reader.name} holds tokens 0 to {layout.length}; {first} to {last} is no part of them")
    width = sum(spec.stream(name).width for name in STREAMS)
    decoded = width * _decoded_bytes(layout, last - first, dtype.itemsize)
    check_decoded_size(reader.name, decoded, reader.size, limit)
    outputs: dict[str, np.ndarray] = {}

    def place(name: str, start: int, array: np.ndarray) -> None:
        """Copy tokens that begin at position `start` into the output, as far as they were requested."""
        a, b = max(start, first), min(start + array.shape[3], last)
        if a < b:
            outputs[name][..., a - first : b - first, :] = array[..., a - start : b - start, :]

    stored = read_unquantized_tokens(reader, layout, spec)
    for name in STREAMS:
        stream = spec.stream(name)
        outputs[name] = np.empty((stream.layers, layout.batch, stream.heads, last - first, stream.dim), dtype)
        place(name, 0, stored[f"{name}.sink"])
        if f"{name}.window" in stored:
            place(name, layout.middle.stop, stored[f"{name}.window"])
    streams, target = artifacts.coded_streams, mx.float16 if dtype == np.float16 else mx.float32
    for batch in layout.decode_batches(blocks, first, last):
        payloads = [{stream.name: reader.read(f"{stream.name}.{block.name}") for stream in streams} for block in batch]
        counts = [layout.batch * (block.stop - block.start) for block in batch]
        for codes, count, block in zip(coder.unpack(payloads, counts), counts, batch):
            rows = coder.decode(codes, count, block.quality)
            for stream in streams:
                restored = from_rows(stream, rows[stream.name], layout.batch, block.start, target)
                place(stream.name, block.start, np.array(restored))
            if progress:
                progress(block.stop - block.start)
    return DecodedTokens(outputs, first, last)


def _decoded_bytes(layout: Layout, tokens: int, item_bytes: int) -> int:
    """Return how many bytes some tokens decode to, for each number of a row, before any of them is decoded."""
    # A part is cut out of whole blocks, sinks and recent tokens, which may be larger.
    largest = max(tokens, layout.block_tokens, layout.length - len(layout.middle))
    # Writers' blocks are small, but a file can be one block, which takes far more while it is decoded.
    block_rows = layout.batch * min(layout.block_tokens, layout.length)
    working = WORKING_BYTES * max(0, block_rows - DECODE_ROWS)
    return layout.batch * min(largest, layout.length) * item_bytes + working


def read_continued_layout(
    reader: Reader, artifacts: CalibrationArtifacts, dump: KVDump, header: Mapping[str, Any]
) -> Layout:
    """Check that a dump continues a file and return the file's layout.

    Parameters
    ----------
    reader
        The open container.
    artifacts
        The calibration.
    dump
        A dump of the same conversation, as long or longer.
    header
        The header that compressing the dump would write.

    Returns
    -------
    Layout
        The layout of the existing file.

    Raises
    ------
    MismatchError
        When the file was made with other artifacts, settings or tokens.
    FormatError
        When it is damaged.
    """
    check_origin(reader, artifacts)
    layout = read_layout(reader)
    tokens = unquantized.read_plain_array(reader, "tokens")
    if tokens.shape != (layout.batch, layout.length) or tokens.dtype != np.int32:
        raise FormatError(f"{reader.name} has {tokens.dtype} tokens of shape {tokens.shape}: not those of its layout")
    if dump.length < layout.length:
        raise MismatchError(f"{reader.name} has {layout.length} tokens already, the dump only {dump.length}")
    if not np.array_equal(tokens, dump.tokens[:, : layout.length]):
        raise MismatchError(f"{reader.name} is of other tokens than those that the dump begins with")
    meta = header_object(reader, "meta")
    if not same_model(str(meta.get("fingerprint", "")), dump.fingerprint):
        raise MismatchError(f"{reader.name} is of another model than the dump: compress the dump anew")
    # States are written anew, so what the old ones were does not matter.
    changing = {key: meta[key] for key in ("fingerprint", "state_types") if key in meta}
    lasting = {key: value for key, value in header["meta"].items() if key != "state_types"}
    expected = {**header, "layout": {**header["layout"], "length": layout.length}, "raw": header_object(reader, "raw")}
    expected["meta"] = {**lasting, **changing}
    if changed := [key for key in {**expected, **reader.header} if reader.header.get(key) != expected.get(key)]:
        shown = ", ".join(changed)[:200]
        raise MismatchError(f"{reader.name} was made with another {shown}: compress the dump anew")
    return layout


def first_sections(reader: Reader, artifacts: CalibrationArtifacts, blocks: int) -> list[Section]:
    """Return the table entries of the sections that a file begins with: sinks, then the first blocks.

    Parameters
    ----------
    reader
        The open container.
    artifacts
        The calibration.
    blocks
        Number of blocks.

    Returns
    -------
    list[Section]
        Their entries, in the file's order.

    Raises
    ------
    FormatError
        When the file has them in another order.
    """
    streams = [stream.name for stream in artifacts.coded_streams]
    names = [*unquantized.SINK_SECTIONS, *(f"{name}.{index}" for index in range(blocks) for name in streams)]
    sections = list(reader.sections.values())[: len(names)]
    if [section.name for section in sections] != names:
        raise FormatError(f"{reader.name} has its sections in another order than they are written in")
    return sections

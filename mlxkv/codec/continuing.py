"""Appending to a compressed cache: whether a dump goes on with a file, and which of its sections stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mlxkv.codec import unquantized
from mlxkv.codec.layout import Layout, coded_streams
from mlxkv.codec.reading import check_origin, header_object, read_layouts
from mlxkv.codec.writing import CacheEncoder, layouts_json
from mlxkv.dump import KVDump, stream_key
from mlxkv.errors import FormatError, MismatchError
from mlxkv.identity import same_model
from mlxkv.io.container import Reader, Section
from mlxkv.spec import CacheSpec

_OF_THE_LAST_TOKEN = ("state_types", "rings")  # in meta: written anew, so what they were does not matter


def read_continued_layout(reader: Reader, encoder: CacheEncoder, dump: KVDump, header: Mapping[str, Any]) -> Layout:
    """Check that a dump continues a file and return the layout of the file's main group of layers.

    Parameters
    ----------
    reader
        The open container.
    encoder
        The encoder of the dump.
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
    check_origin(reader, encoder.artifacts)
    layout, *_ = read_layouts(reader)
    tokens, length = unquantized.read_plain_array(reader, "tokens"), layout.tokens
    if tokens.shape != (layout.batch, length) or tokens.dtype != np.int32:
        raise FormatError(f"{reader.name} has {tokens.dtype} tokens of shape {tokens.shape}: not those of its layout")
    if dump.length < length:
        raise MismatchError(f"{reader.name} has {length} tokens already, the dump only {dump.length}")
    if not np.array_equal(tokens, dump.tokens[:, :length]):
        raise MismatchError(f"{reader.name} is of other tokens than those that the dump begins with")
    meta = header_object(reader, "meta")
    if not same_model(str(meta.get("fingerprint", "")), dump.fingerprint):
        raise MismatchError(f"{reader.name} is of another model than the dump: compress the dump anew")
    changing = {key: meta[key] for key in ("fingerprint", *_OF_THE_LAST_TOKEN) if key in meta}
    lasting = {key: value for key, value in header["meta"].items() if key not in _OF_THE_LAST_TOKEN}
    layouts = layouts_json(encoder.layouts(layout.batch, length))
    expected = {**header, **layouts, "raw": header_object(reader, "raw"), "meta": {**lasting, **changing}}
    if changed := [key for key in {**expected, **reader.header} if reader.header.get(key) != expected.get(key)]:
        shown = ", ".join(changed)[:200]
        raise MismatchError(f"{reader.name} was made with another {shown}: compress the dump anew")
    return layout


def first_sections(reader: Reader, spec: CacheSpec, blocks: int) -> list[Section]:
    """Return the table entries of the sections that a file begins with: sinks, then the first blocks.

    Parameters
    ----------
    reader
        The open container.
    spec
        Description of its cache.
    blocks
        Number of blocks of each group of layers.

    Returns
    -------
    list[Section]
        Entries of the groups that keep all tokens, in the file's order; none for a cache that is all windows.

    Raises
    ------
    FormatError
        When the file has them in another order.
    """
    whole = [(index, group) for index, group in enumerate(spec.groups) if group.window is None]
    names = [stream_key(index, name) for index, _ in whole for name in unquantized.SINK_SECTIONS]
    streams = [stream_key(index, stream.name) for index, group in whole for stream in coded_streams(group)]
    names += [f"{name}.{block}" for block in range(blocks) for name in streams]
    sections = list(reader.sections.values())[: len(names)]
    if [section.name for section in sections] != names:
        raise FormatError(f"{reader.name} has its sections in another order than they are written in")
    return sections

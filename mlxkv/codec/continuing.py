"""Appending to a compressed cache: whether a dump goes on with a file, which of its sections stay, and what is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np

from mlxkv.codec import unquantized
from mlxkv.codec.layout import Layers, coded_streams
from mlxkv.codec.reading import check_origin, header_object, read_groups, read_unquantized_tokens
from mlxkv.codec.writing import CacheEncoder, Progress, layouts_json
from mlxkv.dump import KVDump, stream_key
from mlxkv.errors import FormatError, InputError, MismatchError
from mlxkv.identity import same_model
from mlxkv.io import container
from mlxkv.io.container import Reader, Section
from mlxkv.spec import STREAMS, CacheSpec

# In meta, and written anew: what they were does not matter.
_CHANGING = ("state_types", "rings", "notes")


class Continued(NamedTuple):
    """A file that a conversation goes on with.

    Parameters
    ----------
    tokens
        Token ids `[B, T]` of the whole conversation.
    blocks
        Number of blocks of each group of layers that stay in the file.
    start
        First token that is coded again; what comes before stays as it is.
    """

    tokens: np.ndarray
    blocks: int
    start: int


@dataclass(frozen=True)
class _Tail:
    """Keys or values of a layer of which only sinks and the last tokens are here: `[B, H, T, D]` in part.

    Parameters
    ----------
    sinks
        The first tokens.
    rest
        Those from `start` on.
    start
        Position of the first of `rest`.
    """

    sinks: np.ndarray
    rest: np.ndarray
    start: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole."""
        batch, heads, length, dim = self.rest.shape
        return batch, heads, self.start + length, dim

    @property
    def dtype(self) -> np.dtype:
        """Type of the whole."""
        return self.rest.dtype

    def __getitem__(self, index: tuple[slice, slice, slice]) -> np.ndarray:
        first, last, _ = index[2].indices(self.shape[2])
        if last <= self.sinks.shape[2]:
            return self.sinks[:, :, first:last]
        if first < self.start:
            raise IndexError(f"tokens {first} to {last} of a cache that begins at {self.start}")
        return self.rest[:, :, first - self.start : last - self.start]


def find_continued(reader: Reader, encoder: CacheEncoder, start: int, tokens: np.ndarray, rewind: bool) -> Continued:
    """Compare a conversation with a file, and find what stays of the file.

    Parameters
    ----------
    reader
        The open container.
    encoder
        The encoder of the conversation.
    start
        Position of the first of the tokens; those before it are the file's.
    tokens
        Token ids `[B, t]` of the conversation from there on.
    rewind
        Whether the conversation may leave the file's tokens, or end before them.

    Returns
    -------
    Continued
        The whole conversation, and what stays.

    Raises
    ------
    MismatchError
        When the file was made with other artifacts or tokens, or begins after its own end.
    FormatError
        When it is damaged.
    """
    check_origin(reader, encoder.artifacts)
    old = read_groups(reader, encoder.artifacts, encoder.coders)[0].layout
    stored, length = unquantized.read_plain_array(reader, "tokens"), old.tokens
    if stored.shape != (old.batch, length) or stored.dtype != np.int32:
        raise FormatError(f"{reader.name} has {stored.dtype} tokens of shape {stored.shape}: not those of its layout")
    if start > length or tokens.shape[0] != old.batch:
        raise MismatchError(
            f"{reader.name} has tokens of shape {list(stored.shape)}; those of the dump, {list(tokens.shape)} from"
            f" token {start} on, do not go on with it"
        )
    whole = np.concatenate([stored[:, :start], tokens], axis=1)
    both = min(length, whole.shape[1])
    common = common_prefix(stored[:, :both], whole[:, :both])
    if not rewind and whole.shape[1] < length:
        raise MismatchError(f"{reader.name} has {length} tokens already, the dump only {whole.shape[1]}")
    if not rewind and common < length:
        raise MismatchError(f"{reader.name} is of other tokens than those that the dump begins with")
    new = encoder.layouts(old.batch, whole.shape[1])[0]
    if old.middle.start != new.middle.start or common < new.middle.start or old.start or new.start:
        return Continued(whole, 0, 0)
    shared = (common - new.middle.start) // new.block_tokens
    blocks = min(shared, old.complete_blocks, new.complete_blocks)
    return Continued(whole, blocks, new.middle.start + blocks * new.block_tokens)


def common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    """Return how many tokens two texts begin with alike.

    Parameters
    ----------
    first, second
        Token ids `[B, T]` of one shape.

    Returns
    -------
    int
        0 to T.
    """
    differing = np.flatnonzero((first != second).any(axis=0))
    return int(differing[0]) if differing.size else first.shape[1]


def append_tail(
    reader: Reader,
    encoder: CacheEncoder,
    dump: KVDump,
    extras: Mapping[str, np.ndarray],
    meta: Mapping[str, Any],
    *,
    rewind: bool,
    progress: Progress | None,
) -> tuple[int, bytes]:
    """Return how many bytes of a file stay, and what is written after them.

    Parameters
    ----------
    reader
        The open container.
    encoder
        The encoder of the dump.
    dump
        The conversation's dump, or the last part of it.
    extras, meta
        Arrays and facts that compressing the dump would store; the tokens are made whole here.
    rewind
        Whether the conversation may leave the file's tokens, or end before them.
    progress
        Called with the number of tokens of each block that is done.

    Returns
    -------
    tuple[int, bytes]
        Bytes to keep at the file's beginning, and its new end.

    Raises
    ------
    MismatchError
        When the file was made with other artifacts, settings or tokens, or the dump begins too late.
    FormatError
        When the file is damaged.
    InputError
        For values that cannot be coded.
    """
    spec = encoder.artifacts.spec
    continued = find_continued(reader, encoder, dump.start, dump.tokens, rewind)
    if dump.start > continued.start:
        raise MismatchError(
            f"the dump starts at token {dump.start}, and {reader.name} goes on at token {continued.start}",
            "append_start tells where a part has to start",
        )
    layers = _whole_layers(reader, encoder, dump)
    length = continued.tokens.shape[1]
    header, arrays, layouts = encoder.build_header(layers, length, {**extras, "tokens": continued.tokens}, meta)
    _check_settings(reader, encoder, dump, header)
    stated = header_object(reader, "meta")
    # The file is no surer of its model than the tokens that it already holds.
    header["meta"]["fingerprint"] = min(str(stated.get("fingerprint", "")), dump.fingerprint, key=len)
    if "notes" in stated:
        header["meta"].setdefault("notes", stated["notes"])
    kept = first_sections(reader, spec, continued.blocks) if continued.start else []
    names = {section.name for section in kept}
    try:
        sections = encoder.encode_sections(layers, layouts, arrays, continued.blocks, progress)
        added = [(section, data) for section, data in sections if section.name not in names]
        return reader.end_of(kept), container.encode_tail(header, kept, added)
    except (TypeError, ValueError) as error:
        raise InputError(f"notes must be plain JSON values: {error}") from None


def _whole_layers(reader: Reader, encoder: CacheEncoder, dump: KVDump) -> dict[str, Layers]:
    """Return the layers of a dump; those of a part stand at their place, with the file's sinks before them."""
    layers = dump_layers(dump)
    if not dump.start:
        return layers
    for stored in read_groups(reader, encoder.artifacts, encoder.coders):
        if stored.group.window is None:
            ends = read_unquantized_tokens(reader, stored)
            for name in STREAMS:
                key = stream_key(stored.number, name)
                parts = zip(ends[f"{name}.sink"], cast(list[np.ndarray], layers[key]))
                layers[key] = cast(Layers, [_Tail(sinks.astype(rest.dtype), rest, dump.start) for sinks, rest in parts])
    return layers


def dump_layers(dump: KVDump) -> dict[str, Layers]:
    """Return the layers of all groups of a dump.

    Parameters
    ----------
    dump
        The dump.

    Returns
    -------
    dict[str, Sequence]
        Arrays `[B, H, T, D]`, by the names of `stream_key`.
    """
    groups = range(len(dump.spec.groups))
    return {stream_key(group, name): list(dump.stream(name, group)) for group in groups for name in STREAMS}


def _check_settings(reader: Reader, encoder: CacheEncoder, dump: KVDump, header: Mapping[str, Any]) -> None:
    """Raise MismatchError unless a file is of the dump's model, and was written as the header says."""
    meta = header_object(reader, "meta")
    if not same_model(str(meta.get("fingerprint", "")), dump.fingerprint):
        raise MismatchError(f"{reader.name} is of another model than the dump: compress the dump anew")
    changing = {key: meta[key] for key in ("fingerprint", *_CHANGING) if key in meta}
    lasting = {key: value for key, value in header["meta"].items() if key not in _CHANGING}
    old = read_groups(reader, encoder.artifacts, encoder.coders)[0].layout
    layouts = layouts_json(encoder.layouts(old.batch, old.tokens))
    written = {"raw": header_object(reader, "raw"), "mlxkv": reader.header.get("mlxkv")}  # by any version
    expected = {**header, **layouts, **written, "meta": {**lasting, **changing}}
    if changed := [key for key in {**expected, **reader.header} if reader.header.get(key) != expected.get(key)]:
        shown = ", ".join(changed)[:200]
        raise MismatchError(f"{reader.name} was made with another {shown}: compress the dump anew")


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

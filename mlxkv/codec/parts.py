"""Parts of a cache, one container each: the tokens from one position of a text to another, in all layers.

A part stands for itself: it knows its positions, so that rotations fit, and the first part of a text has its sinks. Layers with
a window have the rows of a part that they still had when it was made. See docs/format.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from itertools import pairwise
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.layout import BLOCK_ROWS, MAX_TOKENS, Layout, cache_shape, coded_streams
from mlxkv.codec.pieces import CheckedPart, decode
from mlxkv.codec.pieces import Decoded as Decoded
from mlxkv.codec.reading import WORKING_BYTES, StoredGroup, check_origin, free_rows, header_object, read_coded_blocks
from mlxkv.codec.unquantized import encode_array
from mlxkv.codec.writing import CacheEncoder, GroupBlock, encode_arrays
from mlxkv.dump import stream_key
from mlxkv.errors import FormatError, InputError, MismatchError
from mlxkv.io import container
from mlxkv.io.container import Reader
from mlxkv.io.inputs import check_decoded_size
from mlxkv.spec import STREAMS, CacheSpec, is_int
from mlxkv.version import __version__

KIND = "part"
MOST_TOKENS = BLOCK_ROWS  # of a part
TYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


class CachePart(NamedTuple):
    """Keys and values of some tokens of one text, on their way into a file.

    Parameters
    ----------
    start, stop
        Positions, from `start` up to `stop`; 512 tokens at most.
    tokens
        Token ids `[stop - start]` int32.
    streams
        Keys and values by the names of `mlxkv.dump.stream_key`, each `[1, H, rows, D]` of every layer of the group, float16 or
        float32, rotated as the model keeps them. All groups have both; values of MLA have width 0.
    firsts
        Position of the first row of each group of layers, by its number; `stop` where it has none. Missing groups have all rows
        from `start` on, as all groups without a window do.
    dtype
        Type of the live cache: "float16", "bfloat16" or "float32".
    """

    start: int
    stop: int
    tokens: np.ndarray
    streams: Mapping[str, Sequence[np.ndarray]]
    firsts: Mapping[int, int]
    dtype: str


class StoredPart(NamedTuple):
    """A part in a file.

    Parameters
    ----------
    reader
        The open container.
    artifacts
        The artifacts that it was made with.
    """

    reader: Reader
    artifacts: CalibrationArtifacts


class PartCodec:
    """Encoder of parts.

    Parameters
    ----------
    artifacts
        The calibration, or what takes its place in a method without one.
    quality
        0 to 100; None for the method's default, or a method with one ratio.
    recent
        Newest tokens of each part that are stored at a higher quality, or unquantized by a method with one ratio; 0 or more.
    sinks
        First tokens of the text to store unquantized, as far as they are in the part that begins it; 0 or more.

    Raises
    ------
    InputError
        For arguments out of range.
    """

    def __init__(
        self, artifacts: CalibrationArtifacts, *, quality: float | None = None, recent: int = 0, sinks: int = 4
    ) -> None:
        if not is_int(recent, 0, MAX_TOKENS) or not is_int(sinks, 0, MAX_TOKENS):
            raise InputError(f"recent and sinks must be 0 or more, got {recent} and {sinks}")
        coders = tuple(artifacts.coder(group) for group in range(len(artifacts.spec.groups)))
        quality = coders[0].default_quality if quality is None else quality
        coders[0].check_quality(quality)
        bonus = coders[0].window_quality_bonus
        of_recent = None if bonus is None or quality is None else min(100.0, quality + bonus)
        self.artifacts = artifacts
        self._encoder = CacheEncoder(artifacts, coders, recent, sinks, "deflate", quality, of_recent)

    def encode(self, part: CachePart, meta: Mapping[str, Any]) -> bytes:
        """Encode a part.

        Parameters
        ----------
        part
            The part.
        meta
            JSON values to store in the header as they are. Of artifacts without calibration, `model` and `fingerprint` tell the
            model.

        Returns
        -------
        bytes
            A container.

        Raises
        ------
        InputError
            For values that cannot be coded, and for positions, tokens and meta that cannot be stored.
        MismatchError
            When the layers do not fit the artifacts.
        """
        layouts = self._layouts(part)
        encoder = self._encoder
        arrays: dict[str, np.ndarray] = {}
        for index, layout in layouts.items():
            arrays |= {name: x for name, x in encoder.unquantized_tokens(part.streams, index, layout) if x.size}
        arrays["tokens"] = part.tokens
        coded = {name: encode_array(array) for name, array in arrays.items()}
        stored = encode_arrays({name: data for name, (_, data) in coded.items()}, encoder.lossless)
        blocks = [
            GroupBlock(index, block)
            for index, layout in layouts.items()
            if coded_streams(self.artifacts.spec.groups[index])
            for block in layout.coded_blocks(encoder.quality, encoder.window_quality)
        ]
        described = {name: [kind, list(arrays[name].shape)] for name, (kind, _) in coded.items()}
        header = self._header(part, meta, described)
        sections = [*stored.values(), *encoder.encode_blocks(part.streams, layouts, blocks)]
        out = BytesIO()
        try:
            container.write(out, header, sections)
        except (TypeError, ValueError) as error:
            raise InputError(f"meta must be plain JSON values: {error}") from None
        return out.getvalue()

    def _layouts(self, part: CachePart) -> dict[int, Layout]:
        """Check a part and return the layouts of those groups of layers that have rows in it."""
        spec = self.artifacts.spec
        if not is_int(part.start, 0, MAX_TOKENS) or not is_int(part.stop, part.start + 1, part.start + MOST_TOKENS):
            raise InputError(f"a part has 1 to {MOST_TOKENS} tokens, not those from {part.start} to {part.stop}")
        if part.tokens.shape != (part.stop - part.start,) or part.tokens.dtype != np.int32 or part.dtype not in TYPES:
            raise InputError(
                f"tokens {part.tokens.shape} {part.tokens.dtype} of a cache of {str(part.dtype)[:80]} are not those of a part"
            )
        if not _may_begin(part.firsts, part.start, part.stop, spec):
            raise InputError(
                f"groups of layers cannot begin at {str(dict(part.firsts))[:80]} of {part.start} to {part.stop}"
            )
        layouts, shapes = {}, set()
        for index, group in enumerate(spec.groups):
            first = part.firsts.get(index, part.start)
            if first == part.stop:
                continue
            batch, rows, kind = cache_shape({n: part.streams[stream_key(index, n)] for n in STREAMS}, group)
            if (batch, rows) != (1, part.stop - first) or kind not in ("float16", "float32"):
                raise MismatchError(
                    f"layers of group {index} are [{batch}, H, {rows}, D] {kind}, not {part.stop - first} rows"
                )
            shapes.add(kind)
            layouts[index] = part_layout(first, part.stop, self._encoder.sinks, self._encoder.recent)
        if len(shapes) > 1:
            raise MismatchError("all groups of layers need one type")
        return layouts

    def _header(self, part: CachePart, meta: Mapping[str, Any], described: dict[str, Any]) -> dict[str, Any]:
        """Return the header of a part, without its table of sections."""
        encoder = self._encoder
        moved = {str(index): first for index, first in sorted(part.firsts.items()) if first != part.start}
        return {
            "kind": KIND,
            "method": self.artifacts.method_name,
            "mlxkv": __version__,
            "artifacts": self.artifacts.fingerprint,
            **({"uncalibrated": recipe} if (recipe := self.artifacts.recipe) else {}),
            "start": part.start,
            "stop": part.stop,
            **({"firsts": moved} if moved else {}),
            "sinks": encoder.sinks,
            "recent": encoder.recent,
            **({} if encoder.quality is None else {"quality": encoder.quality}),
            **({} if encoder.window_quality is None else {"window_quality": encoder.window_quality}),
            "dtype": part.dtype,
            "raw": described,
            "meta": dict(meta),
        }


def part_layout(first: int, stop: int, sinks: int, recent: int) -> Layout:
    """Return the layout of the rows of a part that a group of layers has.

    Parameters
    ----------
    first, stop
        Their positions, from `first` up to `stop`.
    sinks
        First tokens of the text that are stored unquantized.
    recent
        Newest tokens of the part that are coded otherwise.

    Returns
    -------
    Layout
        One block at most, and one of recent tokens.
    """
    rows = stop - first
    return Layout(1, rows, 0 if first else sinks, recent, block_tokens=rows, start=first)


def _may_begin(firsts: Mapping[int, int], start: int, stop: int, spec: CacheSpec) -> bool:
    """Return whether groups of layers may begin at these positions of a part."""
    return all(
        is_int(index, 0, len(spec.groups) - 1)
        and is_int(first, start, stop)
        and (first == start or spec.groups[index].window is not None)
        for index, first in firsts.items()
    )


def read_tokens(reader: Reader) -> np.ndarray:
    """Read the token ids of a part.

    Parameters
    ----------
    reader
        The open container.

    Returns
    -------
    np.ndarray
        Token ids `[stop - start]` int32, read-only.

    Raises
    ------
    FormatError
        When it is no part, or they are not those of its positions.
    """
    start, stop = read_positions(reader)
    return np.frombuffer(reader.read("tokens", 4 * (stop - start)), "<i4")


def read_positions(reader: Reader) -> tuple[int, int]:
    """Read which tokens a part has.

    Parameters
    ----------
    reader
        The open container.

    Returns
    -------
    tuple[int, int]
        Position of the first token, and that after the last one.

    Raises
    ------
    FormatError
        When it is no part.
    """
    start: Any = reader.header.get("start")
    stop: Any = reader.header.get("stop")
    if reader.header.get("kind") != KIND:
        raise FormatError(f"{reader.name} is no part of a cache: its kind is {str(reader.header.get('kind'))[:80]}")
    if not is_int(start, 0, MAX_TOKENS) or not is_int(stop, start + 1, min(start + MOST_TOKENS, MAX_TOKENS)):
        raise FormatError(f"{reader.name} has tokens from {str(start)[:80]} to {str(stop)[:80]}, which is no part")
    return start, stop


def decode_parts(parts: Sequence[StoredPart], stop: int, dtype: str) -> Iterator[Decoded]:
    """Decode parts that follow each other.

    Parameters
    ----------
    parts
        Parts in the order of the text, each beginning where the one before it ends.
    stop
        Position after the last token to decode, in the last part.
    dtype
        Type of the result: "float16", "bfloat16" or "float32".

    Yields
    ------
    Decoded
        Pieces of each stream of each group in the order of their positions, without a gap. Of layers with a window only rows
        that it holds at `stop`, as far as there are any.

    Raises
    ------
    InputError
        For parts that do not follow each other, or do not reach `stop`, and another type.
    FormatError
        When a part is damaged, or of another method.
    MismatchError
        When it was made with other artifacts.
    """
    if dtype not in TYPES:
        raise InputError(f"a cache is of {', '.join(TYPES)}, not {str(dtype)[:80]!r}")
    places = [read_positions(part.reader) for part in parts]
    if not places or any(a[1] != b[0] for a, b in pairwise(places)):
        raise InputError(f"parts of {places[:8]} do not follow each other")
    if not places[-1][0] < stop <= places[-1][1]:
        raise InputError(f"tokens up to {stop} do not end in the last part, {places[-1][0]} to {places[-1][1]}")
    return decode([_read_part(part) for part in parts], stop, TYPES[dtype])


def _read_part(part: StoredPart) -> CheckedPart:
    """Check the header of a part against its artifacts, and the sizes of its sections."""
    reader, spec = part.reader, part.artifacts.spec
    start, stop = read_positions(reader)
    check_origin(reader, part.artifacts)
    firsts = _read_firsts(reader, start, stop, spec)
    sinks: Any = reader.header.get("sinks")
    recent: Any = reader.header.get("recent")
    if not is_int(sinks, 0, MAX_TOKENS) or not is_int(recent, 0, MAX_TOKENS):
        raise FormatError(f"{reader.name} has {str(sinks)[:40]} sinks and {str(recent)[:40]} recent tokens")
    groups = [
        StoredGroup(index, group, part_layout(first, stop, sinks, recent), part.artifacts.coders[index])
        for index, group in enumerate(spec.groups)
        if (first := firsts.get(index, start)) < stop
    ]
    numbers = sum(each.width * each.layout.length for each in groups)
    working = sum(each.width * max(0, each.layout.length - free_rows(each, part.artifacts)) for each in groups)
    check_decoded_size(reader.name, 4 * numbers + WORKING_BYTES * working, reader.size)
    return CheckedPart(reader, stop, groups, read_coded_blocks(reader, groups))


def _read_firsts(reader: Reader, start: int, stop: int, spec: CacheSpec) -> dict[int, int]:
    """Read where groups of layers begin in a part."""
    stored = reader.header.get("firsts", {})
    if not isinstance(stored, dict) or not all(key.isascii() and key.isdigit() and len(key) < 5 for key in stored):
        raise FormatError(f"{reader.name}: {str(stored)[:80]} are no positions of groups of layers")
    firsts = {int(key): first for key, first in stored.items()}
    if not _may_begin(firsts, start, stop, spec):
        raise FormatError(f"{reader.name}: groups of layers cannot begin at {str(stored)[:80]} of {start} to {stop}")
    return firsts


def check_part(reader: Reader, spec: CacheSpec) -> None:
    """Check that a part is intact and of this description, without its artifacts and without decoding it.

    Parameters
    ----------
    reader
        The open container.
    spec
        Description of the cache.

    Raises
    ------
    FormatError
        When it is damaged, or no part of such a cache.
    """
    start, stop = read_positions(reader)
    _read_firsts(reader, start, stop, spec)
    header_object(reader, "raw"), header_object(reader, "meta")
    read_tokens(reader)
    reader.verify()

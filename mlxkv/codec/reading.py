"""What a compressed cache says of itself, checked against its artifacts before anything of its size is allocated."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlxkv.codec import raw
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.layout import Layout, Piece
from mlxkv.codec.methods.base import BlockCoder
from mlxkv.errors import FormatError, InputError, MismatchError
from mlxkv.io.container import Reader
from mlxkv.spec import STREAMS, CacheSpec

_TYPES = {"float16": np.float16, "float32": np.float32, "bfloat16": np.float32}


def header_object(reader: Reader, key: str) -> dict[str, Any]:
    """An object of the header. Raises FormatError when it is none."""
    value = reader.header.get(key)
    if not isinstance(value, dict):
        raise FormatError(f"{reader.name} has no {key} in its header")
    return value


def read_layout(reader: Reader) -> Layout:
    """Which tokens are where. Raises FormatError when the header does not say so."""
    try:
        return Layout.from_json(header_object(reader, "layout"))
    except TypeError:
        raise FormatError(f"{reader.name} describes no layout of tokens") from None


def read_dtype(reader: Reader) -> np.dtype:
    """The type that keys and values come back as."""
    name = reader.header.get("dtype")
    if not isinstance(name, str) or name not in _TYPES:
        raise FormatError(f"{reader.name} has unknown dtype {name!r}")
    return np.dtype(_TYPES[name])


def check_origin(reader: Reader, artifacts: CalibrationArtifacts) -> None:
    """Raises FormatError for a file of another method and MismatchError for other artifacts than these."""
    method = artifacts.method_name
    if reader.header.get("method") != method:
        raise FormatError(
            f"{reader.name} was coded by method {reader.header.get('method')!r}; these artifacts are of {method!r}"
        )
    if reader.header.get("artifacts") != artifacts.fingerprint:
        raise MismatchError(
            f"{reader.name} needs artifacts {reader.header.get('artifacts')}, these are {artifacts.fingerprint}"
        )


def read_pieces(reader: Reader, layout: Layout, spec: CacheSpec, coder: BlockCoder) -> list[Piece]:
    """What is coded, each with its quality, which must be one that the method has. Every coded section must be there with a
    size that fits its tokens, and no other section."""
    quality, window = reader.header.get("quality"), reader.header.get("window_quality")
    try:
        for each in (quality,) if window is None else (quality, window):
            coder.check_quality(each)
    except InputError as error:
        raise FormatError(f"{reader.name}: {error}") from None
    unknown, found = set(reader.sections) - set(header_object(reader, "raw")), []
    for piece in layout.pieces(quality, window):  # one by one: a forged layout may have far more than sections
        for name in (name for name in STREAMS if spec.stream(name).width):
            key, tokens = f"{name}.{piece.name}", layout.batch * (piece.stop - piece.start)
            section = reader.sections.get(key)
            if section is None or not coder.is_size(name, tokens, section.size, section.coding):
                claim = f"has {section.size} bytes" if section else "is missing"
                raise FormatError(f"{reader.name}: section {key} of {tokens} tokens {claim}")
            unknown.discard(key)
        found.append(piece)
    if unknown:
        raise FormatError(
            f"{reader.name} has sections that its header does not describe: {', '.join(sorted(unknown)[:5])}"
        )
    return found


def read_ends(reader: Reader, layout: Layout, spec: CacheSpec) -> dict[str, np.ndarray]:
    """Sinks, and windows that are not coded. Their shapes, too, must fit the layout."""
    ends: dict[str, np.ndarray] = {}
    for name in raw.ENDS if reader.header.get("window_quality") is None else raw.SINKS:
        stream = spec.stream(name[0])
        tokens = layout.middle.start if name.endswith("sink") else layout.length - layout.middle.stop
        needed = (stream.layers, layout.batch, stream.heads, tokens, stream.dim)
        shape = tuple(raw.read_description(reader, name)[1])
        if shape != needed:
            raise FormatError(f"{reader.name}: {name} has shape {shape}, its layout needs {needed}")
        ends[name] = raw.read(reader, name)
    return ends

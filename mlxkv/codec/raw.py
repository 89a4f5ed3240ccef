"""Arrays stored as they are: sinks, window, tokens, states. Floats take the narrowest type that loses nothing."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from mlxkv.config import is_int
from mlxkv.errors import FormatError, InputError
from mlxkv.io.container import Reader

SINKS = ("k.sink", "v.sink")
ENDS = (*SINKS, "k.window", "v.window")
_TYPES = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4", "int32": "<i4"}
_MAX_AXES = 8


def to_numpy(array: np.ndarray | mx.array) -> np.ndarray:
    """As NumPy; bfloat16, which NumPy lacks, as float32."""
    if isinstance(array, mx.array) and array.dtype == mx.bfloat16:
        array = array.astype(mx.float32)
    return np.array(array)


def encode(array: np.ndarray) -> tuple[str, bytes]:
    """The stored type and bytes of a float16, float32 or int32 array."""
    if array.dtype == np.int32:
        return "int32", array.astype("<i4").tobytes()
    if array.dtype not in (np.float16, np.float32):
        raise InputError(f"only float16, float32 and int32 arrays can be stored, not {array.dtype}")
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if np.array_equal(half, array):
        return "float16", half.astype("<f2").tobytes()
    bits = array.astype("<f4").view("<u4")
    if not (bits & 0xFFFF).any():
        return "bfloat16", (bits >> 16).astype("<u2").tobytes()
    return "float32", array.astype("<f4").tobytes()


def read_description(reader: Reader, name: str) -> tuple[str, list[int]]:
    """Type and shape of a raw section by the header. Raises FormatError for anything but [type, shape]."""
    table = reader.header.get("raw")
    entry = table.get(name) if isinstance(table, dict) else None
    kind, shape = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
    valid = isinstance(shape, list) and len(shape) <= _MAX_AXES and all(map(is_int, shape))
    if not isinstance(kind, str) or kind not in _TYPES or not valid:
        raise FormatError(f"{reader.name}: {name} is described as {str(entry)[:80]}, not as [type, shape]")
    return kind, shape  # type: ignore[return-value]


def read(reader: Reader, name: str) -> np.ndarray:
    """One raw section as an array. Raises FormatError when its bytes and its described shape disagree."""
    kind, shape = read_description(reader, name)
    size = math.prod(shape) * np.dtype(_TYPES[kind]).itemsize
    flat = np.frombuffer(reader.read(name, size), dtype=_TYPES[kind])
    if kind == "bfloat16":
        flat = (flat.astype("<u4") << 16).view("<f4")
    try:
        return flat.reshape(shape)
    except (ValueError, OverflowError):  # no bytes at all, and one axis beyond NumPy's reach
        raise FormatError(f"{reader.name}: {name} has an impossible shape") from None


def read_extra(reader: Reader, name: str) -> np.ndarray:
    """A raw section whose shape nothing else bounds. Raises FormatError when it would have to be inflated."""
    section = reader.sections.get(name)
    if section is None or section.coding != "raw":
        raise FormatError(f"{reader.name}: {name} must be stored plain")
    return read(reader, name)

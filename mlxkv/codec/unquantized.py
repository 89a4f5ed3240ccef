"""Sections of arrays stored unquantized: sinks, recent tokens ("window"), token ids, states of other layers.

Floats are stored in the narrowest type that loses nothing. The container's header lists the type and shape of each section
under its key "raw".
"""

from __future__ import annotations

import math
import re

import mlx.core as mx
import numpy as np

from mlxkv.dump import STATE_TYPES
from mlxkv.errors import FormatError, InputError
from mlxkv.io.container import Reader
from mlxkv.spec import is_int

SINK_SECTIONS = ("k.sink", "v.sink")
CACHE_SECTIONS = (*SINK_SECTIONS, "k.window", "v.window")
_OF_GROUP = re.compile(r"([1-9][0-9]{0,3})\.([kv]\..*)", re.DOTALL)
_INTEGERS = {str(np.dtype(f"{sign}{size}")): f"<{sign}{size}" for sign in "iu" for size in (1, 2, 4, 8)}
STORED_TYPES = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4", "bool": "<u1", **_INTEGERS}
_MAX_AXES, _MAX_AXIS = 8, 2**48


def split_section(name: str) -> tuple[int, str]:
    """Return the group of layers that a section belongs to, and its name within it.

    Parameters
    ----------
    name
        Name of a section.

    Returns
    -------
    tuple[int, str]
        Number of the group, and the name as it is in the main group, 0.

    Examples
    --------
    >>> split_section("2.k.sink"), split_section("k.0"), split_section("tokens")
    ((2, 'k.sink'), (0, 'k.0'), (0, 'tokens'))
    """
    match = _OF_GROUP.fullmatch(name)
    return (int(match[1]), match[2]) if match else (0, name)


def to_numpy(array: np.ndarray | mx.array) -> np.ndarray:
    """Convert to a NumPy array.

    Parameters
    ----------
    array
        An array of NumPy or MLX.

    Returns
    -------
    np.ndarray
        The same values; bfloat16, which NumPy lacks, as float32.
    """
    if isinstance(array, mx.array) and array.dtype == mx.bfloat16:
        array = array.astype(mx.float32)
    return np.array(array)


def encode_array(array: np.ndarray) -> tuple[str, bytes]:
    r"""Return an array's bytes in the narrowest type that loses nothing.

    Parameters
    ----------
    array
        Array of float16, float32, integers or bool.

    Returns
    -------
    tuple[str, bytes]
        The stored type, such as "float16" or "int32", and the bytes.

    Raises
    ------
    InputError
        For an array of another type.

    Examples
    --------
    >>> encode_array(np.array([0.5, 1.0], np.float32))
    ('float16', b'\x008\x00<')
    """
    name = str(array.dtype)
    if name == "bool" or name in _INTEGERS:
        return name, array.astype(STORED_TYPES[name]).tobytes()
    if array.dtype not in (np.float16, np.float32):
        raise InputError(f"only float16, float32, integer and bool arrays can be stored, not {array.dtype}")
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if np.array_equal(half, array):
        return "float16", half.astype("<f2").tobytes()
    bits = array.astype("<f4").view("<u4")
    if not (bits & 0xFFFF).any():
        return "bfloat16", (bits >> 16).astype("<u2").tobytes()
    return "float32", array.astype("<f4").tobytes()


def stored_values(data: bytes | memoryview, kind: str) -> np.ndarray:
    """Return the numbers that `encode_array` stored.

    Parameters
    ----------
    data
        The bytes.
    kind
        The stored type.

    Returns
    -------
    np.ndarray
        One axis, read-only where the bytes are the numbers; bfloat16 as float32.
    """
    flat = np.frombuffer(data, dtype=STORED_TYPES[kind])
    if kind == "bfloat16":
        flat = (flat.astype("<u4") << 16).view("<f4")
    return flat != 0 if kind == "bool" else flat


def read_description(reader: Reader, name: str) -> tuple[str, list[int]]:
    """Return the stored type and shape of an unquantized section, from the header.

    Parameters
    ----------
    reader
        The open container.
    name
        Name of the section.

    Returns
    -------
    tuple[str, list[int]]
        Stored type and shape.

    Raises
    ------
    FormatError
        When the header has no such entry.
    """
    table = reader.header.get("raw")
    entry = table.get(name) if isinstance(table, dict) else None
    kind, shape = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
    valid = isinstance(shape, list) and len(shape) <= _MAX_AXES and all(is_int(n, 0, _MAX_AXIS) for n in shape)
    if not isinstance(kind, str) or kind not in STORED_TYPES or not valid:
        raise FormatError(f"{reader.name}: {name[:80]} is described as {str(entry)[:80]}, not as [type, shape]")
    return kind, shape  # type: ignore[return-value]


def read_array(reader: Reader, name: str) -> np.ndarray:
    """Return one unquantized section as an array.

    Parameters
    ----------
    reader
        The open container.
    name
        Name of the section.

    Returns
    -------
    np.ndarray
        The array, read-only; bfloat16 as float32.

    Raises
    ------
    FormatError
        When its bytes and its described shape disagree.
    """
    kind, shape = read_description(reader, name)
    size = math.prod(shape) * np.dtype(STORED_TYPES[kind]).itemsize
    flat = stored_values(reader.read(name, size), kind)
    try:
        return flat.reshape(shape)
    except (ValueError, OverflowError):  # no bytes at all, and one axis beyond NumPy's reach
        raise FormatError(f"{reader.name}: {name} has an impossible shape") from None


def to_type(array: np.ndarray, kind: str | None, name: str) -> np.ndarray:
    """Return a state as the type that it had before it was stored.

    Parameters
    ----------
    array
        The array, in the narrowest type that holds it.
    kind
        Its type, one of `mlxkv.dump.STATE_TYPES`; None where the file, of an earlier version, does not say.
    name
        Name of the file for messages.

    Returns
    -------
    np.ndarray
        The same values in that type.

    Raises
    ------
    FormatError
        When the type does not hold the values.
    """
    if kind is None:
        return array
    if not np.can_cast(array.dtype, STATE_TYPES[kind], "safe"):
        raise FormatError(f"{name} stores a state of {kind} as {array.dtype}")
    return array.astype(STATE_TYPES[kind], copy=False)


def read_plain_array(reader: Reader, name: str) -> np.ndarray:
    """Return an unquantized section whose shape is bounded by the size of the file alone.

    Parameters
    ----------
    reader
        The open container.
    name
        Name of the section.

    Returns
    -------
    np.ndarray
        The array, read-only; bfloat16 as float32.

    Raises
    ------
    FormatError
        When it would have to be inflated, or when its bytes and its described shape disagree.
    """
    section = reader.sections.get(name)
    if section is None or section.coding != "raw":
        raise FormatError(f"{reader.name}: {name[:80]} must be stored plain")
    return read_array(reader, name)

"""States as JSON and arrays: how a file of live caches describes them. Nothing in a file can name code."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlxkv.errors import FormatError, InputError
from mlxkv.io.container import Reader
from mlxkv.kernels.bits import QuantizedArray
from mlxkv.spec import is_int

_TYPES = {
    str(kind).removeprefix("mlx.core."): kind
    for kind in (
        mx.float32,
        mx.float16,
        mx.bfloat16,
        mx.int32,
        mx.int64,
        mx.int8,
        mx.uint8,
        mx.uint16,
        mx.uint32,
        mx.bool_,
    )
}
_MAX_AXES, _MAX_SIZE = 8, 2**31 - 1


def describe_state(tree: Any, arrays: list[mx.array]) -> Any:
    """Describe a state as JSON.

    Parameters
    ----------
    tree
        Arrays, QuantizedArray and plain values, in lists, tuples and dicts with text as keys.
    arrays
        The state's arrays are appended to it; the description has their index there.

    Returns
    -------
    object
        Plain JSON values.

    Raises
    ------
    InputError
        For anything else in the state.
    """
    if isinstance(tree, mx.array):
        if array_type(tree) not in _TYPES:
            raise InputError(f"a cache's state cannot be saved with {tree.dtype} arrays in it")
        arrays.append(tree)
        return {"array": len(arrays) - 1}
    if isinstance(tree, QuantizedArray):
        parts = [describe_state(part, arrays) for part in (tree.words, tree.bias, tree.scale)]
        # Whether rows are rotated is said where they are: files of before that have four numbers.
        return {"packed": [*parts, tree.bits, tree.dim, tree.tile_tokens, tree.tile_dims, *[True] * tree.rotated]}
    if type(tree) in (list, tuple):
        return {type(tree).__name__: [describe_state(item, arrays) for item in tree]}
    if isinstance(tree, dict) and all(type(key) is str for key in tree):
        return {"dict": [[key, describe_state(item, arrays)] for key, item in tree.items()]}
    if tree is None or type(tree) in (bool, int, float, str):
        return tree
    raise InputError(f"a cache's state cannot be saved with a {type(tree).__name__} in it")


def rebuild_state(tree: Any, arrays: dict[int, mx.array]) -> Any:
    """Return the state that `describe_state` described.

    Parameters
    ----------
    tree
        The description, from any source.
    arrays
        The arrays by their index. Each array that is used is removed: two parts of a state never share one, since a
        later write into one would change the other.

    Returns
    -------
    object
        The state. Malformed descriptions raise FormatError, or any of Python's errors about values.

    Raises
    ------
    FormatError
        For a description of another form, or an array that is not there or used twice.
    """
    if not isinstance(tree, dict):
        if isinstance(tree, list):
            raise FormatError("a state has a bare list in it")
        return tree
    ((kind, content),) = tree.items()
    if kind == "array":
        if not is_int(content) or content not in arrays:
            raise FormatError(f"a state names array {str(content)[:20]}, which is not there or used already")
        return arrays.pop(content)
    if kind not in ("dict", "packed", "list", "tuple") or not isinstance(content, list):
        raise FormatError(f"a state cannot have a {str(kind)[:20]!r} in it")
    if kind == "dict":
        return _rebuild_dict(content, arrays)
    parts = [rebuild_state(item, arrays) for item in content]
    kinds: dict[str, Callable[[list[Any]], Any]] = {"packed": _rebuild_packed, "list": list, "tuple": tuple}
    return kinds[kind](parts)


def _rebuild_dict(content: list[Any], arrays: dict[int, mx.array]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, item in content:
        if type(key) is not str or key in found:
            raise FormatError(f"a state has the key {str(key)[:20]!r}, which is no text or there already")
        found[key] = rebuild_state(item, arrays)
    return found


def _rebuild_packed(parts: list[Any]) -> QuantizedArray:
    words, bias, scale, *numbers = parts
    rotated = len(numbers) == 5 and numbers[4] is True
    numbers = numbers[:4] if rotated else numbers
    if not all(isinstance(part, mx.array) and part.ndim >= 2 for part in (words, bias, scale)):
        raise FormatError("words, biases and scales of packed tokens must be arrays of two axes or more")
    if len(numbers) != 4 or not all(is_int(number, 1, _MAX_SIZE) for number in numbers):
        raise FormatError(f"packed tokens need bits, dims and tiles, not {str(numbers)[:80]}")
    bits, dim, tile_tokens, tile_dims = numbers
    return QuantizedArray(words, bias, scale, bits, dim, tile_tokens, tile_dims, rotated)


def array_type(array: mx.array) -> str:
    """Return the name that an array's type has in files.

    Parameters
    ----------
    array
        Any array.

    Returns
    -------
    str
        Such as "float16".
    """
    return str(array.dtype).removeprefix("mlx.core.")


def array_bytes(array: mx.array) -> bytes:
    """Return an array's elements, in memory order.

    Parameters
    ----------
    array
        Any array.

    Returns
    -------
    bytes
        The elements, and nothing of a larger array that this one may be a view of.
    """
    return np.array(array.reshape(-1).view(mx.uint8)).tobytes()  # NumPy has no bfloat16


def read_array(reader: Reader, name: str, kind: Any, shape: Sequence[Any]) -> mx.array:
    """Read an array of a stated type and shape from its section.

    Parameters
    ----------
    reader
        An open file.
    name
        Name of the section.
    kind
        Name of the array's type.
    shape
        Its shape.

    Returns
    -------
    mx.array
        The array.

    Raises
    ------
    FormatError
        When the section is missing or coded, or type and shape are impossible or do not fit its bytes.
    """
    section = reader.sections.get(name)
    if section is None or section.coding != "raw":
        raise FormatError(f"array {name} must be there, stored plain")
    if type(kind) is not str or kind not in _TYPES:
        raise FormatError(f"array {name} has the type {str(kind)[:20]!r}, which is none of {', '.join(_TYPES)}")
    if not isinstance(shape, list) or len(shape) > _MAX_AXES or not all(is_int(n, 0, _MAX_SIZE) for n in shape):
        raise FormatError(f"array {name} has the impossible shape {str(shape)[:80]}")
    data = reader.read(name, math.prod(shape) * _TYPES[kind].size)
    return mx.array(np.frombuffer(data, np.uint8)).view(_TYPES[kind]).reshape(shape)

"""Save and load live caches: one checksummed container file, validated on reading, without pickle.

The header describes the model's cache, the method, its settings and, per layer, the state as a tree. Each array of the
tree is a section of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxkv.config import Config
from mlxkv.errors import FormatError, InputError, MismatchError
from mlxkv.io import container
from mlxkv.io.atomic import atomic_write
from mlxkv.io.container import Reader, encode_section
from mlxkv.kernels.bits import QuantizedArray
from mlxkv.live.base import LayerCache, live_methods
from mlxkv.live.seam import CacheEntry, make_cache_of
from mlxkv.models import cache_spec
from mlxkv.spec import fingerprint, is_int
from mlxkv.version import __version__

KIND = "live cache"
_TYPES = {
    str(kind).removeprefix("mlx.core."): kind
    for kind in (mx.float32, mx.float16, mx.bfloat16, mx.int32, mx.int64, mx.uint8, mx.uint32, mx.bool_)
}
_MAX_AXES = 8


def save_cache(path: str | Path, model: Any, caches: Sequence[CacheEntry]) -> None:
    """Write a model's prompt cache: its live caches, and the states of other layers.

    Parameters
    ----------
    path
        The file to write; a failed write leaves no partial file.
    model
        The model that the caches belong to.
    caches
        The entries that `make_cache` returned, one per layer.

    Raises
    ------
    InputError
        If none of the caches is live, or a state has something other than arrays and plain values in it.
    """
    live = [entry for entry in caches if isinstance(entry, LayerCache)]
    if not live:
        raise InputError("none of these caches is a live one: mlxkv.make_cache makes them")
    arrays: list[mx.array] = []
    layers = [
        [entry.offset, _describe_state([_to_plain_type(entry, name) for name in entry.state_fields], arrays)]
        if isinstance(entry, LayerCache)
        else [None, _describe_state(entry.state, arrays)]
        for entry in caches
    ]
    header = {
        "kind": KIND,
        "writer": __version__,
        "method": live[0].method_name,
        "settings": live[0].config.to_dict(),
        "spec": live[0].spec.to_json(),
        "fingerprint": fingerprint(model),
        "layers": layers,
        "arrays": [[str(array.dtype).removeprefix("mlx.core."), array.shape] for array in arrays],
    }
    sections = [encode_section(str(i), _to_bytes(array), "raw") for i, array in enumerate(arrays)]
    with atomic_write(path) as file:
        container.write(file, header, sections)


def load_cache(path: str | Path, model: Any) -> list[CacheEntry]:
    """Read a file that `save_cache` wrote, and call `attach(model)`.

    Parameters
    ----------
    path
        The file to read.
    model
        The model that the caches were made with.

    Returns
    -------
    list of CacheEntry
        A prompt cache that continues exactly as the saved one would have.

    Raises
    ------
    MismatchError
        For a file that was made with another model or other weights.
    FormatError
        For a damaged file (ChecksumError), or a method that is not installed.
    """
    with Reader(path) as reader:
        header = reader.header
        if header.get("kind") != KIND:
            raise FormatError(f"{reader.name} is no saved live cache; it says {str(header.get('kind'))[:80]!r}")
        if header.get("fingerprint") != fingerprint(model) or header.get("spec") != cache_spec(model).to_json():
            raise MismatchError(f"{reader.name} was made with another model or other weights than this one")
        try:
            caches = make_cache_of(model, *_read_method(reader))
            arrays = [_read_array(reader, str(i), *row) for i, row in enumerate(header["arrays"])]
            for entry, (offset, tree) in zip(caches, header["layers"], strict=True):
                _restore(entry, offset, _rebuild_state(tree, arrays))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RecursionError) as error:
            raise FormatError(f"{reader.name} does not describe a live cache: {error!r}") from None
    return caches


def _read_method(reader: Reader) -> tuple[type[LayerCache], Config]:
    """Return the method that the header names, and its settings; the name is only looked up in the registry."""
    name = reader.header["method"]
    cache_class = live_methods.find(name)
    if cache_class is None:
        raise FormatError(f"{reader.name} is of method {str(name)[:80]!r}, which is not installed here")
    return cache_class, cache_class.config_class.from_dict(reader.header["settings"])


def _restore(entry: Any, offset: Any, state: Any) -> None:
    """Set a new cache's state to the file's, checked against the model."""
    if not isinstance(entry, LayerCache):
        entry.state = state
        return
    if not is_int(offset) or len(state) != len(entry.state_fields):
        raise FormatError(
            f"layer {entry.layer} has offset {offset!r} and {len(state)} of {len(entry.state_fields)} parts"
        )
    entry.offset = offset
    for name, value in zip(entry.state_fields, state):
        setattr(entry, name, _to_state_type(entry, name, value))
    first, second = entry.slots
    for keys, values in entry.buckets():
        found = [(x.shape[1], x.shape[3], len(x.shape)) for x in (keys, values)]
        if found != [(first.heads, first.dim, 4), (second.heads, second.dim, 4)] or keys.shape[2] != values.shape[2]:
            raise FormatError(f"layer {entry.layer} stores {keys.shape} and {values.shape}, which do not fit the model")
    if entry.kept > offset:
        raise FormatError(f"layer {entry.layer} stores {entry.kept} of {offset} tokens")


def _to_plain_type(entry: LayerCache, name: str) -> Any:
    """Return a field of the state; a NamedTuple becomes a tuple without trailing fields that are None."""
    value = getattr(entry, name)
    if name not in entry.state_types or not isinstance(value, tuple):
        return value
    used = [i for i, part in enumerate(value) if part is not None]
    return tuple(value[: used[-1] + 1])


def _to_state_type(entry: LayerCache, name: str, value: Any) -> Any:
    """Return a field of the state, as the NamedTuple that was saved."""
    if name not in entry.state_types or value is None:
        return value
    if not all(isinstance(part, mx.array) for part in value):
        raise FormatError(f"layer {entry.layer} should have arrays as its {name}")
    return entry.state_types[name](*value)


def _describe_state(tree: Any, arrays: list[mx.array]) -> Any:
    """Return a state as JSON; its arrays are appended to `arrays` and replaced by their index there."""
    if isinstance(tree, mx.array):
        arrays.append(tree)
        return {"array": len(arrays) - 1}
    if isinstance(tree, QuantizedArray):
        parts = [_describe_state(part, arrays) for part in (tree.words, tree.bias, tree.scale)]
        return {"packed": [*parts, tree.bits, tree.dim, tree.tile_tokens, tree.tile_dims]}
    if type(tree) in (list, tuple):
        return {type(tree).__name__: [_describe_state(item, arrays) for item in tree]}
    if isinstance(tree, dict):
        return {"dict": [[key, _describe_state(item, arrays)] for key, item in tree.items()]}
    if tree is None or type(tree) in (bool, int, float, str):
        return tree
    raise InputError(f"a cache's state cannot be saved with a {type(tree).__name__} in it")


def _rebuild_state(tree: Any, arrays: Sequence[mx.array]) -> Any:
    """Return the state that `_describe_state` described."""
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "array":
        return arrays[content]
    if kind == "dict":
        return {key: _rebuild_state(item, arrays) for key, item in content}
    kinds: dict[str, Callable[[list[Any]], Any]] = {
        "packed": lambda parts: QuantizedArray(*parts),
        "list": list,
        "tuple": tuple,
    }
    return kinds[kind]([_rebuild_state(item, arrays) for item in content])


def _to_bytes(array: mx.array) -> bytes:
    """Return an array's elements as bytes, in memory order."""
    return np.array(array.reshape(-1).view(mx.uint8)).tobytes()  # NumPy has no bfloat16


def _read_array(reader: Reader, name: str, kind: str, shape: list[int]) -> mx.array:
    """Read an array of a stated type and shape from its section."""
    section = reader.sections.get(name)
    if section is None or section.coding != "raw":
        raise FormatError(f"{reader.name}: array {name} must be there, stored plain")
    if len(shape) > _MAX_AXES or not all(map(is_int, shape)):
        raise FormatError(f"{reader.name}: array {name} has the impossible shape {shape}")
    data = reader.read(name, math.prod(shape) * _TYPES[kind].size)
    return mx.array(np.frombuffer(data, np.uint8)).view(_TYPES[kind]).reshape(shape)

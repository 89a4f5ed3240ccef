"""Prompt caches that mlx-lm's own `save_prompt_cache` wrote: described, and read without trust.

Such a file names classes and holds their states, but neither a fingerprint nor a checksum. So classes are looked up in a
short list, and every state is held against the caches that the model itself makes for one token.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import ArraysCache, CacheList, ChunkedKVCache, KVCache, QuantizedKVCache, RotatingKVCache

from mlxkv import stock
from mlxkv.errors import FormatError, InputError, MismatchError, UnsupportedError
from mlxkv.io.safetensors import SafetensorsReader
from mlxkv.live.checks import FLOATS, MAX_OFFSET, check_array
from mlxkv.spec import is_int

_TYPES = {"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32, "U32": mx.uint32, "I32": mx.int32, "I64": mx.int64}
_CLASSES: dict[str, Any] = {
    kind.__name__: kind for kind in (KVCache, RotatingKVCache, ChunkedKVCache, QuantizedKVCache, ArraysCache)
}
_IN_PLACE = ("RotatingKVCache", "QuantizedKVCache")  # which mlx-lm makes of a KVCache: --max-kv-size, --kv-bits
_SLOTS = {"KVCache": 3, "RotatingKVCache": 6, "ChunkedKVCache": 5}
_LIST = CacheList.__name__
_MAX_NAME_BYTES = 256
_OFFSET = 2  # where the number of tokens is in their states


class _PromptFile:
    """The states in a file, by the names that mlx-lm flattens them to."""

    def __init__(self, reader: SafetensorsReader) -> None:
        self.name, self.reader = reader.name, reader
        metadata = reader.metadata
        if metadata.get("2.0") != "":
            old = " of a version before 0.32" if "2.0" in metadata else ""
            raise InputError(
                f"{self.name} is no prompt cache{old} of mlx-lm", "mlx_lm.models.cache.save_prompt_cache writes them"
            )
        self.classes = _numbered(metadata, "1.{}")
        names, kinds = _numbered(metadata, "2.{}.0", 1), _numbered(metadata, "2.{}.1", 1)
        self._kinds = dict(zip(names, kinds))
        self.texts = {key.removeprefix("0."): value for key, value in metadata.items() if key.startswith("0.")}

    def value(self, name: str) -> Any:
        """Return a part of a state: an array, a whole number, or None."""
        stored, kind = self.reader.arrays.get(name), self._kinds.get(name)
        if kind == "none":
            return None
        if stored is None or stored.dtype not in _TYPES or kind not in (None, "scalar"):
            raise FormatError(f"{self.name} has no array or number {name}")
        data = self.reader.read(name)
        if kind == "scalar":
            if stored.shape or stored.dtype not in ("I32", "I64"):
                raise FormatError(f"{self.name}: {name} is no whole number")
            return int.from_bytes(data, "little", signed=True)
        if not stored.shape or max(stored.shape) > MAX_OFFSET or (not data and stored.shape[-1]):
            raise FormatError(f"{self.name}: array {name} is empty")
        if not data:  # values of an indexer, whose width is 0
            return mx.zeros(stored.shape, _TYPES[stored.dtype])
        return mx.array(np.frombuffer(data, np.uint8)).view(_TYPES[stored.dtype]).reshape(stored.shape)

    def entries(self) -> list[tuple[str, str]]:
        """Return where each entry's state is, those within lists of caches one by one, and the entry's class."""
        found: list[tuple[str, str]] = []
        for layer, kind in enumerate(self.classes):
            if kind != _LIST:
                found.append((str(layer), kind))
                continue
            child = 0
            while (text := self._text(f"{layer}.{child}.1")) is not None:
                found.append((f"{layer}.{child}.0", text))
                child += 1
        return found

    def _text(self, name: str) -> str | None:
        """Return the name of a class within a list, None where there is none."""
        stored = self.reader.arrays.get(name)
        if self._kinds.get(name) != "string" or stored is None or stored.end - stored.start > _MAX_NAME_BYTES:
            return None
        return self.reader.read(name).decode("utf-32-le", "replace")

    def is_unused(self, name: str) -> bool:
        """Return whether an entry keeps nothing: some models make caches for layers without attention."""
        return self._kinds.get(f"{name}.0") == "none"

    def tokens(self) -> int:
        """Return the number of tokens, which all layers have to agree on."""
        offsets = {
            self.value(f"{name}.{_OFFSET}")
            for name, kind in self.entries()
            if kind in (*_SLOTS, "QuantizedKVCache") and not self.is_unused(name)
        }
        if len(offsets) != 1 or not is_int(found := offsets.pop(), 1, MAX_OFFSET):
            raise FormatError(f"{self.name}: its layers have not seen one number of tokens, 1 or more")
        return found


def describe_prompt_cache(path: str | Path) -> dict[str, Any]:
    """Describe a file of mlx-lm's `save_prompt_cache`; arrays stay unread.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    dict
        `kind`, `layers`, `caches` (layers by class), `tokens`, `dtypes`, `cache_bytes`, `metadata` and `file_bytes`.

    Raises
    ------
    InputError
        When it cannot be opened, or is a `.safetensors` file of something else.
    FormatError
        When it is damaged.
    """
    with SafetensorsReader(path) as reader:
        file = _PromptFile(reader)
        states = [stored for stored in reader.arrays.values() if stored.shape and stored.end > stored.start]
        return {
            "kind": "prompt cache of mlx-lm",
            "layers": len(file.classes),
            "caches": dict(Counter(file.classes)),
            "tokens": file.tokens(),
            "dtypes": sorted({stored.dtype for stored in states}),
            "cache_bytes": sum(stored.end - stored.start for stored in states),
            "metadata": {key: value[:80] for key, value in file.texts.items()},
            "file_bytes": reader.size,
        }


def read_prompt_cache(path: str | Path, model: Any) -> list[Any]:
    """Read a file of mlx-lm's `save_prompt_cache` for a model, whose own caches it is held against.

    Parameters
    ----------
    path
        The file, from any source. It says nothing about the weights that made it: with others of the same shapes it is
        accepted, and the model goes on from what it cannot understand.
    model
        A model that mlx-lm loaded.

    Returns
    -------
    list
        A prompt cache for `generate(..., prompt_cache=...)`, all of it computed.

    Raises
    ------
    InputError
        When it cannot be opened, or is a `.safetensors` file of something else.
    FormatError
        When it is damaged.
    MismatchError
        When its layers, or their states, cannot be those of this model.
    UnsupportedError
        When it holds caches of another class, or of a batch of texts.
    """
    with SafetensorsReader(path) as reader:
        file = _PromptFile(reader)
        expected = stock.example_caches(model, file.tokens())
        if len(file.classes) != len(expected):
            raise MismatchError(f"{file.name} has {len(file.classes)} layers, this model {len(expected)}")
        found, examples = file.entries(), stock.entries(expected)
        if [name for name, _ in found] != _names(expected):
            raise MismatchError(f"{file.name} has other layers with lists of caches than this model")
        read = {i: _read_entry(file, *each, example) for i, (each, example) in enumerate(zip(found, examples))}
    mx.eval([entry.state for entry in read.values()])
    return stock.with_entries(expected, read)


def _names(cache: list[Any]) -> list[str]:
    """Return where the states of a prompt cache's entries are in a file."""
    lists = [len(entry.caches) if isinstance(entry, CacheList) else None for entry in cache]
    return [
        name
        for layer, count in enumerate(lists)
        for name in ([str(layer)] if count is None else [f"{layer}.{child}.0" for child in range(count)])
    ]


def _read_entry(file: _PromptFile, name: str, kind: str, expected: Any) -> Any:
    """Return one entry: of the class that the file names, where this layer can have it."""
    own, layer = type(expected).__name__, name.partition(".")[0]
    if kind not in _CLASSES:
        raise UnsupportedError(f"{file.name}: layer {layer} is a {kind[:40]!r}; mlxkv reads {', '.join(_CLASSES)}")
    if kind != own and (own != "KVCache" or kind not in _IN_PLACE):
        raise MismatchError(f"{file.name}: layer {layer} is a {kind}, this model has a {own} there")
    state = _read_state(file, name, kind)
    if isinstance(expected, KVCache | RotatingKVCache | ChunkedKVCache) and file.is_unused(name) != (
        expected.keys is None
    ):
        raise MismatchError(f"{file.name}: layer {layer} keeps tokens in one of the file and this model only")
    try:
        if kind == "QuantizedKVCache":
            state = _quantized_state(state, expected)
        else:
            state = stock.used_state(kind, state, _like(kind, state, expected))
    except FormatError as error:  # a file without checksum and fingerprint: of another model, rather than damaged
        raise MismatchError(f"{file.name} does not fit this model: layer {layer}: {error}") from None
    for array in _arrays(state):
        if array.shape[0] != 1:
            raise UnsupportedError(f"{file.name} is of {array.shape[0]} texts; only one can be continued")
        if array.dtype in FLOATS and not mx.all(mx.isfinite(array)).item():
            raise FormatError(f"{file.name}: layer {layer} holds values that are not finite")
    wide = kind != "QuantizedKVCache" and any(array.dtype == mx.float32 for array in _arrays(expected.state))
    entry = _CLASSES[kind].__new__(_CLASSES[kind])  # as mlx-lm's own from_state does
    # On a CPU models compute in float32: what a Mac saved is widened, not the other way round.
    entry.state = tree_map(lambda part: part.astype(mx.float32) if _is_float(part) else part, state) if wide else state
    return entry


def _read_state(file: _PromptFile, name: str, kind: str) -> tuple[Any, ...]:
    """Return a state of the form that this class has."""
    if kind == "ArraysCache":
        count = len([key for key in file.reader.arrays if key.startswith(f"{name}.0.")])
        return [file.value(f"{name}.0.{slot}") for slot in range(count)], *(file.value(f"{name}.{i}") for i in (1, 2))
    if kind == "QuantizedKVCache":
        pairs = [tuple(file.value(f"{name}.{slot}.{part}") for part in range(3)) for slot in range(2)]
        return *pairs, *(file.value(f"{name}.{slot}") for slot in range(2, 5))
    return tuple(file.value(f"{name}.{slot}") for slot in range(_SLOTS[kind]))


def _like(kind: str, state: tuple[Any, ...], expected: Any) -> Any:
    """Return the example to compare with; a window in place of a cache of all tokens has a size of its own."""
    if kind != "RotatingKVCache" or isinstance(expected, RotatingKVCache):
        return expected
    keep, window = state[3], state[4]
    if not (is_int(keep) and is_int(window, 1, MAX_OFFSET)) or keep >= window:
        raise FormatError(f"there is no window of {window} tokens that keeps {keep}")
    example: Any = _CLASSES[kind](window, keep)
    example.keys, example.values = expected.keys, expected.values
    return example


def _quantized_state(state: Any, expected: Any) -> tuple[Any, ...]:
    """Check what mlx-lm's generate makes of a cache with --kv-bits; return what is in use."""
    pairs, (offset, group, bits) = state[:2], state[2:]
    heads, dim = expected.keys.shape[1], expected.keys.shape[3]
    if group not in (32, 64, 128) or bits not in (2, 3, 4, 5, 6, 8) or dim % group or expected.values.shape[3] != dim:
        raise FormatError(f"{bits} bits in groups of {group} are not for keys of {dim} dimensions")
    for words, *scales in pairs:
        check_array(words, "words", (None, heads, None, dim * bits // 32), mx.uint32)
        for scale in scales:
            check_array(scale, "scales", (words.shape[0], heads, words.shape[2], dim // group))
        if not is_int(offset, 1, words.shape[2]):
            raise FormatError(f"{words.shape[2]} rows do not hold {offset} tokens")
    keys, values = (tuple(part[..., :offset, :] for part in pair) for pair in pairs)
    return keys, values, offset, group, bits


def _arrays(state: Any) -> list[mx.array]:
    """Return the arrays of a state with axes."""
    flat = cast(dict[str, Any], tree_flatten(list(state), destination={}))
    return [part for part in flat.values() if isinstance(part, mx.array)]


def _is_float(part: Any) -> bool:
    return isinstance(part, mx.array) and part.dtype in FLOATS


def _numbered(metadata: dict[str, str], name: str, first: int = 0) -> list[str]:
    """Return texts whose names count up, to the first that is not there."""
    found: list[str] = []
    while (text := metadata.get(name.format(first + len(found)))) is not None:
        found.append(text)
    return found

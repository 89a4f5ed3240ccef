"""The two forms of mlx-lm's prompt cache files, of 0.31 and of 0.32: the same classes and states, found without trust."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import CacheList

from mlxkv.errors import FormatError, InputError, UnsupportedError
from mlxkv.io.safetensors import SafetensorsReader
from mlxkv.spec import is_int
from mlxkv.stock import MAX_OFFSET

_TYPES = {"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32, "U32": mx.uint32, "I32": mx.int32, "I64": mx.int64}
_LIST = CacheList.__name__
_QUANTIZED, _ARRAYS, _CHUNKED, _ROTATING = "QuantizedKVCache", "ArraysCache", "ChunkedKVCache", "RotatingKVCache"
_SLOTS = {"KVCache": 3, _ROTATING: 6, _CHUNKED: 5}
_OFFSET = 2  # where the number of tokens is in their states
# What 0.31 keeps as text beside keys and values: how many numbers, and which of them make up the end of a state of 0.32.
_NUMBERS = {_ROTATING: (4, (2, 0, 1, 3)), _QUANTIZED: (3, (0, 1, 2)), _CHUNKED: (2, (0, 1))}
_MAX_NAME_BYTES = 256


class Place(NamedTuple):
    """Where an entry of a prompt cache is in a file, and of which class.

    Parameters
    ----------
    layer
        Its number, or that of its list of caches.
    child
        Its number within the list; None where it is in none.
    kind
        Name of its class, as the file says it.
    """

    layer: int
    child: int | None
    kind: str


class PromptFile(ABC):
    """Base class of the two forms.

    Parameters
    ----------
    reader
        The open file.

    Attributes
    ----------
    layout
        Version of mlx-lm that has written this form first.
    classes
        Names of the layers' classes, as the file says them.
    texts
        What was written beside the states, by name.
    """

    layout: str
    classes: list[str]
    texts: dict[str, str]

    def __init__(self, reader: SafetensorsReader) -> None:
        self.name, self.reader = reader.name, reader

    @abstractmethod
    def places(self) -> list[Place]:
        """Return where each entry is, those within lists of caches one by one.

        Returns
        -------
        list of Place
            In the order of `mlxkv.stock.entries`.
        """

    @abstractmethod
    def is_unused(self, place: Place) -> bool:
        """Return whether an entry keeps nothing: some models make caches for layers without attention.

        Parameters
        ----------
        place
            The entry.

        Returns
        -------
        bool
            Whether there are no keys.
        """

    @abstractmethod
    def state(self, place: Place) -> tuple[Any, ...]:
        """Read a state, in the form that its class has in mlx-lm 0.32; nothing in it is checked yet but types of arrays.

        Parameters
        ----------
        place
            An entry of one of the classes that are read.

        Returns
        -------
        tuple
            Arrays, whole numbers and None, in lists and tuples.

        Raises
        ------
        FormatError
            When a part is missing, or no array or number.
        UnsupportedError
            When the file does not say all of it.
        """

    @abstractmethod
    def _offset(self, place: Place) -> Any:
        """Return how many tokens an entry has seen, None where it does not say."""

    @cached_property
    def tokens(self) -> int:
        """The number of tokens, which all layers have to agree on."""
        said = {self._offset(place) for place in self.places() if not self.is_unused(place)} - {None}
        if not said:
            raise UnsupportedError(f"{self.name} has no keys and values that count its tokens, only other states")
        if len(said) != 1 or not is_int(found := said.pop(), 1, MAX_OFFSET):
            raise FormatError(f"{self.name}: its layers have not seen one number of tokens, 1 or more")
        return found

    def _array(self, name: str) -> mx.array:
        stored = self.reader.arrays.get(name)
        if stored is None or stored.dtype not in _TYPES:
            raise FormatError(f"{self.name} has no array or number {name}")
        data = self.reader.read(name)
        if not stored.shape or max(stored.shape) > MAX_OFFSET or (not data and stored.shape[-1]):
            raise FormatError(f"{self.name}: array {name} is empty")
        if not data:  # values of an indexer, whose width is 0
            return mx.zeros(stored.shape, _TYPES[stored.dtype])
        return mx.array(np.frombuffer(data, np.uint8)).view(_TYPES[stored.dtype]).reshape(stored.shape)

    def _count(self, prefix: str) -> int:
        """Return how many arrays there are below a name."""
        return sum(key.startswith(prefix) for key in self.reader.arrays)


class _Layout032(PromptFile):
    """Every part of a state is an array; names beside them say which stand for numbers, text or None."""

    layout = "0.32"

    def __init__(self, reader: SafetensorsReader) -> None:
        super().__init__(reader)
        metadata = reader.metadata
        self.classes = _numbered(metadata, "1.{}")
        names, kinds = _numbered(metadata, "2.{}.0", 1), _numbered(metadata, "2.{}.1", 1)
        self._kinds = dict(zip(names, kinds))
        self.texts = _below(metadata, "0.")

    def places(self) -> list[Place]:
        found: list[Place] = []
        for layer, kind in enumerate(self.classes):
            if kind != _LIST:
                found.append(Place(layer, None, kind))
                continue
            child = 0
            while (text := self._text(f"{layer}.{child}.1")) is not None:
                found.append(Place(layer, child, text))
                child += 1
        return found

    def is_unused(self, place: Place) -> bool:
        return self._kinds.get(f"{_name(place)}.0") == "none"

    def state(self, place: Place) -> tuple[Any, ...]:
        name, kind = _name(place), place.kind
        if kind == _ARRAYS:
            arrays = [self._value(f"{name}.0.{slot}") for slot in range(self._count(f"{name}.0."))]
            return arrays, *(self._value(f"{name}.{i}") for i in (1, 2))
        if kind == _QUANTIZED:
            pairs = [tuple(self._value(f"{name}.{slot}.{part}") for part in range(3)) for slot in range(2)]
            return *pairs, *(self._value(f"{name}.{slot}") for slot in range(2, 5))
        return tuple(self._value(f"{name}.{slot}") for slot in range(_SLOTS[kind]))

    def _offset(self, place: Place) -> Any:
        return self._value(f"{_name(place)}.{_OFFSET}") if place.kind in (*_SLOTS, _QUANTIZED) else None

    def _value(self, name: str) -> Any:
        """Return a part of a state: an array, a whole number, or None."""
        kind = self._kinds.get(name)
        if kind == "none":
            return None
        if kind is None:
            return self._array(name)
        stored = self.reader.arrays.get(name)
        if kind != "scalar" or stored is None or stored.shape or stored.dtype not in ("I32", "I64"):
            raise FormatError(f"{self.name}: {name} is no whole number")
        return int.from_bytes(self.reader.read(name), "little", signed=True)

    def _text(self, name: str) -> str | None:
        """Return the name of a class within a list, None where there is none."""
        stored = self.reader.arrays.get(name)
        if self._kinds.get(name) != "string" or stored is None or stored.end - stored.start > _MAX_NAME_BYTES:
            return None
        return self.reader.read(name).decode("utf-32-le", "replace")


class _Layout031(PromptFile):
    """States are arrays alone; their numbers, and the classes within lists, stand as text in the header."""

    layout = "0.31"

    def __init__(self, reader: SafetensorsReader) -> None:
        super().__init__(reader)
        self.classes = _numbered(reader.metadata, "2.{}")
        self.texts = _below(reader.metadata, "1.")

    def places(self) -> list[Place]:
        found: list[Place] = []
        for layer, kind in enumerate(self.classes):
            children = _numbered(self.reader.metadata, f"0.{layer}.0.{{}}") if kind == _LIST else None
            if children is None:
                found.append(Place(layer, None, kind))
            else:
                found += [Place(layer, i, child) for i, child in enumerate(children)]
        return found

    def is_unused(self, place: Place) -> bool:
        return False  # 0.31 cannot save such a one

    def state(self, place: Place) -> tuple[Any, ...]:
        name, kind = _name(place, ""), place.kind
        if kind == _ARRAYS:
            return [self._array(f"{name}.{slot}") for slot in range(self._count(f"{name}."))], None, None
        pairs: list[Any]
        if kind == _QUANTIZED:
            pairs = [tuple(self._array(f"{name}.{slot}.{part}") for part in range(3)) for slot in range(2)]
        else:
            pairs = [self._array(f"{name}.{slot}") for slot in range(2)]
        numbers = self._numbers(place)
        if kind == _CHUNKED:
            offset = self._offset(place)
            return *pairs, self._tokens_elsewhere() if offset is None else offset, *numbers
        return *pairs, *(numbers if kind in _NUMBERS else [self._offset(place)])

    def _offset(self, place: Place) -> Any:
        kind = place.kind
        if kind in (_ROTATING, _QUANTIZED):
            return self._numbers(place)[0]
        if kind not in _SLOTS or (kind == _CHUNKED and self._numbers(place)[1]):
            return None  # how many tokens chunks have seen is not in the file, only where they begin
        keys = self.reader.arrays.get(f"{_name(place, '')}.0")
        return keys.shape[2] if keys is not None and len(keys.shape) == 4 else 0

    def _tokens_elsewhere(self) -> int:
        if all(self._offset(place) is None for place in self.places()):
            raise UnsupportedError(
                f"{self.name} does not say how many tokens its chunks have seen: 0.31 of mlx-lm lost that"
            )
        return self.tokens

    def _numbers(self, place: Place) -> list[int]:
        """Return the numbers of a state in the order of 0.32; none for a class that has none here."""
        if place.kind not in _NUMBERS:
            return []
        count, order = _NUMBERS[place.kind]
        above = f"0.{place.layer}" if place.child is None else f"0.{place.layer}.1.{place.child}"
        texts = [self.reader.metadata.get(f"{above}.{i}", "") for i in range(count)]
        if not all(re.fullmatch(r"-?[0-9]{1,10}", text) for text in texts):
            raise FormatError(f"{self.name}: a {place.kind} is described by {str(texts)[:80]}")
        return [int(texts[i]) for i in order]


def prompt_file(reader: SafetensorsReader) -> PromptFile:
    """Return what a file holds as a prompt cache.

    Parameters
    ----------
    reader
        The open file.

    Returns
    -------
    PromptFile
        Its classes and states, found but not read.

    Raises
    ------
    InputError
        For a `.safetensors` file of something else.
    """
    mark = reader.metadata.get("2.0")  # 0.32 begins its list of numbers with "", 0.31 has its first class there
    if mark is None or (mark and not any(f"{key}.".startswith("0.0.") for key in reader.metadata)):
        raise InputError(
            f"{reader.name} is no prompt cache of mlx-lm", "mlx_lm.models.cache.save_prompt_cache writes them"
        )
    return _Layout031(reader) if mark else _Layout032(reader)


def parts_of_031(cache: Sequence[Any], texts: Mapping[str, str]) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Return a prompt cache in the form of mlx-lm 0.31.

    Parameters
    ----------
    cache
        A prompt cache of mlx-lm's own classes, whose states hold only what is in use.
    texts
        What to write beside the states, by name.

    Returns
    -------
    tuple
        Arrays and text by their names in the file.

    Raises
    ------
    UnsupportedError
        Where 0.31 could not go on from it.
    """
    arrays: dict[str, mx.array] = {}
    said = {f"1.{key}": text for key, text in texts.items()}
    for layer, entry in enumerate(cache):
        children = entry.caches if isinstance(entry, CacheList) else [entry]
        said[f"2.{layer}"] = type(entry).__name__
        for child, part in enumerate(children):
            name, above = str(layer), f"0.{layer}"
            if isinstance(entry, CacheList):
                name, above = f"{layer}.{child}", f"0.{layer}.1.{child}"
                said[f"0.{layer}.0.{child}"] = type(part).__name__
            pairs, numbers = _split_for_031(part, layer)
            arrays |= tree_flatten(pairs, prefix=f".{name}", destination={})  # type: ignore[arg-type]
            said |= {f"{above}.{i}": str(number) for i, number in enumerate(numbers)} if numbers else {above: ""}
    return arrays, said


def _split_for_031(entry: Any, layer: int) -> tuple[list[Any], list[int]]:
    """Return the arrays of a state, and the numbers that 0.31 keeps as text."""
    kind, state = type(entry).__name__, entry.state
    arrays, numbers = (state[0], []) if kind == _ARRAYS else (list(state[:2]), list(state[2:]))
    if any(part is None for part in arrays):
        raise UnsupportedError(f"layer {layer} holds nothing yet, which 0.31 of mlx-lm cannot save")
    if kind == _CHUNKED:
        raise UnsupportedError(f"layer {layer} is a {kind}, from whose files 0.31 of mlx-lm goes on wrongly")
    if kind in _NUMBERS:
        count, order = _NUMBERS[kind]
        numbers = [numbers[order.index(i)] for i in range(count)]
    else:
        numbers = []
    return list(arrays), numbers


def _name(place: Place, of_list: str = ".0") -> str:
    """Return what the names of an entry's arrays begin with."""
    return str(place.layer) if place.child is None else f"{place.layer}.{place.child}{of_list}"


def _below(metadata: dict[str, str], prefix: str) -> dict[str, str]:
    return {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}


def _numbered(metadata: dict[str, str], name: str, first: int = 0) -> list[str]:
    """Return texts whose names count up, to the first that is not there."""
    found: list[str] = []
    while (text := metadata.get(name.format(first + len(found)))) is not None:
        found.append(text)
    return found

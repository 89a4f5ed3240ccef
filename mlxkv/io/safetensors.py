"""Bounded reading of `.safetensors` files: the header is checked against the file before any array is read."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from mlxkv.errors import FormatError
from mlxkv.io.inputs import open_input, parse_json
from mlxkv.spec import is_int

MAX_HEADER = 2**22
MAX_AXES = 8
# Bytes of an element, by the format's names of types; those below a byte are in no file of interest here.
_ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8}  # fmt: skip


@dataclass(frozen=True)
class StoredArray:
    """Where an array is in the file.

    Parameters
    ----------
    dtype
        The format's name of its type, such as "F16".
    shape
        Its axes, 0 or more.
    start, end
        Bytes from the end of the header.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsReader:
    """An open file, from any source: `metadata`, `arrays` by name, and their bytes one by one.

    Parameters
    ----------
    path
        The file.

    Attributes
    ----------
    metadata
        Text by name.
    arrays
        Where each array is, by name. Together they fill the file, without gaps.
    size
        Bytes of the file.

    Raises
    ------
    InputError
        When the file cannot be opened.
    FormatError
        When its header is not one, or does not fit the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.name = str(path)
        self._file = open_input(path)
        try:
            self.size = self._file.seek(0, os.SEEK_END)
            self._file.seek(0)
            length = int.from_bytes(self._file.read(8), "little")
            self._begin = 8 + length
            if self.size < 8 or length > min(MAX_HEADER, self.size - 8):
                raise FormatError(f"{path} is truncated: its header claims {length} bytes, the file has {self.size}")
            header = parse_json(self._file.read(length), f"the header of {path}")
            self.metadata = _read_metadata(header.pop("__metadata__", {}), self.name)
            self.arrays = {name: _read_entry(entry, f"{path}: {name[:80]!r}") for name, entry in header.items()}
            self._check_places()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _check_places(self) -> None:
        """Refuse arrays that overlap, or leave bytes of the file over."""
        end = 0
        for stored in sorted(self.arrays.values(), key=lambda stored: (stored.start, stored.end)):
            if stored.start != end:
                raise FormatError(f"{self.name}: an array begins at byte {stored.start}, the one before ends at {end}")
            end = stored.end
        if self._begin + end != self.size:
            raise FormatError(f"{self.name} has {self.size} bytes, but its header describes {self._begin + end}")

    def read(self, name: str) -> bytes:
        """Return an array's bytes, in C order and little-endian.

        Parameters
        ----------
        name
            One of `arrays`.

        Returns
        -------
        bytes
            As many as its type and shape say.

        Raises
        ------
        FormatError
            When there is no such array, or the file has become shorter.
        """
        if (stored := self.arrays.get(name)) is None:
            raise FormatError(f"{self.name} has no array {name!r}")
        self._file.seek(self._begin + stored.start)
        data = self._file.read(stored.end - stored.start)
        if len(data) != stored.end - stored.start:
            raise FormatError(f"{self.name} has become shorter while it was read")
        return data


def _read_metadata(found: Any, name: str) -> dict[str, str]:
    """Return the header's own text, checked."""
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise FormatError(f"{name}: __metadata__ should hold text by name")
    return found


def _read_entry(entry: Any, name: str) -> StoredArray:
    """Return an array's entry of the header, checked in itself."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{name} is not described by dtype, shape and data_offsets")
    dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise FormatError(f"{name} is of the unknown type {str(dtype)[:80]!r}")
    for numbers, most in ((shape, MAX_AXES), (place, 2)):
        if not isinstance(numbers, list) or len(numbers) > most or not all(map(is_int, numbers)):
            raise FormatError(f"{name} has the impossible shape or place {str(numbers)[:80]}")
    if len(place) != 2 or place[1] - place[0] != _ITEM_BYTES[dtype] * math.prod(shape):
        raise FormatError(f"{name} is {dtype} {shape}, which does not take the bytes {str(place)[:80]}")
    return StoredArray(dtype, tuple(shape), place[0], place[1])

"""Bounded reading of `.npy` and `.npz`: no pickle, and no allocation larger than the size of the file justifies."""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path
from tokenize import TokenError
from typing import IO

import numpy as np

from mlxkv.errors import FormatError
from mlxkv.io.inputs import open_input

# Exceptions that NumPy does not catch when it reads a header, a Python literal.
_HEADER_ERRORS = (SyntaxError, TypeError, AttributeError, RecursionError, TokenError)


def read_npy(file: IO[bytes], size: int, name: str) -> np.ndarray:
    """Read one `.npy` stream.

    Parameters
    ----------
    file
        The stream, at its beginning.
    size
        Bytes that it holds.
    name
        Name of its source for messages.

    Returns
    -------
    np.ndarray
        The array, read-only.

    Raises
    ------
    FormatError
        Unless the header describes exactly those bytes, without Python objects.
    """
    try:
        version = np.lib.format.read_magic(file)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran, dtype = readers[version](file)
        expected = file.tell() + dtype.itemsize * math.prod(shape)
        if dtype.hasobject or any(n < 0 for n in shape) or expected != size:
            raise FormatError(f"{name} declares {dtype} {shape}, {expected} bytes in all, but holds {size}")
        data = file.read(size)
        array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    except (ValueError, LookupError, EOFError, MemoryError, OverflowError, *_HEADER_ERRORS) as error:
        raise FormatError(f"{name} is not a NumPy array file: {error}") from None
    return array


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """Read all arrays of an uncompressed `.npz`. The zip's CRC-32 of every member is verified.

    Parameters
    ----------
    path
        The archive, from any source.

    Returns
    -------
    dict[str, np.ndarray]
        The arrays by name.

    Raises
    ------
    InputError
        When the file cannot be opened.
    FormatError
        When it is damaged, compressed or no `.npz`.
    """
    arrays: dict[str, np.ndarray] = {}
    with open_input(path) as file:
        try:
            length = file.seek(0, os.SEEK_END)
            archive = zipfile.ZipFile(file)
            if sum(info.file_size for info in archive.infolist()) > length:
                raise FormatError(f"{path}: its members claim more bytes than the file's {length}")
            for info in archive.infolist():
                key = info.filename.removesuffix(".npy")
                if info.compress_type != zipfile.ZIP_STORED:
                    raise FormatError(
                        f"{path}: {info.filename} is compressed; save with np.savez, not savez_compressed"
                    )
                if key == info.filename or key in arrays:
                    raise FormatError(f"{path}: unexpected or repeated member {info.filename!r}")
                with archive.open(info) as member:
                    arrays[key] = read_npy(member, info.file_size, f"{path}: {info.filename}")
        except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, OSError) as error:
            # All that zipfile raises on a damaged archive; NotImplementedError stands for an unknown zip version.
            raise FormatError(f"{path} is not a readable .npz file: {error}") from None
    return arrays

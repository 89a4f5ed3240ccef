"""Reading and writing: atomic writes, bounded `.npy` and `.npz` reading, cache dumps.

Whatever is read is treated as hostile: no pickle, and no allocation that the file's own size does not justify.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np

from mlxkv.cache import STREAMS, CacheSpec, KVDump, is_whole
from mlxkv.errors import FormatError, InputError, VersionError

DUMP_VERSION = 1
_JOURNAL = struct.Struct("<8sQ16s16s")  # magic, bytes to keep, BLAKE2b-128 of their beginning and of the rest
_JOURNAL_MAGIC = b"MLXKVjnl"
_COMPARED = 2**20
_STATE, _SENSITIVITY = "state.", "sensitivity."
_MEASURED = {*STREAMS, *(f"{name}.energy" for name in STREAMS)}
# What NumPy lets through from its own reading of a header, a Python literal.
_HEADER_ERRORS = (SyntaxError, TypeError, AttributeError, RecursionError, TokenError)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name only when complete: written aside, flushed to disk, renamed.

    An exception (Ctrl-C too) removes the unfinished file; a killed process leaves only a `.tmp` file behind.
    """
    path = _target(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def replace_rest(path: str | Path, keep: int, rest: bytes) -> None:
    """Put `rest` in place of all that follows the first `keep` bytes of a file, without writing those again.

    What is to be written stands in a journal beside the file before the file changes: killed at any time, the file is
    the old one or, once `finish_replacing` has seen it, the new one.
    """
    journal = _journal(path)
    with open_input(path) as file:
        start = _digest(file.read(min(keep, _COMPARED)))
    with atomic_write(journal) as file:
        file.write(_JOURNAL.pack(_JOURNAL_MAGIC, keep, start, _digest(rest)))
        file.write(rest)
    finish_replacing(path)


def finish_replacing(path: str | Path) -> None:
    """Do what a journal beside the file says is to be done, if there is one.

    Raises FormatError for a journal that is damaged or of another file, InputError where the file cannot be written.
    """
    journal = _journal(path)
    if not os.path.isfile(journal):
        return
    with open_input(journal) as opened:
        head, rest = opened.read(_JOURNAL.size), opened.read()
    magic, keep, start, expected = _JOURNAL.unpack(head.ljust(_JOURNAL.size, b"\0"))
    try:
        with open(_target(path), "r+b") as file:
            fits = os.fstat(file.fileno()).st_size >= keep and _digest(file.read(min(keep, _COMPARED))) == start
            if magic != _JOURNAL_MAGIC or _digest(rest) != expected or not fits:
                raise FormatError(f"{journal} does not fit {path}: it is damaged or of another file; remove it")
            file.seek(keep)
            file.write(rest)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        journal.unlink()
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def _journal(path: str | Path) -> Path:
    folder, name = os.path.split(os.path.realpath(path))
    return Path(folder, f".{name}.rest")


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


def _target(path: str | Path) -> Path:
    """Where a write to `path` goes: through symbolic links, and never in place of a device, pipe or folder."""
    target = Path(path).resolve()
    if not str(path) or (target.exists() and not target.is_file()):
        raise InputError(f"cannot write {str(path)!r}: not a file name, or something else than a file")
    return target


def open_input(path: str | Path) -> IO[bytes]:
    """Open a regular file for reading; a missing, unreadable or other one is an InputError."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError(f"cannot read {path}: not a regular file")
        return open(path, "rb")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def read_npy(file: IO[bytes], size: int, name: str) -> np.ndarray:
    """One `.npy` stream of `size` bytes. Raises FormatError unless its header describes exactly those bytes."""
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
    """All arrays of an uncompressed `.npz`. The zip's CRC-32 of every member is verified.

    Raises InputError when the file cannot be opened and FormatError when it is damaged or not an `.npz`.
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


def write_dump(path: str | Path, dump: KVDump) -> None:
    """Write a KVDump as an `.npz` of k, v, layers, tokens, meta, one `state.…` array for each other state, and
    `sensitivity.…` if it has one."""
    meta = {
        "version": DUMP_VERSION,
        "model": dump.model,
        "fingerprint": dump.fingerprint,
        "dtype": dump.dtype,
        "spec": dump.spec.to_json(),
        "start": dump.start,
    }
    arrays: dict[str, Any] = {_STATE + key: value for key, value in dump.states.items()}
    arrays |= {_SENSITIVITY + key: value for key, value in dump.sensitivity.items()}
    arrays.update(k=dump.k, v=dump.v, tokens=dump.tokens, meta=np.array(json.dumps(meta)))
    arrays["layers"] = np.array(dump.spec.attention_layers, dtype=np.int32)
    with atomic_write(path) as file:
        np.savez(file, **arrays)


def read_dump(path: str | Path) -> KVDump:
    """Read what `write_dump` wrote. Raises InputError, FormatError, VersionError or MismatchError."""
    arrays = read_npz(path)
    missing = {"k", "v", "tokens", "meta", "layers"} - set(arrays)
    if missing:
        raise FormatError(f"{path} is no cache dump: {', '.join(sorted(missing))} missing; make one with mlxkv dump")
    meta = parse_json(arrays["meta"].tobytes(), f"{path}: meta")  # json knows UTF-32, NumPy's text
    if meta.get("version") != DUMP_VERSION:
        raise VersionError(f"{path} is a dump of version {meta.get('version')!r}; this mlxkv reads {DUMP_VERSION}")
    spec = CacheSpec.from_json(meta.get("spec", {}))
    if not np.array_equal(arrays["layers"], spec.attention_layers):
        raise FormatError(f"{path}: layers and meta disagree on which layers keep a cache")
    k, v, tokens = arrays["k"], arrays["v"], arrays["tokens"]
    if k.dtype not in (np.float16, np.float32) or v.dtype != k.dtype or tokens.dtype != np.int32:
        raise FormatError(
            f"{path}: expected float16 or float32 k and v and int32 tokens, found {k.dtype}, {v.dtype}, {tokens.dtype}"
        )
    model, fingerprint, dtype = (str(meta.get(key, "")) for key in ("model", "fingerprint", "dtype"))
    sensitivity = _starting(arrays, _SENSITIVITY)
    if sensitivity and (set(sensitivity) != _MEASURED or any(not _is_finite(a) for a in sensitivity.values())):
        raise FormatError(f"{path}: its sensitivity is not finite float32 of k, v and their energies")
    if not is_whole(start := meta.get("start", 0)):
        raise FormatError(f"{path}: its first token is at position {start!r}")
    return KVDump(k, v, spec, tokens, model, fingerprint, dtype, _starting(arrays, _STATE), sensitivity, start)


def _starting(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}


def _is_finite(array: np.ndarray) -> bool:
    return array.dtype == np.float32 and bool(np.isfinite(array).all())


def parse_json(text: str | bytes, name: str) -> dict[str, Any]:
    """A JSON object from untrusted text. Raises FormatError when it is anything else."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError, TypeError) as error:
        raise FormatError(f"{name} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise FormatError(f"{name} should be a JSON object, not {type(data).__name__}")
    return data

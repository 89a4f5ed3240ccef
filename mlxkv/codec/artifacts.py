"""What calibration leaves behind: arrays and plans of each stream, and the facts they were made from.

On disk a folder: for each field of a stream's part one file, such as k_mu.npy, k_V.npy and k_plan.json, and meta.json,
which holds a checksum of each of the others and is written last.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mlxkv.cache import STREAMS, CacheSpec, Rope
from mlxkv.codec.plan import Plan
from mlxkv.container import digest
from mlxkv.errors import ChecksumError, FormatError, InputError, MismatchError, VersionError
from mlxkv.files import atomic_write, open_input, parse_json, read_npy
from mlxkv.registry import method_module

VERSION = 1


@dataclass(frozen=True)
class CalibrationArtifacts:
    """Everything a codec needs beside the file. k, v: the streams' parts, as the method defines them. meta: method,
    settings, model, tokens and versions."""

    k: Any
    v: Any
    spec: CacheSpec
    meta: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name in STREAMS:
            width, found = self.spec.stream(name).width, self.stream(name).width
            if width != found:
                raise MismatchError(f"the {name} artifacts are {found} wide; the model's cache is {width} wide")

    def stream(self, name: str) -> Any:
        """The k or v part."""
        return self.k if name == "k" else self.v

    @property
    def method(self) -> ModuleType:
        """The file of the codec method that made them. Raises FormatError when there is none."""
        return _method(self.meta, "these artifacts")

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays: shared by all files, so reported beside their ratios."""
        return sum(
            value.nbytes for name in STREAMS for value in _fields(self.stream(name)).values() if _is_array(value)
        )

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that decides how a file decodes: a container names it and opens with no other."""
        parts = [json.dumps(self.spec.to_json(), sort_keys=True).encode()]
        for name in STREAMS:
            for value in _fields(self.stream(name)).values():
                if _is_array(value):
                    parts.append(digest(value.tobytes()))
                else:
                    parts.append(json.dumps(value.to_json(), sort_keys=True).encode())
        return digest(b"".join(parts)).hex()

    def save(self, directory: str | Path) -> None:
        """Write the folder; each file atomically, meta.json last."""
        directory = Path(directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make {directory}: {error.strerror}") from None
        checksums = {}
        for name in STREAMS:
            for key, value in _fields(self.stream(name)).items():
                data = _npy(value) if _is_array(value) else json.dumps(value.to_json()).encode()
                file_name = f"{name}_{key}.{'npy' if _is_array(value) else 'json'}"
                checksums[file_name] = digest(data).hex()
                with atomic_write(directory / file_name) as file:
                    file.write(data)
        stream = self.spec.stream("k")
        meta = {
            "version": VERSION,
            **self.meta,
            "mode": self.spec.mode,
            "rope": [rope and rope.to_json() for rope in dict.fromkeys(stream.ropes)],
            "geometry": {n: _geometry(self.spec, n) for n in STREAMS},
            "spec": self.spec.to_json(),
            "fingerprint": self.fingerprint,
            "checksums": checksums,
        }
        with atomic_write(directory / "meta.json") as file:
            file.write(json.dumps(meta, indent=1).encode())

    @classmethod
    def from_dir(cls, directory: str | Path) -> CalibrationArtifacts:
        """Read and verify a folder. Raises InputError, FormatError, ChecksumError or VersionError."""
        directory = Path(directory)
        if not (directory / "meta.json").is_file():
            raise InputError(
                f"{directory} holds no calibration artifacts (no meta.json); make them with mlxkv calibrate"
            )
        meta = parse_json(_read(directory / "meta.json"), str(directory / "meta.json"))
        if meta.get("version") != VERSION:
            raise VersionError(
                f"{directory} has artifacts of version {meta.get('version')!r}; this mlxkv reads {VERSION}"
            )
        checksums = meta.pop("checksums", None)
        kind, known = _method(meta, str(directory)).StreamArtifacts, checksums if isinstance(checksums, dict) else {}
        parts = [_read_part(kind, directory, name, known) for name in STREAMS]
        artifacts = cls(parts[0], parts[1], CacheSpec.from_json(meta.pop("spec", {})), meta)
        if meta.get("fingerprint") != artifacts.fingerprint:
            raise ChecksumError(f"{directory}/meta.json does not describe the files beside it; calibrate again")
        return artifacts


def check_rope(spec: CacheSpec, stated: Rope | Mapping[str, Any]) -> None:
    """Compare a preset's rope facts (any of Rope's fields) with the model's. Raises MismatchError on a difference."""
    facts = stated.to_json() if isinstance(stated, Rope) else stated
    for rope in set(spec.stream("k").ropes):
        found = {} if rope is None else rope.to_json()
        wrong = {key: value for key, value in facts.items() if found.get(key) != value}
        if wrong:
            shown = {key: found.get(key) for key in wrong}
            raise MismatchError(
                f"the rotation differs: expected {wrong}, the cache has {shown if rope else 'no rope at all'}"
            )


def _geometry(spec: CacheSpec, name: str) -> dict[str, int]:
    stream = spec.stream(name)
    return {"layers": stream.layers, "heads": stream.heads, "dim": stream.dim, "width": stream.width}


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _read(path: Path) -> bytes:
    with open_input(path) as file:
        return file.read()


def _read_part(kind: type[Any], directory: Path, name: str, checksums: Mapping[str, Any]) -> Any:
    values: dict[str, Any] = {}
    for field in fields(kind):
        is_plan = field.type == Plan.__name__
        path = directory / f"{name}_{field.name}.{'json' if is_plan else 'npy'}"
        data = _read(path)
        if digest(data).hex() != checksums.get(path.name):
            raise ChecksumError(f"{path} is damaged or from another calibration; calibrate again")
        if is_plan:
            values[field.name] = Plan.from_json(parse_json(data, str(path)))
        else:
            values[field.name] = read_npy(io.BytesIO(data), len(data), path.name)
    return kind(**values)


def _fields(part: Any) -> dict[str, Any]:
    return {field.name: getattr(part, field.name) for field in fields(part)}


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray)


def _method(meta: Mapping[str, Any], name: str) -> ModuleType:
    module = method_module(meta.get("method"), ("mlxkv.codec",))
    if module is None:
        raise FormatError(f"{name} are of method {meta.get('method')!r}, which this mlxkv does not have: upgrade mlxkv")
    return module

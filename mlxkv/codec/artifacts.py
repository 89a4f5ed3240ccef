"""What calibration leaves behind: for each stream a mean, a basis and a plan, and the facts they were made from.

On disk a folder: k_mu.npy, k_V.npy, k_plan.json, v_mu.npy, v_V.npy, v_plan.json and meta.json, which holds a
checksum of each of the others and is written last.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mlxkv.cache import STREAMS, CacheSpec, Rope
from mlxkv.codec.plan import Plan
from mlxkv.container import digest
from mlxkv.errors import ChecksumError, FormatError, InputError, MismatchError, VersionError
from mlxkv.files import atomic_write, open_input, parse_json, read_npy

VERSION = 1


@dataclass(frozen=True)
class StreamArtifacts:
    """mu: `[p]` float32. V: `[p, r]` float16, orthonormal columns, only as many as the plan codes. plan: the bits."""

    mu: np.ndarray
    V: np.ndarray
    plan: Plan

    def __post_init__(self) -> None:
        if self.mu.ndim != 1 or self.V.ndim != 2 or self.V.shape != (self.mu.size, self.plan.rank):
            raise FormatError(
                f"artifacts disagree: mean {self.mu.shape}, basis {self.V.shape}, plan of rank {self.plan.rank}"
            )
        if self.mu.dtype != np.float32 or self.V.dtype != np.float16:
            raise FormatError(f"expected a float32 mean and a float16 basis, found {self.mu.dtype} and {self.V.dtype}")
        if self.mu.size and not self.plan.bits:
            raise FormatError("the plan codes nothing: calibrate with a lower compression ratio")


@dataclass(frozen=True)
class CalibrationArtifacts:
    """Everything a codec needs beside the file. meta: method, ratio, rank, model, tokens and versions."""

    k: StreamArtifacts
    v: StreamArtifacts
    spec: CacheSpec
    meta: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name in STREAMS:
            width, found = self.spec.stream(name).width, self.stream(name).mu.size
            if width != found:
                raise MismatchError(f"the {name} artifacts are {found} wide; the model's cache is {width} wide")

    def stream(self, name: str) -> StreamArtifacts:
        return self.k if name == "k" else self.v

    @property
    def nbytes(self) -> int:
        """Bytes of means and bases: shared by all files, so reported beside their ratios."""
        return sum(part.mu.nbytes + part.V.nbytes for part in (self.k, self.v))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that decides how a file decodes: a container names it and opens with no other."""
        parts = [json.dumps(self.spec.to_json(), sort_keys=True).encode()]
        for part in (self.k, self.v):
            plan = json.dumps(part.plan.to_json(), sort_keys=True).encode()
            parts += [digest(part.mu.tobytes()), digest(part.V.tobytes()), plan]
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
            part = self.stream(name)
            contents = {
                f"{name}_mu.npy": _npy(part.mu),
                f"{name}_V.npy": _npy(part.V),
                f"{name}_plan.json": json.dumps(part.plan.to_json()).encode(),
            }
            for file_name, data in contents.items():
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
        parts = [_read_stream(directory, name, checksums if isinstance(checksums, dict) else {}) for name in STREAMS]
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


def _read_stream(directory: Path, name: str, checksums: Mapping[str, Any]) -> StreamArtifacts:
    contents = {}
    for file_name in (f"{name}_mu.npy", f"{name}_V.npy", f"{name}_plan.json"):
        data = contents[file_name] = _read(directory / file_name)
        if digest(data).hex() != checksums.get(file_name):
            raise ChecksumError(f"{directory / file_name} is damaged or from another calibration; calibrate again")
    arrays = [read_npy(io.BytesIO(contents[key]), len(contents[key]), key) for key in list(contents)[:2]]
    plan = Plan.from_json(parse_json(contents[f"{name}_plan.json"], f"{directory / name}_plan.json"))
    return StreamArtifacts(arrays[0], arrays[1], plan)

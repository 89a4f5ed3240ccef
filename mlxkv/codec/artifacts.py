"""Calibration artifacts: the bases, tables and bit plans of both streams, and the facts they were made from.

On disk they are a folder: one file for each field of a stream's artifacts, such as k_mu.npy, k_V.npy and k_plan.json, and
meta.json, which holds a checksum of each of the others. Files of the second group of layers and later ones begin with its
number, such as 1_k_mu.npy. A folder appears complete, and is replaced as a whole.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from mlxkv.codec.layout import coded_streams
from mlxkv.codec.methods.base import BlockCoder, CodecMethod, StreamArtifacts, codec_methods
from mlxkv.dump import stream_key
from mlxkv.errors import ChecksumError, FormatError, InputError, MismatchError, VersionError
from mlxkv.identity import same_model
from mlxkv.io.container import digest
from mlxkv.io.folders import check_folder, held, identity, write_folder
from mlxkv.io.inputs import MAX_JSON, parse_json, read_bytes
from mlxkv.io.npz import read_npy
from mlxkv.spec import STREAMS, CacheSpec, Stream

VERSION = 1
_ATTEMPTS = 100  # to read a folder before another takes its place
# What a folder of artifacts holds: their files, and what older versions of mlxkv or a Mac's Finder left among them.
_PART = re.compile(r"([0-9]+_)?[kv]_\w+\.(npy|json)|meta\.json|\..+\.\d+\.tmp|\.DS_Store")


@dataclass(frozen=True)
class CalibrationArtifacts:
    """Bases, tables and bit plans learnt in calibration, and the facts they were made from.

    All files of a model share them; a file decodes only with the artifacts that it was coded with.

    Parameters
    ----------
    k, v
        Artifacts of the main group's two streams, as the method defines them.
    spec
        Description of the model's cache.
    meta
        Method, settings, model, tokens and versions: the contents of meta.json.
    others
        Artifacts of other groups of layers, in the order of `spec.groups`: "1.k", "1.v", "2.k" and so on.

    Raises
    ------
    MismatchError
        When the artifacts do not fit the description.
    """

    k: StreamArtifacts
    v: StreamArtifacts
    spec: CacheSpec
    meta: Mapping[str, Any]
    others: Mapping[str, StreamArtifacts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keys = {stream_key(index, name) for index in range(1, len(self.spec.groups)) for name in STREAMS}
        if keys != set(self.others):
            raise MismatchError(
                f"the model's cache has layers of {len(self.spec.groups)} shapes; there are artifacts of"
                f" k, v{''.join(f', {key}' for key in self.others)}: calibrate again"
            )
        for index, group in enumerate(self.spec.groups):
            for name in STREAMS:
                width, found = group.stream(name).width, self.stream(name, index).width
                if width != found:
                    key = stream_key(index, name)
                    raise MismatchError(f"the {key} artifacts are {found} wide; the model's cache is {width} wide")

    def stream(self, name: str, group: int = 0) -> StreamArtifacts:
        """Return the artifacts of one stream.

        Parameters
        ----------
        name
            "k" or "v".
        group
            Number of the group of layers; 0 is the main one.

        Returns
        -------
        StreamArtifacts
            Its artifacts.
        """
        if group:
            return self.others[stream_key(group, name)]
        return self.k if name == "k" else self.v

    @property
    def streams(self) -> dict[str, StreamArtifacts]:
        """Artifacts of both streams of the main group by name."""
        return self.group_streams(0)

    def group_streams(self, group: int) -> dict[str, StreamArtifacts]:
        """Return the artifacts of both streams of a group of layers.

        Parameters
        ----------
        group
            Its number; 0 is the main one.

        Returns
        -------
        dict[str, StreamArtifacts]
            Artifacts of "k" and "v".
        """
        return {name: self.stream(name, group) for name in STREAMS}

    @property
    def coded_streams(self) -> list[Stream]:
        """Streams of the main group whose width is above 0: all but the unused values stream of MLA."""
        return coded_streams(self.spec.groups[0])

    @property
    def method_name(self) -> str:
        """Name of the codec method that learnt the artifacts."""
        return str(self.meta.get("method"))

    @property
    def method(self) -> CodecMethod:
        """The codec method that learnt the artifacts. Raises FormatError when it is not installed."""
        return _method(self.meta, "these artifacts")

    def coder(self, group: int = 0) -> BlockCoder:
        """Return a coder of blocks that uses these artifacts.

        Parameters
        ----------
        group
            Number of the group of layers whose blocks it codes; 0 is the main one.

        Returns
        -------
        BlockCoder
            The method's coder.
        """
        return self.method.coder(self.group_streams(group))

    @cached_property
    def coders(self) -> tuple[BlockCoder, ...]:
        """Coders of the blocks of all groups, which keep what they compute of the artifacts as long as these live."""
        return tuple(self.coder(group) for group in range(len(self.spec.groups)))

    def check_model(self, spec: CacheSpec, fingerprint: str, model: str = "") -> None:
        """Check that caches of a model can be coded with these artifacts, before the work of making one.

        Parameters
        ----------
        spec
            Description of the model's cache.
        fingerprint
            Fingerprint of the model.
        model
            Name of the model, for the message.

        Raises
        ------
        MismatchError
            When the artifacts are of another model, or describe it otherwise.
        """
        expected = str(self.meta.get("model_fingerprint", ""))
        if not same_model(fingerprint, expected):
            raise MismatchError(
                f"the cache is of {model or 'a model'} ({fingerprint}),"
                f" the artifacts of {self.meta.get('model') or 'a model'} ({expected})",
                "calibrate the model itself, with the same arguments and adapters",
            )
        if spec != self.spec:
            raise MismatchError("the cache's layers, heads or rotation differ from the artifacts'")

    def explain(self) -> dict[str, Any]:
        """Describe in readable form what each stream is coded with.

        Returns
        -------
        dict
            Values by label; those of other groups than the main one begin with the group's number, such as "1.k_width".
        """
        facts = self.method.explain(self.streams, self.meta)
        for group in range(1, len(self.spec.groups)):
            meta = {**self.meta, **group_facts(self.meta, group)}
            found = self.method.explain(self.group_streams(group), meta)
            facts |= {f"{group}.{key}": value for key, value in found.items()}
        return facts

    @property
    def recipe(self) -> dict[str, Any] | None:
        """The words by which a file says how to make artifacts of a method without calibration again; None where they were learnt."""
        return None if self.method.needs_calibration else {"spec": json.loads(json.dumps(self.spec.to_json()))}

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays. All files share them, so they are reported beside the files' ratios."""
        parts = (value for _, part in self._parts() for value in _fields(part).values())
        return sum(value.nbytes for value in parts if isinstance(value, np.ndarray))

    def _parts(self) -> Iterator[tuple[str, StreamArtifacts]]:
        """Yield the artifacts of all streams of all groups, by their names in files."""
        for index in range(len(self.spec.groups)):
            for name in STREAMS:
                yield stream_key(index, name), self.stream(name, index)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that decides how a file decodes: a container names it and opens with no other."""
        parts = [json.dumps(self.spec.to_json(), sort_keys=True).encode()]
        for _, part in self._parts():
            for value in _fields(part).values():
                if isinstance(value, np.ndarray):
                    parts.append(digest(value.tobytes()))
                else:
                    parts.append(json.dumps(value.to_json(), sort_keys=True).encode())
        return digest(b"".join(parts)).hex()

    def save(self, directory: str | Path, overwrite: bool = False) -> None:
        """Write the folder: it appears all at once, complete, and so does one that takes another's place.

        Parameters
        ----------
        directory
            Folder to write; it and those above it are made if they do not exist.
        overwrite
            Replace artifacts that are there. Files made with those can then no longer be read.

        Raises
        ------
        InputError
            When it cannot be written, holds artifacts and may not be overwritten, or holds anything else.
        """
        check_artifacts_folder(directory, overwrite)
        files = {}
        for name, part in self._parts():
            for key, value in _fields(part).items():
                is_array = isinstance(value, np.ndarray)
                data = _npy(value) if is_array else json.dumps(value.to_json()).encode()
                files[_file_name(name, key, is_array)] = data
        stream = self.spec.stream("k")
        meta = {
            "version": VERSION,
            **self.meta,
            "mode": self.spec.mode,
            "rope": [rope and rope.to_json() for rope in dict.fromkeys(stream.ropes)],
            "geometry": {
                stream_key(index, name): _geometry(group.stream(name))
                for index, group in enumerate(self.spec.groups)
                for name in STREAMS
            },
            "spec": self.spec.to_json(),
            "fingerprint": self.fingerprint,
            "checksums": {name: digest(data).hex() for name, data in files.items()},
        }
        write_folder(directory, {**files, "meta.json": json.dumps(meta, indent=1).encode()}, overwrite)

    @classmethod
    def from_dir(cls, directory: str | Path) -> CalibrationArtifacts:
        """Read and verify a folder.

        Parameters
        ----------
        directory
            Folder that `save` wrote, from any source.

        Returns
        -------
        CalibrationArtifacts
            The artifacts.

        Raises
        ------
        InputError
            When there are no artifacts.
        FormatError
            When they are damaged, or of a method that is not installed.
        ChecksumError
            When files have changed or are of different calibrations.
        VersionError
            When they were written in another format version.
        """
        directory = Path(directory)
        for _ in range(_ATTEMPTS):
            with held(directory) as before:
                try:
                    found = cls._read(directory)
                except (FormatError, InputError, MismatchError):
                    if identity(directory) == before:
                        raise
                else:
                    if identity(directory) == before:
                        return found
        raise InputError(f"cannot read {directory}: other artifacts keep taking its place")

    @classmethod
    def _read(cls, directory: Path) -> CalibrationArtifacts:
        """Read and verify a folder, which may be replaced meanwhile."""
        if not directory.exists():
            raise InputError(f"cannot read artifacts {directory}: there is no such folder")
        if not (directory / "meta.json").is_file():
            raise InputError(
                f"{directory} holds no calibration artifacts (no meta.json); make them with mlxkv calibrate"
            )
        meta = parse_json(read_bytes(directory / "meta.json", MAX_JSON), str(directory / "meta.json"))
        if meta.get("version") != VERSION:
            raise VersionError(
                f"{directory} has artifacts of version {str(meta.get('version'))[:80]!r}; this mlxkv reads {VERSION}"
            )
        checksums = meta.pop("checksums", None)
        kind = _method(meta, str(directory)).artifacts_class
        known = checksums if isinstance(checksums, dict) else {}
        spec = CacheSpec.from_json(meta.pop("spec", {}))
        keys = [stream_key(index, name) for index in range(len(spec.groups)) for name in STREAMS]
        parts = {key: _read_stream(kind, directory, key, known) for key in keys}
        artifacts = cls(parts.pop("k"), parts.pop("v"), spec, meta, parts)
        if meta.get("fingerprint") != artifacts.fingerprint:
            raise ChecksumError(f"{directory}/meta.json does not describe the files beside it; calibrate again")
        return artifacts


def check_artifacts_folder(directory: str | Path, overwrite: bool = False) -> None:
    """Check that artifacts may be written to a folder, before the work of learning them.

    Parameters
    ----------
    directory
        Folder to write.
    overwrite
        Whether artifacts that are there may be replaced.

    Raises
    ------
    InputError
        When it holds artifacts and they may not be replaced, or anything else, or is no folder.
    """
    check_folder(directory, lambda name: _PART.fullmatch(name) is not None, overwrite)


def group_facts(meta: Mapping[str, Any], group: int) -> dict[str, Any]:
    """Return the facts of meta.json about another group of layers than the main one.

    Parameters
    ----------
    meta
        The contents of meta.json, from any source.
    group
        The group's number, from 1.

    Returns
    -------
    dict
        JSON values by key; empty where there are none.
    """
    found = meta.get("groups")
    facts = found[group - 1] if isinstance(found, list) and len(found) >= group else {}
    return facts if isinstance(facts, dict) else {}


def _geometry(stream: Stream) -> dict[str, int]:
    """Return the sizes of a stream, for readers of meta.json."""
    return {"layers": stream.layers, "heads": stream.heads, "dim": stream.dim, "width": stream.width}


def _file_name(name: str, key: str, is_array: bool) -> str:
    """Return the name of the file that holds a field of a stream's artifacts."""
    return f"{name.replace('.', '_')}_{key}.{'npy' if is_array else 'json'}"


def _npy(array: np.ndarray) -> bytes:
    """Return an array as the bytes of a `.npy` file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _read_stream(
    kind: type[StreamArtifacts], directory: Path, name: str, checksums: Mapping[str, Any]
) -> StreamArtifacts:
    """Read and verify the files of one stream."""
    values: dict[str, Any] = {}
    types = get_type_hints(kind)
    for each in _dataclass_fields(kind):
        is_array = types[each.name] is np.ndarray
        path = directory / _file_name(name, each.name, is_array)
        data = read_bytes(path, None if is_array else MAX_JSON)
        if digest(data).hex() != checksums.get(path.name):
            raise ChecksumError(f"{path} is damaged or from another calibration; calibrate again")
        if is_array:
            values[each.name] = read_npy(io.BytesIO(data), len(data), path.name)
        else:
            values[each.name] = types[each.name].from_json(parse_json(data, str(path)))
    return kind(**values)


def _dataclass_fields(part: StreamArtifacts | type[StreamArtifacts]) -> tuple[Field[Any], ...]:
    """Return the fields of artifacts; each is stored as one file."""
    if not is_dataclass(part):
        raise MismatchError(f"{part!r} is no dataclass: a method's artifacts are one, with a field for each file")
    return fields(part)


def _fields(part: StreamArtifacts) -> dict[str, Any]:
    """Return the values of artifacts by field name."""
    return {each.name: getattr(part, each.name) for each in _dataclass_fields(part)}


def _method(meta: Mapping[str, Any], name: str) -> CodecMethod:
    """Return the codec method that meta.json names."""
    method = codec_methods.find(meta.get("method"))
    if method is None:
        found = str(meta.get("method"))[:80]
        raise FormatError(f"{name} are of method {found!r}, which this mlxkv does not have: upgrade mlxkv")
    return method()

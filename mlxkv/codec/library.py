"""Artifacts in the user's data folder, found by the model that they were learnt for.

Each entry is a folder that `CalibrationArtifacts.save` wrote, named by the artifacts' own fingerprint: calibrating again adds
one beside the others, and files made with those stay readable. The newest of a model is used for writing, any for reading.
"""

from __future__ import annotations

import os
import shlex
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from mlxkv.codec import calibrate
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.methods.base import codec_methods
from mlxkv.errors import FormatError, InputError, LibraryWarning, MismatchError, MlxkvError, suggest
from mlxkv.identity import same_model
from mlxkv.io.container import Reader, Source
from mlxkv.io.entries import SHORT, folder_for
from mlxkv.io.entries import Item as Item
from mlxkv.io.entries import home as home
from mlxkv.io.entries import items as items
from mlxkv.io.entries import resolve as resolve
from mlxkv.io.entries import short_id as short_id
from mlxkv.io.folders import private_folder, remove_folder, sweep_all
from mlxkv.presets import presets_of
from mlxkv.spec import CacheSpec

_ATTEMPTS = 5  # to add artifacts that other processes add and remove
_WRITABLE = "set MLXKV_ARTIFACTS to a folder that can be written"


def add(artifacts: CalibrationArtifacts) -> Path:
    """Add artifacts to the library. Those that are there already become the newest of their model.

    Parameters
    ----------
    artifacts
        The artifacts.

    Returns
    -------
    Path
        Folder of the entry.

    Raises
    ------
    InputError
        When the library cannot be written.
    """
    folder, failures = home() / artifacts.fingerprint, 0
    sweep_all(folder.parent)
    while not _renewed(folder, artifacts):
        try:
            private_folder(folder.parent)
            artifacts.save(folder, overwrite=folder.exists())
            break
        except InputError as error:
            failures += 1
            if failures == _ATTEMPTS:  # before, others may have added it, and removed it again
                raise InputError(error.message, error.hint or _WRITABLE) from error
    return folder


def find(
    model_fingerprint: str, method: str | None = None, spec: CacheSpec | None = None
) -> CalibrationArtifacts | None:
    """Return the newest artifacts of a model.

    Parameters
    ----------
    model_fingerprint
        Fingerprint of the model, from `mlxkv.identity.fingerprint`.
    method
        Name of a codec method; None for any.
    spec
        Description of the model's cache that they must have; None for any.

    Returns
    -------
    CalibrationArtifacts or None
        None where there are none.

    Warns
    -----
    LibraryWarning
        For entries that are skipped, since they are damaged or have another description.
    WeakFingerprintWarning
        When the artifacts name only the first values of the model's weights.
    """
    found = items() if model_fingerprint else []  # an empty one is of any model
    for item in found:
        if item.problem:
            _skip(item, item.problem)
    for item in sorted(found, key=lambda item: item.model_fingerprint != model_fingerprint):
        is_of_it = method in (None, item.method) and same_model(item.model_fingerprint, model_fingerprint)
        if is_of_it and not item.problem and (artifacts := _read(item, spec)) is not None:
            return artifacts
    return None


def for_model(spec: CacheSpec, fingerprint: str, model: str = "", method: str | None = None) -> CalibrationArtifacts:
    """Return the artifacts to write files of a model with: the newest that are calibrated, else those that need no calibration.

    Parameters
    ----------
    spec
        Description of the model's cache.
    fingerprint
        Fingerprint of the model.
    model
        Name of the model, for artifacts that are made now.
    method
        Name of a codec method; None for any, and `direct` where the library has none of this model.

    Returns
    -------
    CalibrationArtifacts
        The artifacts.

    Raises
    ------
    InputError
        When there are none of this method.
    """
    free = [name for name, kind in codec_methods.items() if not kind.needs_calibration]
    found = None if method in free else find(fingerprint, method, spec)
    if found is not None:
        return found
    if method is None or method in free:
        return calibrate.uncalibrated(spec, model=model, fingerprint=fingerprint, method=method or "direct")
    if codec_methods.find(method) is None:
        raise InputError(f"there is no codec method {str(method)[:80]!r}", suggest(method, codec_methods.names()))
    raise InputError(
        f"there are no artifacts of {model or 'this model'} for {method}",
        f"{calibrate_command(model, method)} makes them; {' and '.join(free)} need none",
    )


def calibrate_command(model: str, method: str = "") -> str:
    """Return the command that makes artifacts of a model.

    Parameters
    ----------
    model
        Name that the model is loaded by.
    method
        Name of a codec method, where it is not the usual one.

    Returns
    -------
    str
        A command line.

    Examples
    --------
    >>> calibrate_command("smollm2-135m")
    'mlxkv calibrate --model smollm2-135m'
    >>> calibrate_command("a b", "kvtc")
    "mlxkv calibrate --model 'a b' --method kvtc-16"
    """
    named = presets_of([method]) if method else []
    words = ["--method", method if method in named else named[0]] if named else []
    return shlex.join(["mlxkv", "calibrate", "--model", model or "MODEL", *words])


def for_file(source: Source) -> CalibrationArtifacts:
    """Return the artifacts that a compressed file was made with.

    Parameters
    ----------
    source
        A compressed file's bytes, or its path; the header is read alone.

    Returns
    -------
    CalibrationArtifacts
        Those of the library that the file names; or made again from its header, where its method needs no calibration.

    Raises
    ------
    InputError
        When the file cannot be opened.
    FormatError
        When the file or the artifacts are damaged.
    MismatchError
        When the artifacts are not here: the message says what to do.
    """
    with Reader(source) as reader:
        header, name = reader.header, reader.name
        if (again := calibrate.read_uncalibrated(reader)) is not None:
            return again
    if (folder := folder_for(header)) is not None:
        return CalibrationArtifacts.from_dir(folder)
    named, origin = str(header.get("artifacts")), header.get("meta")
    model = str(origin.get("model") or "") if isinstance(origin, Mapping) else ""
    raise MismatchError(
        f"{name} was made with artifacts {named[:SHORT]} of {model[:200] or 'a model'}, which are not in {home()}",
        f"on the machine that made it: mlxkv artifacts export {named[:SHORT]} --out FOLDER; then here: mlxkv artifacts import"
        " FOLDER. Or name a folder that holds them with --artifacts",
    )


def remove(beginning: str) -> Item:
    """Remove an entry. Files made with it can then no longer be read.

    Parameters
    ----------
    beginning
        The first digits of its fingerprint.

    Returns
    -------
    Item
        What was removed.

    Raises
    ------
    InputError
        When there is no such entry, or it cannot be removed.
    """
    item = resolve(beginning)
    sweep_all(item.folder.parent)
    remove_folder(item.folder)
    return item


def export(beginning: str, folder: str | Path) -> Item:
    """Write an entry to a folder, to be carried to another machine; `import_folder` and `--artifacts` take it there.

    Parameters
    ----------
    beginning
        The first digits of its fingerprint.
    folder
        Folder to write, which must not hold anything.

    Returns
    -------
    Item
        What was written.

    Raises
    ------
    InputError
        When there is no such entry, or the folder cannot be written.
    FormatError
        When the entry is damaged.
    """
    item = resolve(beginning)
    CalibrationArtifacts.from_dir(item.folder).save(folder)
    return item


def import_folder(folder: str | Path) -> Path:
    """Verify a folder of artifacts, from any source, and add it to the library.

    Parameters
    ----------
    folder
        What `export` or `CalibrationArtifacts.save` wrote.

    Returns
    -------
    Path
        Folder of the entry.

    Raises
    ------
    InputError
        When there are no artifacts, or the library cannot be written.
    FormatError
        When they are damaged, or of a method that is not installed.
    MismatchError
        When their parts do not belong together.
    """
    artifacts = CalibrationArtifacts.from_dir(folder)
    for group in range(len(artifacts.spec.groups)):
        artifacts.coder(group)  # which checks what a file of a stream cannot tell
    return add(artifacts)


def _skip(item: Item, problem: str) -> None:
    name = item.fingerprint[:SHORT]
    message = f"artifacts {name} in {item.folder.parent} are skipped: {problem}; mlxkv artifacts rm {name} removes them"
    warnings.warn(message, LibraryWarning, stacklevel=4)


def _read(item: Item, spec: CacheSpec | None) -> CalibrationArtifacts | None:
    """Read and verify an entry; return None, after a warning, where that fails."""
    try:
        found = CalibrationArtifacts.from_dir(item.folder)
        if found.fingerprint != item.fingerprint:
            raise FormatError("it holds other artifacts than its name says")
        if spec not in (None, found.spec):
            raise MismatchError(
                "they describe the layers, heads or rotation of the model otherwise than this mlxkv does"
            )
    except MlxkvError as error:
        if item.folder.exists():  # else another process has removed it meanwhile
            _skip(item, error.message)
        return None
    return found


def _renewed(folder: Path, artifacts: CalibrationArtifacts) -> bool:
    """Make an entry the newest if it is there, intact and tells as much as these artifacts; return whether it is."""
    try:
        found = CalibrationArtifacts.from_dir(folder)
        if found.fingerprint != folder.name or artifacts.meta.keys() - found.meta.keys():
            return False
    except MlxkvError:
        return False
    with suppress(OSError):  # one that may be read and not written
        os.utime(folder / "meta.json")
    return True

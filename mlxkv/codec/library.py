"""Artifacts in the user's data folder, found by the model that they were learnt for.

Each entry is a folder that `CalibrationArtifacts.save` wrote, named by the artifacts' own fingerprint: calibrating again adds
one beside the others, and files made with those stay readable. The newest of a model is used for writing, any for reading.
"""

from __future__ import annotations

import os
import re
import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from mlxkv.codec import calibrate
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.methods.base import codec_methods
from mlxkv.errors import FormatError, InputError, LibraryWarning, MismatchError, MlxkvError, suggest
from mlxkv.identity import same_model
from mlxkv.io.container import Reader, Source
from mlxkv.io.folders import held, identity, private_folder, remove_folder, sweep_all
from mlxkv.io.inputs import MAX_JSON, parse_json, read_bytes
from mlxkv.spec import CacheSpec

SHORT = 8  # digits of a fingerprint that name an entry, where they name one alone
_ATTEMPTS = 5  # to add artifacts that other processes add and remove
_NAME = re.compile(r"[0-9a-f]{32}")
_WRITABLE = "set MLXKV_ARTIFACTS to a folder that can be written"


class Item(NamedTuple):
    """An entry of the library, from its meta.json alone: nothing else of it is read or verified.

    Parameters
    ----------
    fingerprint
        The artifacts' fingerprint, which names the entry; 32 hexadecimal digits.
    folder
        Where it is.
    added
        Seconds since 1970 when it was added.
    nbytes
        Bytes of its files.
    problem
        Why it cannot be used; empty where nothing is known of that.
    method
        Name of the codec method.
    model
        Name of the model in calibration.
    model_fingerprint
        Fingerprint of the model.
    tokens
        Tokens that it was learnt from; None where it does not tell.
    """

    fingerprint: str
    folder: Path
    added: float
    nbytes: int
    problem: str = ""
    method: str = ""
    model: str = ""
    model_fingerprint: str = ""
    tokens: int | None = None


def home() -> Path:
    """Return the folder of the library, which need not exist.

    Returns
    -------
    Path
        `$MLXKV_ARTIFACTS`; or `artifacts` in `$MLXKV_HOME`, or in mlxkv's folder of the user's data: not of caches, since
        files cannot be read without their artifacts.
    """
    if own := os.environ.get("MLXKV_ARTIFACTS"):
        return Path(own)
    if of_all := os.environ.get("MLXKV_HOME"):
        return Path(of_all) / "artifacts"
    from platformdirs import user_data_path

    return user_data_path("mlxkv", appauthor=False) / "artifacts"


def items() -> list[Item]:
    """Return the entries of the library, the newest first. Damaged ones are among them, with their problem.

    Returns
    -------
    list[Item]
        Empty where there is no library.
    """
    return sorted(_items(), key=lambda item: (-item.added, item.fingerprint))


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
    while not _renewed(folder):
        try:
            private_folder(folder.parent)
            artifacts.save(folder, overwrite=folder.exists())
            break
        except InputError as error:
            failures += 1
            if failures == _ATTEMPTS:  # before, others may have added it, and removed it again
                raise InputError(error.message, error.hint or _WRITABLE) from error
    return folder


def find(model_fingerprint: str, method: str | None = None) -> CalibrationArtifacts | None:
    """Return the newest artifacts of a model.

    Parameters
    ----------
    model_fingerprint
        Fingerprint of the model, from `mlxkv.identity.fingerprint`.
    method
        Name of a codec method; None for any.

    Returns
    -------
    CalibrationArtifacts or None
        None where there are none.

    Warns
    -----
    LibraryWarning
        For entries that are skipped, since they are damaged.
    WeakFingerprintWarning
        When the artifacts name only the first values of the model's weights.
    """
    found = items() if model_fingerprint else []  # an empty one is of any model
    for item in found:
        if item.problem:
            _skip(item, item.problem)
    for item in sorted(found, key=lambda item: item.model_fingerprint != model_fingerprint):
        is_of_it = method in (None, item.method) and same_model(item.model_fingerprint, model_fingerprint)
        if is_of_it and not item.problem and (artifacts := _read(item)) is not None:
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
    found = None if method in free else find(fingerprint, method)
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
    """
    words = ["mlxkv", "calibrate", "--model", model or "MODEL", *(["--method", method] if method else [])]
    return shlex.join(words)


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


def folder_for(header: Mapping[str, Any]) -> Path | None:
    """Return the folder of the artifacts that a compressed file names, which nothing is read of.

    Parameters
    ----------
    header
        The header of the file, from any source.

    Returns
    -------
    Path or None
        None where the library has no such entry.
    """
    named = header.get("artifacts")
    if not isinstance(named, str) or not _NAME.fullmatch(named):
        return None
    return folder if (folder := home() / named).is_dir() else None


def resolve(beginning: str) -> Item:
    """Return the entry whose fingerprint begins so.

    Parameters
    ----------
    beginning
        The first hexadecimal digits of the fingerprint, as many as tell it from others.

    Returns
    -------
    Item
        The entry.

    Raises
    ------
    InputError
        When there is none, or more than one.
    """
    found = items()
    of_it = [item for item in found if beginning and item.fingerprint.startswith(beginning)]
    if len(of_it) == 1:
        return of_it[0]
    if of_it:
        names = ", ".join(short_id(item, found) for item in of_it)
        raise InputError(f"{beginning[:80]!r} begins the ids of {len(of_it)} artifacts: {names}", "give more digits")
    raise InputError(f"there are no artifacts {beginning[:80]!r} in {home()}", "mlxkv artifacts ls lists all")


def short_id(item: Item, among: Sequence[Item]) -> str:
    """Return the first digits of an entry's fingerprint: 8, or as many as tell it from others.

    Parameters
    ----------
    item
        The entry.
    among
        All entries.

    Returns
    -------
    str
        An id for `resolve`.
    """
    digits = range(SHORT, len(item.fingerprint))
    alone = (n for n in digits if sum(other.fingerprint.startswith(item.fingerprint[:n]) for other in among) <= 1)
    return item.fingerprint[: next(alone, None)]


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


def _read(item: Item) -> CalibrationArtifacts | None:
    """Read and verify an entry; return None, after a warning, where that fails."""
    try:
        found = CalibrationArtifacts.from_dir(item.folder)
        if found.fingerprint != item.fingerprint:
            raise FormatError("it holds other artifacts than its name says")
    except MlxkvError as error:
        if item.folder.exists():  # else another process has removed it meanwhile
            _skip(item, error.message)
        return None
    return found


def _renewed(folder: Path) -> bool:
    """Make an entry the newest if it is there and intact, and return whether it is."""
    try:
        if CalibrationArtifacts.from_dir(folder).fingerprint != folder.name:
            return False
    except MlxkvError:
        return False
    with suppress(OSError):  # one that may be read and not written
        os.utime(folder / "meta.json")
    return True


def _items() -> Iterator[Item]:
    """Yield an item for each folder of the library that is named by a fingerprint."""
    try:
        with os.scandir(home()) as entries:
            folders = [
                Path(entry.path)
                for entry in entries
                if _NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
            ]
    except FileNotFoundError:
        return
    except OSError as error:
        warnings.warn(f"cannot read {home()}: {error.strerror or error}", LibraryWarning, stacklevel=4)
        return
    yield from filter(None, map(_item, folders))


def _item(folder: Path) -> Item | None:
    """Return what an entry's meta.json says of it; None where another process has removed it meanwhile."""
    while True:
        with held(folder) as before:
            if before is None:
                return None
            item = _described(folder)
            if not item.problem or identity(folder) == before:
                return item


def _described(folder: Path) -> Item:
    """Return what an entry's meta.json says of it, or why it says nothing."""
    name, size, added = folder.name, 0, 0.0
    try:
        added = os.stat(folder).st_mtime
        with os.scandir(folder) as files:
            size = sum(file.stat(follow_symlinks=False).st_size for file in files)
        meta = parse_json(read_bytes(folder / "meta.json", MAX_JSON), "meta.json")
        added = os.stat(folder / "meta.json").st_mtime
        if meta.get("fingerprint") != name:
            raise FormatError("it holds other artifacts than its name says")
    except OSError as error:
        return Item(name, folder, added, size, f"{error.strerror or error}")
    except MlxkvError as error:
        return Item(name, folder, added, size, error.message)
    tokens = meta.get("calibration_tokens")
    return Item(
        name,
        folder,
        added,
        size,
        method=_text(meta, "method"),
        model=_text(meta, "model"),
        model_fingerprint=_text(meta, "model_fingerprint"),
        tokens=tokens if type(tokens) is int else None,
    )


def _text(meta: Mapping[str, Any], key: str) -> str:
    """Return a short text of a meta.json, from any source; empty where there is none."""
    value = meta.get(key)
    return value[:200] if isinstance(value, str) else ""

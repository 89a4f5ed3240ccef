"""Entries of the library of artifacts, from their meta.json alone: no array is read, and no MLX is loaded."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlxkv.errors import FormatError, InputError, LibraryWarning, MlxkvError
from mlxkv.io.folders import held, identity
from mlxkv.io.inputs import MAX_JSON, parse_json, read_bytes

SHORT = 8  # digits of a fingerprint that name an entry, where they name one alone
_NAME = re.compile(r"[0-9a-f]{32}")


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

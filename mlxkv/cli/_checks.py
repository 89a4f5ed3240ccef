"""Mistakes that can be found before anything expensive starts."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

import typer

Limit = Annotated[
    str | None,
    typer.Option(
        "--limit",
        metavar="SIZE",
        help="Most bytes that a compressed file may decode to, such as 20GB (256 MiB, or 200 times its own).",
    ),
]

Dtype = Annotated[
    Literal["auto", "float16", "float32"],
    typer.Option(
        help="Type that the cache is stored or coded from; auto is float16 where that loses nothing, else float32."
    ),
]


def at_least_1(value: int) -> int:
    """Return the value of an option; a range would widen the column of its name in the help."""
    if value < 1:
        raise typer.BadParameter(f"{value} is not 1 or more")
    return value


def read_size(text: str | None, option: str = "--limit") -> int | None:
    """Return a size such as "500MB" in bytes; None for None."""
    from mlxkv.errors import InputError

    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?) ?([KMGT]?)(i?)B?", text.strip(), re.ASCII | re.IGNORECASE)
    if not match:
        raise InputError(f"{option} is a size, such as 500MB or 20GB, not {text[:80]!r}")
    number, unit, binary = match.groups()
    power = "KMGT".find(unit.upper()) + 1 if unit else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def check_out_file(path: Path, source: Path | None = None) -> None:
    """Raise InputError when a file cannot be written at `path`, or would replace the `source` it is made from."""
    from mlxkv.errors import InputError

    target = path.resolve()
    if source is not None and target == source.resolve():
        raise InputError(f"cannot write {path}: it is the file to read; give another name")
    if target.exists() and not target.is_file():
        raise InputError(f"cannot write {str(path)!r}: not a file name, or something else than a file")
    if not target.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {target.parent}; make it first")
    _check_writable(path, target.parent)


def check_out_folder(path: Path) -> None:
    """Raise InputError when `path` is no folder to write into and cannot be made one."""
    from mlxkv.errors import InputError

    existing = path.resolve()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise InputError(f"cannot write {path}: {existing} is not a folder")
    _check_writable(path, existing)


def _check_writable(path: Path, folder: Path) -> None:
    from mlxkv.errors import InputError

    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"cannot write {path}: {folder} is not writable")

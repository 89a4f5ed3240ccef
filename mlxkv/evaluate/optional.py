"""Packages that only some evaluations need: they are imported when first used."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from mlxkv.errors import MlxkvError

_CHECKOUT = Path(__file__).parents[2]


def import_optional(name: str) -> Any:
    """Import a module of a package that the extra `eval` installs.

    Parameters
    ----------
    name
        Dotted name of the module.

    Returns
    -------
    module
        The module.

    Raises
    ------
    MlxkvError
        When the package is missing; the message says how to install it.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        # Of a checkout that is installed in place, by its path: pip has no other way to it.
        package = _CHECKOUT if (_CHECKOUT / "pyproject.toml").is_file() else "mlxkv"
        place = "-e " if package is _CHECKOUT else ""
        raise MlxkvError(
            f"no module {error.name}, which this evaluation needs", f"pip install {place}'{package}[eval]'"
        ) from None

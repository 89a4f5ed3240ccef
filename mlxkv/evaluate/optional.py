"""Packages that only some evaluations need: they are imported when first used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mlxkv.errors import MlxkvError


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
        # Which pip takes as an extra of the mlxkv that is installed, from a checkout or not.
        raise MlxkvError(f"no module {error.name}, which this evaluation needs", 'pip install "mlxkv[eval]"') from None

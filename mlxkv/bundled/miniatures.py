"""The trained miniatures: byte-level models of a few million parameters that a checkout holds.

They are ordinary mlx-lm model directories, `benchmarks/checkpoints/<name>/`, named "miniature/<name>".
`benchmarks/checkpoints/README.md` says how they were trained; an installed wheel has none.
"""

from __future__ import annotations

from pathlib import Path

from mlxkv.errors import ModelNotFoundError, suggest

PREFIX = "miniature/"
FOLDER = Path(__file__).parents[2] / "benchmarks" / "checkpoints"


def names() -> list[str]:
    """Return the names of the miniatures that are trained.

    Returns
    -------
    list[str]
        Names for `mlxkv.lm.load`, sorted; empty outside a checkout.
    """
    return sorted(PREFIX + weights.parent.name for weights in FOLDER.glob("*/model.safetensors"))


def model_path(name: str) -> Path:
    """Return the directory of a miniature.

    Parameters
    ----------
    name
        "miniature/<name>".

    Returns
    -------
    Path
        An mlx-lm model directory.

    Raises
    ------
    ModelNotFoundError
        When it is not trained; the message lists those that are, or says how to train one.
    """
    if name not in names():
        found = suggest(name, names()) if names() else "an installed mlxkv has none"
        raise ModelNotFoundError(
            f"no trained model {name[:80]!r}",
            f"{found}; train one in a checkout of the tag studies-2026-11: python -m benchmarks.miniature_training NAME",
        )
    return FOLDER / name.removeprefix(PREFIX)

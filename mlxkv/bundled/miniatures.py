"""The trained miniatures: byte-level models of a few million parameters that a checkout holds.

They are ordinary mlx-lm model directories, `benchmarks/checkpoints/<name>/`, named "miniature/<name>".
`benchmarks/miniatures.py` trains them; an installed wheel has none.
"""

from __future__ import annotations

from pathlib import Path

from mlxkv.errors import ModelNotFoundError

PREFIX = "miniature/"
FOLDER = Path(__file__).parents[2] / "benchmarks" / "checkpoints"


def names() -> list[str]:
    """The miniatures that are trained, as names for `lm.load`."""
    return sorted(PREFIX + weights.parent.name for weights in FOLDER.glob("*/model.safetensors"))


def model_path(name: str) -> Path:
    """The directory of "miniature/<name>". Raises ModelNotFoundError that lists those there are, or says how to train."""
    if name not in names():
        there_are = f"there are {', '.join(names())}" if names() else f"{FOLDER} holds none"
        raise ModelNotFoundError(
            f"no trained model {name!r}: {there_are}; train one in a checkout: python -m benchmarks.miniature_training NAME"
        )
    return FOLDER / name.removeprefix(PREFIX)

"""Options that take a name, with completion: of models, of presets and of live methods."""

from __future__ import annotations

from typing import Annotated

import typer


def model_names() -> list[str]:
    """Return names of models that need no hub."""
    from mlxkv.bundled import models

    return models.names()


def live_names() -> list[str]:
    """Return what --cache takes: presets of live methods, and those methods themselves."""
    from mlxkv.live.base import live_methods
    from mlxkv.presets import presets_of

    methods = live_methods.names()
    return sorted({*methods, *presets_of(methods)})


def codec_names() -> list[str]:
    """Return what --method takes: presets of codecs."""
    from mlxkv.presets import preset_names

    return sorted({*preset_names("methods")} - {*live_names()})


def codec_method_names() -> list[str]:
    """Return the names of codec methods."""
    from mlxkv.codec.methods import codec_methods

    return codec_methods.names()


def family_names() -> list[str]:
    """Return what --preset takes: presets of model families."""
    from mlxkv.presets import preset_names

    return preset_names("models")


def preset_and_method_names() -> list[str]:
    """Return all names that mlxkv presets explains."""
    return [*family_names(), *codec_names(), *live_names()]


def artifact_ids() -> list[tuple[str, str]]:
    """Return the ids of artifacts in the library, each with what it is of."""
    from mlxkv.io import entries

    items = entries.items()
    return [(entries.short_id(item, items), f"{item.method} of {item.model}") for item in items]


Model = Annotated[
    str,
    typer.Option(
        "--model",
        help="Local mlx-lm directory, hub id, smollm2-135m or gemma3-270m.",
        show_default=False,
        autocompletion=model_names,
    ),
]
Cache = Annotated[
    str | None,
    typer.Option(help="Live preset or method to start in.", autocompletion=live_names),
]
Method = Annotated[
    str | None,
    typer.Option(help="A method preset, such as kvtc-16 or kvtc-rd, in place of a ratio.", autocompletion=codec_names),
]
Preset = Annotated[
    str | None,
    typer.Option(help="Check the model against this model preset.", autocompletion=family_names),
]

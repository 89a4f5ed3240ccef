"""A model built from its config.json alone, whose weights have shapes and are never computed, and their size."""

from __future__ import annotations

import copy
import fnmatch
import itertools
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn
from mlx.utils import tree_flatten

from mlxkv.errors import InputError, MlxkvError
from mlxkv.models.probe import LOCK
from mlxkv.planning.configs import check_config, model_class

nn: Any = mlx.nn  # mypy sees none of its names
MOST_MODULES = 20_000  # those of mlx-lm's largest models are some thousands
_DEFAULTS = {"affine": (64, 4), "mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}


class Weights(NamedTuple):
    """The size of a model's weights, estimated from their shapes.

    Parameters
    ----------
    parameters
        How many numbers they are.
    bytes
        Bytes that they take, scales included; None where the config has a quantization that mlx-lm does not know.
    precision
        Such as "4-bit, group 64" or "bfloat16".
    """

    parameters: int
    bytes: int | None
    precision: str


def build_model(config: Mapping[str, Any]) -> tuple[str, Any]:
    """Build the model that a configuration describes, in 2 bytes a weight. No weight is computed.

    Parameters
    ----------
    config
        The content of a config.json, of any source.

    Returns
    -------
    name : str
        The module of `mlx_lm.models`.
    model : nn.Module
        The model.

    Raises
    ------
    InputError
        When no model of its type can be built from it.
    UnsupportedError
        When mlx-lm does not have the type.
    """
    check_config(config)
    name, model, arguments = model_class(config)
    try:
        with LOCK, _bounded_modules():
            built = model(arguments.from_dict(copy.deepcopy(dict(config))))
            built.eval()
            built.set_dtype(mx.bfloat16)
            return name, built
    except MlxkvError:
        raise
    except Exception as error:  # whatever a model's constructor raises is the reason
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise InputError(
            f"no {name} model can be built from this config.json: {type(error).__name__}: {reason}",
            "compare it with the one that the model was published with",
        ) from error


def weigh(model: Any, config: Mapping[str, Any]) -> Weights:
    """Return the size of a model's weights as they are loaded. The model's layers may be quantized afterwards.

    Parameters
    ----------
    model
        What `build_model` returned.
    config
        Its configuration, whose quantization is followed.

    Returns
    -------
    Weights
        The size.
    """
    if _text(config, "tie_word_embeddings") is not False:
        with suppress(Exception):  # without an output layer among the weights, some models drop theirs
            model.sanitize({})
    arrays = [array for _, array in cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))]
    parameters, size = sum(array.size for array in arrays), sum(array.nbytes for array in arrays)
    settings = _quantization(config)
    if settings is None:
        stated = _text(config, "torch_dtype") or _text(config, "dtype")
        dtype = stated if stated in ("float32", "float16") else "bfloat16"
        return Weights(parameters, 2 * size if dtype == "float32" else size, dtype)
    try:
        group, bits, mode, own = _settings(settings)
        nn.quantize(model, group, bits, mode=mode, class_predicate=_predicate(model, group, own))
    except Exception:  # noqa: BLE001  # settings of any kind: without them the size is not known
        return Weights(parameters, None, "an unknown quantization")
    stored = cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
    exact = f"{bits}-bit, group {group}" if mode == "affine" else mode
    return Weights(parameters, sum(array.nbytes for _, array in stored), exact)


def _predicate(model: Any, group: int, own: Mapping[str, Any]) -> Any:
    """Return which modules are quantized, as mlx-lm's conversion and its loader decide it."""
    suited = getattr(model, "quant_predicate", None)
    left = own.get("modules_to_not_convert") or ()

    def chosen(path: str, module: Any) -> Any:
        if path in own:
            return own[path]
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % group:
            return False
        if any(fnmatch.fnmatch(path, f"*{part}*") for part in left):
            return False
        return True if suited is None else suited(path, module)

    return chosen


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the quantization that a configuration states, mlx-lm's own first."""
    nested = config.get("text_config")
    for part in (config, nested if isinstance(nested, Mapping) else {}):
        for key in ("quantization", "quantization_config"):
            if isinstance(found := part.get(key), Mapping):
                return None if found.get("quant_method") == "fp8" else found  # mlx-lm makes 16 bits of it
    return None


def _settings(stated: Mapping[str, Any]) -> tuple[int, int, str, Mapping[str, Any]]:
    """Return group size, bits and mode, and what is stated of single modules, as mlx-lm's `load_model` reads them."""
    method = stated.get("quant_method")
    if method in ("awq", "gptq"):
        return int(stated["group_size"]), int(stated["bits"]), "affine", {}
    if method in ("mxfp4", "mxfp8"):
        return *_DEFAULTS[method], method, stated
    if method == "modelopt":
        return *_DEFAULTS["nvfp4"], "nvfp4", {}
    if method == "compressed-tensors":
        packed = next(iter(stated["config_groups"].values()))["weights"]
        return int(packed["group_size"]), int(packed["num_bits"]), "affine", {}
    mode = stated.get("mode", "affine")
    group, bits = _DEFAULTS[mode]
    if "bits" not in stated and mode == "affine":
        raise InputError("the quantization states no bits")
    return int(stated.get("group_size") or group), int(stated.get("bits") or bits), mode, stated


def _text(config: Mapping[str, Any], key: str) -> Any:
    """Return what a configuration says, or that of its text model."""
    nested = config.get("text_config")
    return config.get(key, nested.get(key) if isinstance(nested, Mapping) else None)


@contextmanager
def _bounded_modules() -> Iterator[None]:
    """Stop a constructor that makes more modules than any model has."""
    original, count, thread = nn.Module.__init__, itertools.count(1), threading.get_ident()

    def init(self: Any) -> None:
        if threading.get_ident() == thread and next(count) > MOST_MODULES:
            raise InputError(f"this config.json describes a model of more than {MOST_MODULES:,} modules")
        original(self)

    nn.Module.__init__ = init
    try:
        yield
    finally:
        nn.Module.__init__ = original

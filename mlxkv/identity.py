"""Which model a cache is of: a fingerprint of weights, arguments and adapters, and what two fingerprints say."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any, cast

import mlx.core as mx
import numpy as np
import xxhash
from mlx.utils import tree_flatten

from mlxkv.errors import WeakFingerprintWarning

PIECE = 1 << 22  # values that are widened at a time
# Plain numbers of modules that change what the weights mean. Other attributes come and go with mlx-lm's versions.
SETTINGS = {"lora_a": ("scale",), "scales": ("bits", "group_size", "mode"), "weight": ("eps",)}
WEAK = (
    "two fingerprints agree in the first 64 values of every weight, which is all that one of them, of an older mlxkv, names:"
    " a model with other weights beyond those, other arguments or other adapter scales would agree as well;"
    " make the older file again for a fingerprint of everything"
)


def fingerprint(model: Any) -> str:
    """Return a short name for all that decides what a model computes.

    Parameters
    ----------
    model
        A loaded mlx-lm model.

    Returns
    -------
    str
        Sixteen hexadecimal digits, a dot and 32 digits. The first are BLAKE2b of every parameter's name, shape and first 64
        values, the whole fingerprint of earlier versions. The others are XXH3-128 of all values of all parameters, of the
        model's arguments, and of the settings of quantized layers, norms and adapters. Equal for float16 or bfloat16 weights
        and the same weights widened to float32.

    Notes
    -----
    Arguments that equal mlx-lm's defaults are left out, so that a new one does not change the fingerprint. Tables computed
    from arguments, such as a rotation's periods, are left out too: their last bit differs between devices. It is a mark of
    mistakes, and no protection against forgery.
    """
    parameters = cast(dict[str, mx.array], tree_flatten(model.parameters(), destination={}))
    parameters = dict(sorted(parameters.items()))
    digest = xxhash.xxh3_128()
    for part in _all_values(parameters):
        digest.update(part)
    digest.update(json.dumps([_plain(getattr(model, "args", None)), _settings(model)], sort_keys=True).encode())
    return f"{_first_values(parameters)}.{digest.hexdigest()}"


def same_model(found: str, stated: str) -> bool:
    """Compare two fingerprints, either of which may be of an earlier version.

    Parameters
    ----------
    found, stated
        Two results of `fingerprint`; empty ones agree with each other alone.

    Returns
    -------
    bool
        Whether they are of one model, as far as they tell.

    Warns
    -----
    WeakFingerprintWarning
        When they agree, but one of them names only the first values of every weight.

    Examples
    --------
    >>> same_model("0123456789abcdef.00", "0123456789abcdef.00"), same_model("0123456789abcdef.00", "0123456789abcdef.01")
    (True, False)
    """
    (first_found, _, all_found), (first_stated, _, all_stated) = found.partition("."), stated.partition(".")
    if first_found != first_stated or (all_found and all_stated and all_found != all_stated):
        return False
    if first_found and not (all_found and all_stated):
        warnings.warn(WEAK, WeakFingerprintWarning, stacklevel=2)
    return True


def _first_values(parameters: Mapping[str, mx.array]) -> str:
    """Return the fingerprint of earlier versions, from parameters sorted by name."""
    heads = {name: value.reshape(-1)[:64] for name, value in parameters.items()}
    heads = {n: v.astype(mx.float32) if mx.issubdtype(v.dtype, mx.floating) else v for n, v in heads.items()}
    mx.eval(heads)
    digest = blake2b(digest_size=8)
    for name, head in heads.items():
        digest.update(f"{name} {parameters[name].shape} ".encode() + np.array(head).tobytes())
    return digest.hexdigest()


def _all_values(parameters: Mapping[str, mx.array]) -> Iterator[bytes | memoryview]:
    """Yield every parameter's name, shape and values: floats as float32, whatever they are kept in, others as they are."""
    waiting: list[bytes | mx.array] = []
    size = 0
    for name, value in parameters.items():
        waiting.append(f"{name} {list(value.shape)} ".encode())
        for piece in _pieces(value.reshape(-1)):
            waiting.append(piece)
            size += piece.size
            if size >= PIECE:
                yield from _computed(waiting)
                waiting, size = [], 0
    yield from _computed(waiting)


def _pieces(flat: mx.array) -> Iterator[mx.array]:
    """Yield an array in pieces where it has to be widened, so that these need little memory."""
    if flat.dtype == mx.float32 or not mx.issubdtype(flat.dtype, mx.floating):
        yield flat
        return
    if flat.size > PIECE:
        mx.eval(flat)  # once: of a transposed array it is a copy
    for start in range(0, flat.size, PIECE):
        yield flat[start : start + PIECE].astype(mx.float32)


def _computed(parts: list[bytes | mx.array]) -> Iterator[bytes | memoryview]:
    """Compute all arrays of a list at once, as waiting for each would take longer than hashing it, and yield their bytes."""
    mx.eval([part for part in parts if isinstance(part, mx.array)])
    for part in parts:
        yield part if isinstance(part, bytes) else np.array(part, copy=False).data


def _settings(model: Any) -> dict[str, dict[str, Any]]:
    """Return plain numbers that stand beside parameters: of adapters, quantized layers and norms, by module."""
    found: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        keys = [key for parameter, keys in SETTINGS.items() if parameter in module for key in keys]
        if stated := {key: _plain(vars(module)[key]) for key in keys if key in vars(module)}:
            found[name] = stated
    return found


def _plain(value: Any) -> Any:
    """Return a value as JSON that is equal for equal values; a dataclass without fields that have their default."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: (getattr(value, field.name, None), field) for field in dataclasses.fields(value)}
        return {name: _plain(item) for name, (item, field) in fields.items() if not _is_default(item, field)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{float(value):.12g}"  # 20 and 20.0 are one scale
    return value if value is None or isinstance(value, bool | str) else type(value).__name__


def _is_default(value: Any, field: dataclasses.Field[Any]) -> bool:
    if field.default_factory is not dataclasses.MISSING:
        return bool(value == field.default_factory())
    return field.default is not dataclasses.MISSING and bool(value == field.default)

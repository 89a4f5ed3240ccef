"""Checks of a live cache's state that was set from outside, such as a file's: types, shapes and ranges."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import mlx.core as mx

from mlxkv.errors import FormatError, UnsupportedError
from mlxkv.kernels.bits import QuantizedArray
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.spec import Layer, is_int
from mlxkv.stock import FLOATS as FLOATS
from mlxkv.stock import MAX_OFFSET as MAX_OFFSET
from mlxkv.stock import check_array as check_array


def check_values(value: mx.array, name: str, least: float = -math.inf, most: float = math.inf) -> None:
    """Check that all values are numbers within bounds; this waits for the device.

    Parameters
    ----------
    value
        Any array.
    name
        Its name for messages.
    least, most
        Inclusive bounds; infinities are allowed only where a bound is one.

    Raises
    ------
    FormatError
        For NaN and for values out of bounds.
    """
    if not mx.all((value >= least) & (value <= most)).item():
        raise FormatError(f"{name} has values that are not between {least:g} and {most:g}")


def check_ascending(value: mx.array, name: str) -> None:
    """Check that values increase strictly along the last axis; this waits for the device.

    Parameters
    ----------
    value
        `[..., T]`.
    name
        Its name for messages.

    Raises
    ------
    FormatError
        When they do not.
    """
    if not mx.all(value[..., 1:] > value[..., :-1]).item():
        raise FormatError(f"{name} should be strictly ascending")


def check_kept(cache: Any, expected: int) -> None:
    """Check how many entries a live cache stores.

    Parameters
    ----------
    cache
        A `LayerCache`.
    expected
        The number that its method stores after `offset` tokens.

    Raises
    ------
    FormatError
        When it stores another number.
    """
    if cache.kept != expected:
        raise FormatError(f"{cache.kept} entries are stored, but {expected} are after {cache.offset} tokens")


def check_like(bucket: Any, name: str, like: Bucket) -> None:
    """Check that packed tokens have a precision, tiles and heads.

    Parameters
    ----------
    bucket
        Keys and values.
    name
        Their name for messages.
    like
        Keys and values of any number of tokens, packed as expected; only shapes are used.

    Raises
    ------
    FormatError
        When they are packed otherwise, or are no packed tokens.
    """
    if not isinstance(bucket, tuple) or len(bucket) != 2 or not all(isinstance(x, QuantizedArray) for x in bucket):
        raise FormatError(f"{name} should be packed keys and values")
    for part, found, want in zip(("keys", "values"), bucket, like):
        forms = [
            (x.bits, x.dim, x.tile_tokens, x.tile_dims, x.rotated, len(x.shape), x.shape[1]) for x in (found, want)
        ]
        if forms[0] != forms[1]:
            raise FormatError(
                f"{part} of {name} have {found.bits} bits in tiles of {found.tile_tokens} x {found.tile_dims} and shape "
                f"{list(found.shape)}, rotated {found.rotated}; this method packs {want.bits} bits, {want.tile_tokens} x "
                f"{want.tile_dims}, rotated {want.rotated}"
            )


def check_fields(cache: Any) -> None:
    """Check the type of each field of a live cache's state, and the shape of those that hold tokens.

    Parameters
    ----------
    cache
        A `LayerCache`.

    Raises
    ------
    FormatError
        Where a field of a declared type is of another, or a plain value of another type than in a new cache.
    """
    if not is_int(cache.offset, 0, MAX_OFFSET):
        raise FormatError(f"the offset is {str(cache.offset)[:40]!r}, no number of tokens up to {MAX_OFFSET}")
    fresh = type(cache)(cache.config, cache.spec, cache.layer)
    for name in cache.state_fields:
        value, plain = getattr(cache, name), getattr(fresh, name)
        if name in cache.state_types:
            if value is not None:
                _check_parts(cache, value, name)
        elif plain is not None and type(value) is not type(plain) and not {type(value), type(plain)} <= {int, float}:
            raise FormatError(f"{name} should be {type(plain).__name__}, not {str(value)[:40]!r}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise FormatError(f"{name} is {value}")
        if plain is None and value is not None and not cache.offset and not cache.buckets():
            raise FormatError(f"{name} is there before the first token")


def _check_parts(cache: Any, value: Any, name: str) -> None:
    """Check a field that is a NamedTuple of arrays: keys and values of a layer's shape, other parts of any."""
    kind = cache.state_types[name]
    if isinstance(kind, type) and not isinstance(value, kind):
        raise FormatError(f"{name} should be {kind.__name__}, not {str(value)[:40]!r}")
    fields, tokens = getattr(value, "_fields", ()), set()
    optional = getattr(value, "_field_defaults", {})
    for part, array in zip(fields, value):
        if part in ("keys", "values"):
            slot = cache.slots[("keys", "values").index(part)]
            check_array(array, f"{name}.{part}", (None, slot.heads, None, slot.dim))
            tokens.add((array.shape[0], array.shape[2], array.dtype))
        elif not isinstance(array, mx.array) and not (array is None and part in optional):
            raise FormatError(f"{name}.{part} should be an array, not {str(array)[:40]!r}")
    if len(tokens) > 1:
        raise FormatError(f"keys and values of {name} are not of the same tokens and type")


def check_buckets(cache: Any) -> None:
    """Check that all buckets fit the model and each other, and hold no more entries than there were tokens.

    Parameters
    ----------
    cache
        A `LayerCache`.

    Raises
    ------
    FormatError
        When they do not.
    """
    first, second = cache.slots
    batches = set()
    for keys, values in cache.buckets():
        found = [(*x.shape[1:2], x.shape[-1], len(x.shape)) for x in (keys, values)]
        if found != [(first.heads, first.dim, 4), (second.heads, second.dim, 4)] or keys.shape[2] != values.shape[2]:
            raise FormatError(f"keys {list(keys.shape)} and values {list(values.shape)} do not fit the model")
        if keys.dtype != values.dtype or keys.shape[0] != values.shape[0]:
            raise FormatError(f"keys and values differ: {keys.shape} {keys.dtype} and {values.shape} {values.dtype}")
        batches.add(keys.shape[0])
    if len(batches) > 1 or 0 in batches:
        raise FormatError(f"parts are of {' and '.join(map(str, sorted(batches)))} sequences")
    if cache.kept > cache.offset:
        raise FormatError(f"{cache.kept} entries are stored of {cache.offset} tokens")
    bias = cache.score_bias()
    if bias is not None and (bias.ndim != 3 or bias.shape[::2] != (min(batches), cache.kept)
                             or bias.shape[1] not in (1, first.heads)):  # fmt: skip
        raise FormatError(f"the bias of scores {list(bias.shape)} does not fit {cache.kept} entries")


def check_layer(kind: Any, described: Layer, name: str, methods: Iterable[tuple[str, Any]]) -> None:
    """Check that a method suits a layer.

    Parameters
    ----------
    kind
        The method's class.
    described
        The layer's description.
    name
        Its name for messages.
    methods
        All methods with their names.

    Raises
    ------
    UnsupportedError
        When it does not.
    """
    reason = (
        "chooses tokens by their index" if described.selects
        else "is read outside of mlx-lm's attention function" if described.use == "fetch"
        else None
    )  # fmt: skip
    names = {known: each for each, known in methods}
    method = names.get(kind, kind.__name__)
    if reason and not kind.any_use:
        suited = ", ".join(sorted(each for known, each in names.items() if known.any_use))
        raise UnsupportedError(
            f"{name} {reason}, so every token has to be there, and {method} does not keep each or needs its attention",
            f"methods for it: {suited}",
        )
    if described.window is not None and not kind.takes_windows:
        raise UnsupportedError(f"{name} has a sliding window, where {method} does not work: keep mlx-lm's own cache")

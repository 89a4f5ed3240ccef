"""Types in which tokens are stored: the model's own, or for float32 a type of 2 bytes that their range fits."""

from __future__ import annotations

from typing import cast

import mlx.core as mx

SMALL_CHUNK = 16  # up to so many tokens a chunk is one of decoding, which does not wait for the device
_LARGEST = 65504.0  # of float16
_RANGE = mx.array(-_LARGEST), mx.array(_LARGEST)  # numbers would be made arrays of for each token
_MARGIN = 8  # by which later tokens may exceed those that float16 was chosen for
_SMALLEST = 2.0**-8  # a head whose values are all below: 8-bit steps would fall among float16's subnormal numbers


def storage_dtype(keys: mx.array, values: mx.array, current: mx.Dtype | None) -> mx.Dtype:
    """Choose the type to store a chunk in.

    float32 becomes float16, or bfloat16 where the values are too large or too small for float16. The first chunk decides,
    with a margin; a chunk of a prompt can change the decision later. That needs the values, so only these chunks wait
    for the device.

    Parameters
    ----------
    keys, values
        The chunk, `[B, Hkv, L, D]` and `[B, Hkv, L, Dv]`, of one type.
    current
        The type of what is stored so far, None before the first chunk.

    Returns
    -------
    mx.Dtype
        The chunk's own type, unless that is float32.
    """
    if keys.dtype != mx.float32:
        return keys.dtype
    if current is not None and (current != mx.float16 or keys.shape[2] <= SMALL_CHUNK):
        return current
    tops = [mx.abs(x).max(axis=(0, 2, 3)) for x in (keys, values)]
    if keys.shape[2] == 1:  # a single token may well have a head without anything to say
        tops = [top.max(keepdims=True) for top in tops]
    most = mx.concatenate(tops)
    largest, smallest = cast(list[float], mx.stack([most.max(), mx.where(most > 0, most, 1).min()]).tolist())
    fits = smallest >= _SMALLEST and not largest > _LARGEST / (_MARGIN if current is None else 2)
    return mx.float16 if fits else mx.bfloat16


def to_storage_dtype(x: mx.array, dtype: mx.Dtype = mx.float16) -> mx.array:
    """Convert float32 to a type of 2 bytes, and leave other types.

    Parameters
    ----------
    x
        Any shape.
    dtype
        float16 or bfloat16.

    Returns
    -------
    mx.array
        The converted array, of the same shape. What is beyond float16 becomes its largest value.
    """
    if x.dtype != mx.float32:
        return x
    return (mx.clip(x, *_RANGE) if dtype == mx.float16 else x).astype(dtype)

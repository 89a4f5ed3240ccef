"""Sketches that estimate the total amount added to each key: N tables of `depth` rows by `width` hashed counters.

Count-Min (Cormode and Muthukrishnan, "An improved data stream summary", J. Algorithms 55, 2005) takes the smallest
of a key's counters: for amounts >= 0 never too low, but for float32's rounding, and too high by more than e / width of
all that was added with probability at most exp(-depth). With `signed` it is Count-Sketch (Charikar, Chen and
Farach-Colton, ICALP 2002): amounts are added with a sign that the key draws, which makes each row unbiased, and the
median of the rows is taken.

A row's hash is ((a * key + b) mod p) mod width, p = 2^31 - 1 (Carter and Wegman 1979), and its sign the parity of a
second one. Keys are token positions below p. Decay is a product: `update(decay * counters, ...)`.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlxkv.kernels import metal
from mlxkv.kernels.metal import Kernel
from mlxkv.kernels.operations import Example, Operation, register

PRIME = 2**31 - 1
_UPDATE = Kernel("count_min_update", inputs=("keys", "amounts", "hashes", "width"), outputs=("added",), atomic=True)
_QUERY = Kernel("count_min_query", inputs=("counters", "keys", "hashes"), outputs=("estimates",))


def hash_functions(depth: int, seed: int = 0) -> mx.array:
    """Draw the hash functions of a sketch: a and b of each row's column and of its sign.

    Parameters
    ----------
    depth
        Number of rows, at least 1.
    seed
        Equal seeds draw equal functions.

    Returns
    -------
    mx.array
        uint32 `[depth, 4]`: a and b of the column, a and b of the sign; 0 < a < p and 0 <= b < p.
    """
    return mx.array(np.random.default_rng(seed).integers([1, 0, 1, 0], PRIME, size=(depth, 4), dtype=np.uint32))


def update(counters: mx.array, keys: mx.array, amounts: mx.array, hashes: mx.array, signed: bool = False) -> mx.array:
    """Add each key's amount to its counter in every row.

    Parameters
    ----------
    counters
        float32 `[N, depth, width]`, finite.
    keys
        int32 or uint32 `[T]`, the same for all N, or `[N, T]`; a key may occur many times.
    amounts
        `[N, T]` of any float type.
    hashes
        From `hash_functions`, shared by all N.
    signed
        True for Count-Sketch, False for Count-Min.

    Returns
    -------
    mx.array
        Counters float32 `[N, depth, width]`. On Metal the order of additions, and so the last bit, is not fixed.

    Examples
    --------
    >>> hashes, keys = hash_functions(depth=4), mx.array([3, 1, 3])
    >>> counters = update(mx.zeros((1, 4, 64)), keys, mx.array([[1.0, 2.0, 4.0]]), hashes)
    >>> query(counters, mx.array([1, 3]), hashes).tolist()
    [[2.0, 5.0]]
    """
    return (metal_update if metal.available() else reference_update)(counters, keys, amounts, hashes, signed)


def query(counters: mx.array, keys: mx.array, hashes: mx.array, signed: bool = False) -> mx.array:
    """Estimate the total amount added to each key.

    Parameters
    ----------
    counters
        float32 `[N, depth, width]`, finite.
    keys
        int32 or uint32 `[T]`, the same for all N, or `[N, T]`.
    hashes
        Those of `update`.
    signed
        As it was in `update`.

    Returns
    -------
    mx.array
        float32 `[N, T]`: the smallest of a key's counters, or the median of its signed ones.
    """
    return (metal_query if metal.available() else reference_query)(counters, keys, hashes, signed)


def reference_update(
    counters: mx.array, keys: mx.array, amounts: mx.array, hashes: mx.array, signed: bool = False
) -> mx.array:
    """Add by the array operations that define `update`.

    Parameters
    ----------
    counters, keys, amounts, hashes, signed
        See `update`.

    Returns
    -------
    mx.array
        See `update`.
    """
    N, depth, width = counters.shape
    columns, signs = _columns_and_signs(keys, hashes, width, signed)
    # Sketches that share keys lie innermost: one scattered row adds to all of them.
    tables, tokens = len(columns), keys.shape[-1]
    amounts = amounts.astype(mx.float32).reshape(tables, N // tables, tokens).swapaxes(1, 2)
    table, row = mx.arange(tables)[:, None, None], mx.arange(depth)[:, None]
    added = (
        mx.zeros((tables, depth, width, N // tables)).at[table, row, columns].add(signs[..., None] * amounts[:, None])
    )
    return counters + added.transpose(0, 3, 1, 2).reshape(counters.shape)


def reference_query(counters: mx.array, keys: mx.array, hashes: mx.array, signed: bool = False) -> mx.array:
    """Estimate by the array operations that define `query`.

    Parameters
    ----------
    counters, keys, hashes, signed
        See `query`.

    Returns
    -------
    mx.array
        See `query`.
    """
    N, depth, width = counters.shape
    columns, signs = _columns_and_signs(keys, hashes, width, signed)
    at = mx.broadcast_to(columns, (N, depth, keys.shape[-1]))
    rows = signs * mx.take_along_axis(counters, at, axis=2)
    return mx.median(rows, axis=1) if signed else rows.min(axis=1)


def metal_update(
    counters: mx.array, keys: mx.array, amounts: mx.array, hashes: mx.array, signed: bool = False
) -> mx.array:
    """Add by the kernel, one thread for each token in each row of each sketch.

    Parameters
    ----------
    counters, keys, amounts, hashes, signed
        See `update`.

    Returns
    -------
    mx.array
        See `update`.
    """
    if amounts.size == 0:
        return counters
    N, depth, width = counters.shape
    added = _UPDATE(
        inputs=[_key_rows(keys), amounts.astype(mx.float32), hashes, mx.array(width, mx.uint32)],
        template=[("SIGNED", signed)],
        grid=(keys.shape[-1], depth, N),
        threadgroup=(256, 1, 1),
        output_shapes=[counters.shape],
        output_dtypes=[mx.float32],
        init_value=0,
    )[0]
    return counters + added


def metal_query(counters: mx.array, keys: mx.array, hashes: mx.array, signed: bool = False) -> mx.array:
    """Estimate by the kernel, one thread for each token of each sketch.

    Parameters
    ----------
    counters, keys, hashes, signed
        See `query`.

    Returns
    -------
    mx.array
        See `query`.
    """
    N, depth, _ = counters.shape
    shape = (N, keys.shape[-1])
    if 0 in shape:
        return mx.zeros(shape)
    return _QUERY(
        inputs=[counters, _key_rows(keys), hashes],
        template=[("DEPTH", depth), ("SIGNED", signed)],
        grid=(keys.shape[-1], N, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[shape],
        output_dtypes=[mx.float32],
    )[0]


def _key_rows(keys: mx.array) -> mx.array:
    """Return keys as uint32 `[1 or N, T]`."""
    return (keys[None] if keys.ndim == 1 else keys).astype(mx.uint32)


def _columns_and_signs(keys: mx.array, hashes: mx.array, width: int, signed: bool) -> tuple[mx.array, mx.array]:
    """Return columns uint32 `[1 or N, depth, T]`, and signs float32, all 1 where unsigned."""
    columns = _residues(keys, hashes[:, :2]) % width
    if not signed:
        return columns, mx.ones((1, 1, 1))
    return columns, 1 - 2 * (_residues(keys, hashes[:, 2:]) & 1).astype(mx.float32)


def _residues(keys: mx.array, functions: mx.array) -> mx.array:
    """Return (a * key + b) mod p of functions `[depth, 2]`, uint32 `[1 or N, depth, T]`: exact in 64 bits."""
    a, b = mx.split(functions.astype(mx.uint64), 2, axis=1)
    return ((a * _key_rows(keys)[:, None].astype(mx.uint64) + b) % PRIME).astype(mx.uint32)


def _example(tokens: int) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    counters, amounts = (mx.random.uniform(shape=shape, key=mx.random.key(0)) for shape in ((8, 4, 1024), (8, tokens)))
    return counters, mx.arange(tokens, dtype=mx.uint32), amounts, hash_functions(4)


def _example_query(tokens: int) -> tuple[mx.array, mx.array, mx.array]:
    counters, keys, _, hashes = _example(tokens)
    return counters, keys, hashes


register(
    Operation(
        "count_min.update", update, reference_update, metal_update, (Example("8 sketches of 4 x 1,024", _example),)
    )
)
register(
    Operation(
        "count_min.query", query, reference_query, metal_query, (Example("8 sketches of 4 x 1,024", _example_query),)
    )
)

"""An orthogonal transform of a block's tokens to their principal components, stored as a few reflections.

Rows `[n, p]` of a block have much in common. The strongest combinations of its tokens take most of its energy, so that most
rows of the transformed block are small. Householder reflections make it: products of them are orthogonal however coarsely
their vectors are rounded, so that rounding costs only a little of the energy that is gathered, and no precision.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlxkv.errors import FormatError

MOST = 128  # reflections, at most
PIVOT = 127  # integer of a vector's own component, its largest
_BITS = 5  # of a stored integer, approximately


def learn_reflections(rows: mx.array) -> np.ndarray:
    """Return the reflections that gather the energy of rows in the first of them, as many as pay.

    Parameters
    ----------
    rows
        Rows `[n, p]` float32 in quantization steps.

    Returns
    -------
    np.ndarray
        Vectors `[m, n]` int8, of which vector i begins with PIVOT at i.
    """
    tokens, width = rows.shape
    energies, directions = np.linalg.eigh(np.array(rows @ rows.T))
    energies, directions = energies[::-1].astype(np.float64) / width, directions[:, ::-1].astype(np.float64)
    count = _count_that_pays(np.maximum(energies, 0), width)
    left, vectors = directions[:, :count], np.zeros((count, tokens), np.int8)
    for i in range(count):
        vector = left[i:, i].copy()
        vector[0] += np.copysign(np.sqrt(vector @ vector), vector[0])
        vectors[i, i:] = np.rint(vector * (PIVOT / vector[0]))
        rounded = vectors[i, i:].astype(np.float64)
        left[i:] -= np.outer(rounded * (2 / (rounded @ rounded)), rounded @ left[i:])
    return vectors


def _count_that_pays(energies: np.ndarray, width: int) -> int:
    """Return how many components to gather: each costs its vector's bytes and saves bits of all its numbers."""
    tokens = len(energies)
    most = min(MOST, tokens - 1)
    left = energies[::-1].cumsum()[::-1]
    counts = np.arange(most + 1)
    noise = 1 / 6  # below about this variance a number takes hardly any bits
    gathered = np.r_[0, np.log2(np.maximum(energies[:most] / noise, 1)).cumsum()]
    others = (tokens - counts) * np.log2(np.maximum(left[counts] / (tokens - counts) / noise, 1))
    return int((width / 2 * (gathered + others) + _BITS * tokens * counts).argmin())


def to_bytes(vectors: np.ndarray) -> bytes:
    """Return what of vectors is stored: what follows each one's PIVOT.

    Parameters
    ----------
    vectors
        Vectors `[m, n]` int8.

    Returns
    -------
    bytes
        `stored_bytes` of them.
    """
    return vectors[np.triu_indices(len(vectors), 1, vectors.shape[1])].tobytes()


def stored_bytes(count: int, tokens: int) -> int:
    """Return how many bytes `to_bytes` makes.

    Parameters
    ----------
    count
        Number of vectors m, from any source.
    tokens
        Number of tokens n.

    Returns
    -------
    int
        The bytes.

    Raises
    ------
    FormatError
        When there cannot be so many.
    """
    if count > min(MOST, tokens):
        raise FormatError(f"{count} reflections of {tokens} tokens are too many")
    return count * tokens - count * (count + 1) // 2


def from_bytes(data: bytes, count: int, tokens: int) -> np.ndarray:
    """Return the inverse of `to_bytes`.

    Parameters
    ----------
    data
        As many bytes as `stored_bytes` says.
    count
        Number of vectors m.
    tokens
        Number of tokens n.

    Returns
    -------
    np.ndarray
        Vectors `[m, n]` int8.
    """
    vectors = PIVOT * np.eye(count, tokens, dtype=np.int8)
    vectors[np.triu_indices(count, 1, tokens)] = np.frombuffer(data, np.int8)
    return vectors


def reflect(vectors: np.ndarray, rows: mx.array) -> mx.array:
    """Apply reflections to the tokens of rows, the first one first.

    Parameters
    ----------
    vectors
        Vectors `[m, n]` int8.
    rows
        Rows `[n, p]` float32.

    Returns
    -------
    mx.array
        Components `[n, p]` float32, of which the first are the strongest.
    """
    return _apply(vectors, rows, inverse=False)


def reflect_back(vectors: np.ndarray, components: mx.array) -> mx.array:
    """Undo `reflect`.

    Parameters
    ----------
    vectors
        Vectors `[m, n]` int8.
    components
        Components `[n, p]` float32.

    Returns
    -------
    mx.array
        Rows `[n, p]` float32.
    """
    return _apply(vectors, components, inverse=True)


def _apply(vectors: np.ndarray, rows: mx.array, inverse: bool) -> mx.array:
    """Multiply rows by the product of all reflections, I - W T W', or by its transpose."""
    if not len(vectors):
        return rows
    w = vectors.astype(np.float64) / PIVOT
    products = w @ w.T
    factors = 2 / np.diagonal(products)
    t = np.zeros_like(products)
    for i, factor in enumerate(factors):
        t[:i, i] = -factor * (t[:i, :i] @ products[:i, i])
        t[i, i] = factor
    columns, middle = mx.array(w.astype(np.float32)), mx.array((t if inverse else t.T).astype(np.float32))
    return rows - columns.T @ (middle @ (columns @ rows))

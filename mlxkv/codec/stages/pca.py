"""Principal components of token rows across all layers and heads (the Karhunen-Loève transform, KLT).

Randomised SVD after Halko, Martinsson and Tropp (arXiv 0909.4061), algorithm 4.4. Small problems, and those that need
most of the directions, use the Gram matrix of the smaller side, so no p x p matrix is formed when there are fewer samples
than p.
"""

from __future__ import annotations

import numpy as np

OVERSAMPLE = 64
POWER_PASSES = 2
EXACT_SIDE = 1536  # a Gram matrix up to this side is diagonalised in about a second
EXACT_SHARE = 0.4  # above this share of all directions, the exact method is faster


def principal_components(rows: np.ndarray, rank: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the principal components of rows, which are centred in place.

    Parameters
    ----------
    rows
        Rows `[N, p]` float32.
    rank
        Number of components r to compute; at most `min(N - 1, p)` exist.
    seed
        Seed of the randomised method; the result is deterministic for a seed.

    Returns
    -------
    tuple[np.ndarray, np.ndarray]
        Mean `[p]` float32 and orthonormal components `[p, r]`, strongest first.

    Examples
    --------
    >>> rows = np.array([[0, 0], [2, 2], [4, 4]], np.float32)
    >>> mean, components = principal_components(rows, rank=1)
    >>> mean.tolist(), components.round(3).tolist()
    ([2.0, 2.0], [[0.7070000171661377], [0.7070000171661377]])
    """
    mean = rows.mean(axis=0, dtype=np.float64).astype(np.float32)
    rows -= mean
    return mean, components_of_centred(rows, max(1, min(rank, rows.shape[0] - 1, rows.shape[1])), seed)


def components_of_centred(rows: np.ndarray, rank: int, seed: int = 0) -> np.ndarray:
    """Return the principal components of rows whose mean counts as zero.

    Parameters
    ----------
    rows
        Rows `[N, p]` float32.
    rank
        Number of components r, at most `min(N, p)`.
    seed
        Seed of the randomised method.

    Returns
    -------
    np.ndarray
        Orthonormal components `[p, r]`, strongest first.
    """
    small = min(rows.shape)
    exact = small <= EXACT_SIDE or rank > EXACT_SHARE * small
    basis = _exact(rows, rank) if exact else _randomised(rows, rank, seed)
    return np.ascontiguousarray(basis * _signs(basis))


def _exact(rows: np.ndarray, rank: int) -> np.ndarray:
    """Diagonalise the Gram matrix of the smaller side."""
    if rows.shape[1] <= rows.shape[0]:
        _, vectors = np.linalg.eigh(rows.T @ rows)
        return vectors[:, ::-1][:, :rank]
    _, vectors = np.linalg.eigh(rows @ rows.T)
    # Orthonormal even where singular values are zero, unlike division by them.
    return np.linalg.qr(rows.T @ vectors[:, ::-1][:, :rank])[0]


def _randomised(rows: np.ndarray, rank: int, seed: int) -> np.ndarray:
    """Find the leading subspace with random projections and power iterations."""
    random = np.random.default_rng(seed)
    width = min(rank + OVERSAMPLE, *rows.shape)
    sketch = random.standard_normal((rows.shape[1], width), dtype=np.float32)
    for _ in range(POWER_PASSES):
        sketch = np.linalg.qr(rows.T @ (rows @ sketch))[0]
    # Rayleigh-Ritz inside the found subspace [p, width].
    projected = rows @ sketch
    _, vectors = np.linalg.eigh(projected.T @ projected)
    return sketch @ vectors[:, ::-1][:, :rank]


def leading_components(rows: np.ndarray, rank: int, seed: int = 0) -> np.ndarray:
    """Return the strongest components of rows whose mean counts as zero, approximately, as fast as their shape allows.

    Parameters
    ----------
    rows
        Rows `[N, p]` float32.
    rank
        Number of components r, at most `min(N, p)`.
    seed
        Seed of the random projections.

    Returns
    -------
    np.ndarray
        Orthonormal components `[p, r]`, strongest first.
    """
    tokens, width = rows.shape
    sketched = min(rank + OVERSAMPLE, tokens, width)
    # The matrix of all directions once, or the rows in each of the passes: whichever is less arithmetic.
    if tokens < width or width > (4 * POWER_PASSES + 2) * sketched:
        return components_of_centred(rows, rank, seed)
    gram = rows.T @ rows
    sketch = np.random.default_rng(seed).standard_normal((width, sketched), dtype=np.float32)
    for _ in range(POWER_PASSES):
        sketch = np.linalg.qr(gram @ sketch)[0]
    _, vectors = np.linalg.eigh(sketch.T @ (gram @ sketch))
    basis = sketch @ vectors[:, ::-1][:, :rank]
    return np.ascontiguousarray(basis * _signs(basis))


def _signs(basis: np.ndarray) -> np.ndarray:
    """Return +-1 for each component, so that its largest entry is positive with every LAPACK."""
    return np.where(basis[np.abs(basis).argmax(axis=0), np.arange(basis.shape[1])] < 0, -1, 1).astype(basis.dtype)

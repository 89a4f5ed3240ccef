"""Statistics that few tokens tell surely: how the dims of one head vary together, and sensitivity nearer to equal.

How keys of one layer vary with those of another takes thousands of tokens to learn, how the dims of one head vary takes
hundreds. Directions that no token of the calibration took are then coded as well as their head's other directions suggest,
where they would otherwise be lost. The share of Fisher information that is taken as equal follows from how much estimates
scatter (Ledoit and Wolf, A well-conditioned estimator for large-dimensional covariance matrices, 2004).
"""

from __future__ import annotations

import numpy as np

MAX_SHARE = 0.9
_OWN_SHARE = 0.1  # of a head's whole covariance, added to that of what is left of it
_HEAD_RIDGE = 0.0025  # of a head's mean variance, added to each of its directions


def head_products(rows: np.ndarray, dim: int) -> np.ndarray:
    """Return the sum over rows of the products of each head's dims.

    Parameters
    ----------
    rows
        Centred rows `[N, p]` float32.
    dim
        Width of a head.

    Returns
    -------
    np.ndarray
        `[p / dim, dim, dim]`: divided by N, each head's covariance.
    """
    x = rows.reshape(len(rows), -1, dim).swapaxes(0, 1)
    return np.asarray(x.swapaxes(1, 2) @ x)


def head_directions(own: np.ndarray, left: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the principal directions of each head in what components of whole rows leave.

    Parameters
    ----------
    own
        Covariance of each head's dims, `[heads, dim, dim]`.
    left
        That of what is left of them.

    Returns
    -------
    tuple[np.ndarray, np.ndarray]
        Directions `[heads * dim, dim]` of unit length, head by head and the strongest of each first, and the standard deviations
        of rows along them. Further rows leave more than those that were learnt from, so a tenth of each head's own covariance
        is added.
    """
    covariance, dim = left + np.float32(_OWN_SHARE) * own, own.shape[-1]
    mean = np.trace(covariance, axis1=1, axis2=2)[:, None, None] / dim
    values, vectors = np.linalg.eigh(covariance + np.float32(_HEAD_RIDGE) * mean * np.eye(dim, dtype=np.float32))
    directions = vectors[:, :, ::-1].swapaxes(1, 2).reshape(-1, dim)
    return directions, np.sqrt(np.maximum(values[:, ::-1], 0)).reshape(-1).astype(np.float32)


def shrink_fisher(fisher: np.ndarray, energies: np.ndarray) -> np.ndarray:
    """Mix the Fisher information of each head with a multiple of the identity that has the same trace.

    Parameters
    ----------
    fisher
        Mean of g g' over N tokens, `[heads, D, D]`.
    energies
        g'g of each token, `[N, heads]`.

    Returns
    -------
    np.ndarray
        `[heads, D, D]`. The share of the identity is that which is expected to have the least squared error, less where
        there are about as many tokens as directions of all heads.
    """
    tokens, dim = len(energies), fisher.shape[-1]
    squares = np.square(fisher, dtype=np.float64).sum(axis=(1, 2))
    traces = np.trace(fisher, axis1=1, axis2=2).astype(np.float64)
    relative = energies / np.maximum(energies.mean(axis=0, dtype=np.float64), 1e-30)
    # The squared norm of g g' is (g'g)^2, and the mean of g'g is the trace.
    error = traces**2 * np.square(relative).sum(axis=0) / tokens**2 - squares / tokens
    beyond = np.maximum(squares - traces**2 / max(1, dim), 1e-30 + 1e-12 * squares)
    fewness = max(0.0, 1 - tokens / (len(fisher) * max(1, dim)))  # 0 for as many tokens as directions of rows
    share = fewness * np.clip(error / beyond, 0, MAX_SHARE)[:, None, None]
    return ((1 - share) * fisher + share * (traces / max(1, dim))[:, None, None] * np.eye(dim)).astype(fisher.dtype)

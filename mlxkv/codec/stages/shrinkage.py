"""Shrinkage of what few tokens tell: covariances and Fisher information are mixed with what they can tell surely.

How keys of one layer vary with those of another takes thousands of tokens to learn, how the dims of one head vary takes
hundreds. So the covariance of rows is mixed with that of each head alone. Directions that no token of the calibration took are
then coded as well as their head's other directions suggest, where they would otherwise be lost. The shares follow from how much
estimates scatter (Ledoit and Wolf, A well-conditioned estimator for large-dimensional covariance matrices, 2004).
"""

from __future__ import annotations

import numpy as np

MAX_SIDE = 8192  # rows of a Gram matrix: wider streams get only as many directions as fit beside their tokens
MAX_SHARE = 0.9
_BATCHES, _MIN_BATCH = 32, 16  # of neighbouring tokens, which are alike: their scatter says what the tokens are worth
_PROBES = 64
_HEAD_RIDGE = 0.0025  # of a head's mean variance, added to each of its directions


def covariance_share(rows: np.ndarray, dim: int) -> float:
    """Return the share of the heads' own covariance that predicts the covariance of further rows best.

    Parameters
    ----------
    rows
        Centred rows `[N, heads * dim]` float32, in the order of tokens.
    dim
        Width of a head.

    Returns
    -------
    float
        0, for as many tokens as directions, to MAX_SHARE.

    Notes
    -----
    The expected squared error of the covariances between heads over their squares, both in units in which each head's own
    covariance is the identity. Squares are estimated with random probes.
    """
    values, vectors = _head_spectra(rows, dim)
    white = _by_head(rows, dim) @ (vectors / np.sqrt(np.maximum(values, np.finfo(np.float32).tiny))[:, None])
    white = np.ascontiguousarray(white.swapaxes(0, 1).reshape(rows.shape))
    probes = np.random.default_rng(0).choice(np.array([-1, 1], np.float32), (rows.shape[1], _PROBES))
    total = float(np.square(white.T @ (white @ probes) / len(white), dtype=np.float64).sum()) / _PROBES
    total -= _within_heads(white, dim)
    batches = np.array_split(white, max(2, min(_BATCHES, len(white) // _MIN_BATCH)))
    scatter = sum(
        float(np.square(part @ part.T / len(part), dtype=np.float64).sum()) - _within_heads(part, dim)
        for part in batches
    )
    error = (scatter / len(batches) - total) / (len(batches) - 1)
    # With a token for every direction none is lost, and rows tell best themselves.
    return float(np.clip(error / max(total, 1e-30), 0, MAX_SHARE)) * max(0.0, 1 - len(rows) / rows.shape[1])


def head_rows(rows: np.ndarray, dim: int, share: float) -> np.ndarray:
    """Return rows that stand for the covariance of each head alone: added to others, they mix it in with a share.

    Parameters
    ----------
    rows
        Centred rows `[N, p]` float32.
    dim
        Width of a head.
    share
        0 to below 1.

    Returns
    -------
    np.ndarray
        `[count, p]` float32, one for each direction of each head; only the strongest where p exceeds MAX_SIDE. With them
        the sum of all squares is that of N / (1 - share) rows.
    """
    width = rows.shape[1]
    count = width if width <= MAX_SIDE else max(0, MAX_SIDE - len(rows))
    values, vectors = _head_spectra(rows, dim)
    factors = np.sqrt(values * len(rows) * share / (1 - share)).reshape(-1)
    strongest = np.argsort(-factors, kind="stable")[: count if share else 0]
    made = np.zeros((len(strongest), width // dim, dim), np.float32)
    directions = vectors.swapaxes(1, 2).reshape(-1, dim)
    made[np.arange(len(strongest)), strongest // dim] = directions[strongest] * factors[strongest, None]
    return made.reshape(-1, width)


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


def _by_head(rows: np.ndarray, dim: int) -> np.ndarray:
    """Return rows as `[heads, N, dim]`."""
    return rows.reshape(len(rows), -1, dim).swapaxes(0, 1)


def _head_spectra(rows: np.ndarray, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the eigenvalues `[heads, dim]` and eigenvectors `[heads, dim, dim]` of each head's covariance."""
    x = _by_head(rows, dim)
    covariance = x.swapaxes(1, 2) @ x / np.float32(len(rows))
    mean = np.trace(covariance, axis1=1, axis2=2)[:, None, None] / dim
    values, vectors = np.linalg.eigh(covariance + np.float32(_HEAD_RIDGE) * mean * np.eye(dim, dtype=np.float32))
    return np.maximum(values, 0), vectors


def _within_heads(rows: np.ndarray, dim: int) -> float:
    """Return the sum of squares of the covariances within heads."""
    x = _by_head(rows, dim)
    return float(np.square(x.swapaxes(1, 2) @ x / np.float32(len(rows)), dtype=np.float64).sum())

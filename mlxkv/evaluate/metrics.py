"""Distances between two caches or two sets of logits, and perplexity."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np


def relative_error(original: np.ndarray, decoded: np.ndarray) -> float:
    """Return the squared error relative to the squared original, both summed over everything.

    Parameters
    ----------
    original, decoded
        Arrays of one shape, layers first, such as `[L, B, H, T, D]`.

    Returns
    -------
    float
        0 or more, summed in float64; 0 when the original is all zeros or empty.

    Examples
    --------
    >>> relative_error(np.array([[3.0, 4.0]]), np.array([[3.0, 3.0]]))
    0.04
    """
    error = energy = 0.0
    for a, b in zip(original, decoded):
        wide = a.astype(np.float32)
        error += float(np.square(wide - b, dtype=np.float64).sum())
        energy += float(np.square(wide, dtype=np.float64).sum())
    return error / energy if energy else 0.0


def layer_mse(original: np.ndarray, decoded: np.ndarray) -> list[float]:
    """Return the mean squared error of each layer.

    Parameters
    ----------
    original, decoded
        Arrays `[L, B, H, T, D]`.

    Returns
    -------
    list of float
        `L` numbers; 0 for empty layers.
    """
    return [
        float(np.square(a.astype(np.float32) - b, dtype=np.float64).mean()) if a.size else 0.0
        for a, b in zip(original, decoded)
    ]


def kl_divergence(reference: mx.array, other: mx.array) -> mx.array:
    """Return the Kullback-Leibler divergence of predictions from those of a reference, position by position.

    Parameters
    ----------
    reference, other
        Logits `[n, vocabulary]`, of any scale.

    Returns
    -------
    mx.array
        KL(reference || other) in nats, `[n]` float32.

    Examples
    --------
    >>> uniform, other = mx.array([[1.0, 1.0]]), mx.log(mx.array([[0.25, 0.75]]))
    >>> round(kl_divergence(uniform, other).item(), 4)
    0.1438
    """
    p, q = (
        x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (reference.astype(mx.float32), other.astype(mx.float32))
    )
    return (mx.exp(p) * (p - q)).sum(axis=-1)


def top1_agreement(reference: mx.array, other: mx.array) -> float:
    """Return the share of positions at which both predict the same most probable token.

    Parameters
    ----------
    reference, other
        Logits `[n, vocabulary]`.

    Returns
    -------
    float
        0 to 1.

    Examples
    --------
    >>> top1_agreement(mx.array([[0, 1], [0, 1]]), mx.array([[0, 9], [9, 0]]))
    0.5
    """
    return float(mx.mean(mx.argmax(reference, axis=-1) == mx.argmax(other, axis=-1)))


def cosine(a: mx.array, b: mx.array) -> mx.array:
    """Return the cosine similarity along the last axis.

    Parameters
    ----------
    a, b
        Arrays `[..., D]`.

    Returns
    -------
    mx.array
        -1 to 1, `[...]` float32; NaN where one of the vectors is zero.
    """
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    return (a * b).sum(axis=-1) / (mx.linalg.norm(a, axis=-1) * mx.linalg.norm(b, axis=-1))


def perplexity(logits: mx.array, targets: mx.array) -> float:
    """Return exp of the mean cross-entropy.

    Parameters
    ----------
    logits
        Predictions `[n, vocabulary]`.
    targets
        The tokens that came, `[n]`.

    Returns
    -------
    float
        1 or more; the vocabulary's size for uniform predictions.

    Examples
    --------
    >>> round(perplexity(mx.zeros((3, 8)), mx.array([1, 2, 3])), 4)
    8.0
    """
    return float(mx.exp(nn.losses.cross_entropy(logits.astype(mx.float32), targets, reduction="mean")))

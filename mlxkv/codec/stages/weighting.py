"""Weights of the cache's directions by what they matter to the model, which `kvtc-rd` and `kvtc-weighted` code under.

They come from the Fisher information of cached keys and values (mlxkv/sensitivity.py), regularised by a ridge and a power
below 1. Rows times the square root of that make equal errors equally harmful.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlxkv.codec.samples import Samples
from mlxkv.errors import FormatError, InputError
from mlxkv.spec import STREAMS

# Regularisation of the Fisher information: the exact one generalises worse to other texts (docs/lab-notes.md).
RIDGE = 0.5  # added to the matrix, in units of a head's mean eigenvalue
POWER = 0.6  # of the matrix: 1 would trust it, 0 would ignore it
TEMPER = 0.5  # power of the predicted attention: 1 would trust the prediction
MAX_LOG_GAIN = 1.0  # gains lie within exp(-MAX_LOG_GAIN) .. exp(MAX_LOG_GAIN)
# Of the regression that predicts attention.
_RIDGE_PENALTY = 0.1  # for each token
_MIN_ENERGY = 1e-3  # in units of a head's mean: keeps the logarithm bounded
_NEWTON_ROUNDS = 15
_MAX_STEP = 2.0  # of Newton's method, in the logarithm of energy


def learn_weights(samples: Samples, predict_attention: bool = True) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the weights of each stream, and the predictor of attention.

    Parameters
    ----------
    samples
        Dumps with a sensitivity.
    predict_attention
        False for no predictor.

    Returns
    -------
    tuple[dict[str, np.ndarray], np.ndarray]
        Weights `[n, D, D]` of each stream with a width, one matrix for each of n = layers * heads, and the predictor
        `[n, Dk + 1]` of `learn_attention_predictor`; `[0, 0]` for a cache without values of their own, or without one.

    Raises
    ------
    InputError
        For dumps without a sensitivity, or one that is zero everywhere.
    """
    fisher, energies, keys = samples.sensitivity()
    streams = [samples.spec.stream(name) for name in STREAMS if samples.spec.stream(name).width]
    attention = np.zeros((0, 0), np.float32)
    if predict_attention and len(streams) == 2:
        samples.progress("attention from keys")
        keys = keys.reshape(len(keys), -1, streams[0].dim)
        relative = [energy / np.maximum(energy.mean(axis=0), 1e-30) for energy in energies.values()]
        attention = learn_attention_predictor(keys, (relative[0] + relative[1]) / 2)
        # The share of the energy that gains account for must not be counted again by the weights.
        remaining = energies["v"] / attention_gains(keys, attention) ** 2
        share = remaining.mean(axis=0) / np.maximum(energies["v"].mean(axis=0), 1e-30)
        fisher["v"] = fisher["v"] * share[:, None, None]
    mean = float(np.mean([np.trace(fisher[s.name], axis1=1, axis2=2).mean() / s.dim for s in streams]))
    if not mean > 0:
        raise InputError("the dumps' sensitivity is zero everywhere: the model does not read this cache")
    return {stream.name: head_weights(fisher[stream.name], mean) for stream in streams}, attention


def head_weights(fisher: np.ndarray, mean: float) -> np.ndarray:
    """Return (F + ridge)^(power / 2) of each head, in units of the mean eigenvalue over all.

    Parameters
    ----------
    fisher
        Fisher information `[n, D, D]` of each head.
    mean
        Mean eigenvalue over all heads of all streams.

    Returns
    -------
    np.ndarray
        Symmetric matrices `[n, D, D]`.
    """
    dim = fisher.shape[-1]
    traces = np.trace(fisher, axis1=1, axis2=2)[:, None, None] / max(1, dim)
    values, vectors = np.linalg.eigh((fisher + (RIDGE * traces + 1e-6 * mean) * np.eye(dim)) / mean)
    powers = np.maximum(values, 1e-9) ** (POWER / 2)
    return (vectors * powers[:, None]) @ vectors.swapaxes(1, 2)


def learn_attention_predictor(keys: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """Fit half the tempered logarithm of the energy that a key will have, linear in the key.

    Parameters
    ----------
    keys
        Un-rotated keys `[N, n, D]`.
    energy
        Energy `[N, n]`, relative to each head's mean.

    Returns
    -------
    np.ndarray
        Slopes and, last, the bias of each head: `[n, D + 1]` float32.

    Notes
    -----
    Gamma regression with logarithmic link by Newton's method, all heads at once (McCullagh and Nelder, Generalized Linear
    Models, chapter 8).
    """
    mean, spread = keys.mean(axis=0), keys.std(axis=0) + 1e-6
    x = np.concatenate([(keys - mean) / spread, np.ones((*keys.shape[:2], 1), np.float32)], axis=-1).swapaxes(0, 1)
    y = energy.T + np.float32(_MIN_ENERGY)
    coefficients = np.zeros((x.shape[0], x.shape[2]), np.float32)
    coefficients[:, -1] = np.log(y.mean(axis=1))
    penalty = _RIDGE_PENALTY * x.shape[1] * np.eye(x.shape[2], dtype=np.float32)
    penalty[-1, -1] = 0
    for _ in range(_NEWTON_ROUNDS):
        ratio = y * np.exp(-np.clip(x @ coefficients[..., None], -30, 30)[..., 0])
        gradient = ((1 - ratio)[:, None] @ x)[:, 0] + coefficients @ penalty
        hessian = (x * np.maximum(ratio, 0.3)[..., None]).swapaxes(1, 2) @ x + penalty
        change = np.linalg.solve(hessian, gradient[..., None])
        coefficients -= change[..., 0] * np.minimum(1, _MAX_STEP / np.abs(x @ change).max(axis=1))
    slopes = coefficients[:, :-1] / spread
    bias = coefficients[:, -1] - (slopes * mean).sum(axis=1)
    return (TEMPER / 2 * np.concatenate([slopes, bias[:, None]], axis=1)).astype(np.float32)


def attention_gains(keys: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """Return the factors on each token's values that its keys predict.

    Parameters
    ----------
    keys
        Un-rotated keys `[N, n, D]`.
    attention
        Predictor `[n, D + 1]` of `learn_attention_predictor`.

    Returns
    -------
    np.ndarray
        Gains `[N, n]`.
    """
    logs = np.einsum("tnd,nd->tn", keys, attention[:, :-1], optimize=True) + attention[:, -1]
    return np.exp(np.clip(logs, -MAX_LOG_GAIN, MAX_LOG_GAIN))


def apply_weights(rows: mx.array, weights: np.ndarray) -> mx.array:
    """Multiply each head's part of rows by its matrix.

    Parameters
    ----------
    rows
        Rows `[t, n * D]`.
    weights
        Symmetric matrices `[n, D, D]`.

    Returns
    -------
    mx.array
        Weighted rows `[t, n * D]` float32.
    """
    heads, dim = weights.shape[:2]
    by_head = rows.reshape(-1, heads, dim).swapaxes(0, 1) @ mx.array(weights).astype(mx.float32)
    return by_head.swapaxes(0, 1).reshape(rows.shape)


def invert_weights(weights: np.ndarray) -> np.ndarray:
    """Return the inverse matrices, which undo `apply_weights`.

    Parameters
    ----------
    weights
        Matrices `[n, D, D]`, as they are stored.

    Returns
    -------
    np.ndarray
        Inverses `[n, D, D]` float32.

    Raises
    ------
    FormatError
        When one has no inverse.
    """
    try:
        return np.linalg.inv(weights.astype(np.float64)).astype(np.float32)
    except np.linalg.LinAlgError:
        raise FormatError("the artifacts' weights have no inverse; calibrate again") from None

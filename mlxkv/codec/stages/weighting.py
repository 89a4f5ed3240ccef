"""What a direction of the cache matters to the model: the weights that `kvtc-rd` codes under.

From the Fisher information of cached keys and values (mlxkv/sensitivity.py), softened because the exact one generalises
worse: F with a ridge, to a power below 1. Rows times the square root of that make equal errors equally bad.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlxkv.codec.samples import Samples
from mlxkv.errors import FormatError, InputError
from mlxkv.spec import STREAMS

RIDGE = 0.5  # of a head's mean eigenvalue
POWER = 0.6
TEMPER = 0.5  # of attention's logarithm
MAX_LOG_GAIN = 1.0  # a token's gain is within exp(-REACH) .. exp(REACH)
_PENALTY = 0.1  # of the regression, a token
_LEAST = 1e-3  # of a head's mean energy: its logarithm stays bounded
_ROUNDS = 15
_LONGEST = 2.0  # step of Newton's method, in the logarithm of energy


def learn_weights(samples: Samples, predict_attention: bool = True) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Weights of each stream, `[n, D, D]`, one for each of n = layers * heads, and `learn_attention`'s, `[0, 0]` for a
    cache without values of their own or where nothing is to be foretold. Raises InputError for dumps without a
    sensitivity."""
    fisher, energies, keys = samples.measured()
    streams = [samples.spec.stream(name) for name in STREAMS if samples.spec.stream(name).width]
    attention = np.zeros((0, 0), np.float32)
    if predict_attention and len(streams) == 2:
        samples.progress("attention from keys")
        keys = keys.reshape(len(keys), -1, streams[0].dim)
        relative = [energy / np.maximum(energy.mean(axis=0), 1e-30) for energy in energies.values()]
        attention = learn_attention_predictor(keys, (relative[0] + relative[1]) / 2)
        # What gains will take care of is not for the weights to do again.
        left = energies["v"] / attention_gains(keys, attention) ** 2
        share = left.mean(axis=0) / np.maximum(energies["v"].mean(axis=0), 1e-30)
        fisher["v"] = fisher["v"] * share[:, None, None]
    mean = float(np.mean([np.trace(fisher[s.name], axis1=1, axis2=2).mean() / s.dim for s in streams]))
    if not mean > 0:
        raise InputError("the dumps' sensitivity is zero everywhere: the model does not read this cache")
    return {stream.name: head_weights(fisher[stream.name], mean) for stream in streams}, attention


def head_weights(fisher: np.ndarray, mean: float) -> np.ndarray:
    """(F + ridge)^(power / 2) of each head, in units of the mean eigenvalue over all: `[n, D, D]` to the same, symmetric."""
    dim = fisher.shape[-1]
    traces = np.trace(fisher, axis1=1, axis2=2)[:, None, None] / max(1, dim)
    values, vectors = np.linalg.eigh((fisher + (RIDGE * traces + 1e-6 * mean) * np.eye(dim)) / mean)
    powers = np.maximum(values, 1e-9) ** (POWER / 2)
    return (vectors * powers[:, None]) @ vectors.swapaxes(1, 2)


def learn_attention_predictor(keys: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """Half the tempered logarithm of the energy that a key will have, linear in the key: `[n, D + 1]`, the bias last.

    keys `[N, n, D]`, un-rotated; energy `[N, n]`, relative to each head's mean. Gamma regression with logarithmic link,
    by Newton's method, all heads at once (McCullagh and Nelder, Generalized Linear Models, chapter 8).
    """
    mean, spread = keys.mean(axis=0), keys.std(axis=0) + 1e-6
    x = np.concatenate([(keys - mean) / spread, np.ones((*keys.shape[:2], 1), np.float32)], axis=-1).swapaxes(0, 1)
    y = energy.T + np.float32(_LEAST)
    found = np.zeros((x.shape[0], x.shape[2]), np.float32)
    found[:, -1] = np.log(y.mean(axis=1))
    penalty = _PENALTY * x.shape[1] * np.eye(x.shape[2], dtype=np.float32)
    penalty[-1, -1] = 0
    for _ in range(_ROUNDS):
        ratio = y * np.exp(-np.clip(x @ found[..., None], -30, 30)[..., 0])
        slope = ((1 - ratio)[:, None] @ x)[:, 0] + found @ penalty
        curve = (x * np.maximum(ratio, 0.3)[..., None]).swapaxes(1, 2) @ x + penalty
        change = np.linalg.solve(curve, slope[..., None])
        found -= change[..., 0] * np.minimum(1, _LONGEST / np.abs(x @ change).max(axis=1))
    slopes = found[:, :-1] / spread
    bias = found[:, -1] - (slopes * mean).sum(axis=1)
    return (TEMPER / 2 * np.concatenate([slopes, bias[:, None]], axis=1)).astype(np.float32)


def attention_gains(keys: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """What each token's values are scaled by, as keys `[N, n, D]` tell: `[N, n]`."""
    logs = np.einsum("tnd,nd->tn", keys, attention[:, :-1], optimize=True) + attention[:, -1]
    return np.exp(np.clip(logs, -MAX_LOG_GAIN, MAX_LOG_GAIN))


def apply_weights(rows: mx.array, weights: np.ndarray) -> mx.array:
    """Each head's part of rows `[t, p]` times its symmetric matrix `[n, D, D]`."""
    heads, dim = weights.shape[:2]
    by_head = rows.reshape(-1, heads, dim).swapaxes(0, 1) @ mx.array(weights).astype(mx.float32)
    return by_head.swapaxes(0, 1).reshape(rows.shape)


def invert_weights(weights: np.ndarray) -> np.ndarray:
    """Of weights `[n, D, D]` as they are stored, float32. Raises FormatError where there is none."""
    try:
        return np.linalg.inv(weights.astype(np.float64)).astype(np.float32)
    except np.linalg.LinAlgError:
        raise FormatError("the artifacts' weights have no inverse; calibrate again") from None

"""Sensitivity weights of `kvtc-rd` and `kvtc-weighted`: one symmetric matrix for each head of each layer.

Errors in some directions of the cache change the model's predictions more than in others. The Fisher information F of cached
keys and values measures by how much (mlxkv/sensitivity.py). The weights are the square root of F, regularised by a ridge and
a power below 1: rows are multiplied by them before coding, so that equal squared errors are about equally harmful, and by
their inverse after decoding. `kvtc-rd` also scales each token's values by a gain predicted from its key, since errors in the
values of tokens that get more attention matter more.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlxkv.codec.samples import Samples
from mlxkv.codec.stages.shrinkage import shrink_fisher
from mlxkv.errors import FormatError, InputError
from mlxkv.spec import STREAMS

# Regularisation of the Fisher information: the exact one generalises worse to other texts (docs/lab-notes.md).
RIDGE = 0.5  # added to the matrix, in units of a head's mean eigenvalue
POWER = 0.6  # exponent on the matrix: 1 would trust it, 0 would ignore it
TEMPER = 0.5  # exponent on the predicted energy from enough tokens: 1 would trust the prediction
SLOPE_TOKENS = 24  # tokens for each number of a head's predictor that it takes to trust it so far
MAX_LOG_GAIN = 1.0  # gains lie within exp(-MAX_LOG_GAIN) .. exp(MAX_LOG_GAIN)
# Largest numbers of artifacts from any source: with these, whatever else is in a file decodes to finite float32 rows.
MAX_MEAN, MAX_INVERSE, MAX_SLOPE = 1e15, 1e12, 1e6
# Settings of the regression that predicts attention.
_PENALTIES = (10.0, 3.0, 1.0, 0.3, 0.1)  # on slopes, per token; the one that predicts held-out tokens best is taken
_LEAST_SPREAD = 0.01  # of a dim of keys, in units of its head's root mean square
_FEWEST_KEYS = 16  # with fewer tokens at hand no attention is predicted
_FOLDS = 3  # of neighbouring tokens, each held out in turn
_MIN_ENERGY = 1e-3  # added to energies, in units of a head's mean: keeps the logarithm bounded
_NEWTON_ROUNDS, _WARM_ROUNDS = 15, 5  # from nothing, and from the solution for another penalty
_UNTHREADED = 2**18 - 1  # multiplications that OpenBLAS makes in one thread
_MAX_STEP = 2.0  # largest step of Newton's method, in the logarithm of energy


def within(array: np.ndarray, most: float) -> bool:
    """Check that numbers of artifacts are finite and not enormous.

    Parameters
    ----------
    array
        Floats of any shape.
    most
        Largest magnitude allowed.

    Returns
    -------
    bool
        False where one is larger, or NaN.
    """
    return bool(np.abs(array).max(initial=0) <= most)


def learn_weights(
    samples: Samples, predict_attention: bool = True, shrink: bool = True, most: int | None = None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Learn the weights of each stream, and the predictor of attention.

    Parameters
    ----------
    samples
        Dumps with a sensitivity.
    predict_attention
        False to learn no predictor.
    shrink
        False to take estimates as they are, however few the tokens.
    most
        Tokens to learn the predictor from, at most, evenly spaced, for each of its numbers; None for all.

    Returns
    -------
    tuple[dict[str, np.ndarray], np.ndarray]
        Weights `[n, D, D]` of each stream with a width, one matrix for each of n = layers * heads, and the predictor
        `[n, Dk + 1]` of `learn_attention_predictor`; `[0, 0]` without a predictor, and for caches with one stream (MLA).

    Raises
    ------
    InputError
        For dumps without a sensitivity, or one that is zero everywhere.
    """
    fisher, energies, keys, held = samples.sensitivity()
    if shrink and len(held):
        fisher = {name: shrink_fisher(part, energies[name]) for name, part in fisher.items()}
    streams = [samples.stream(name) for name in STREAMS if samples.stream(name).width]
    attention = np.zeros((0, 0), np.float32)
    if predict_attention and len(streams) == 2 and len(keys) >= _FEWEST_KEYS:
        energies = {name: energy[held] for name, energy in energies.items()}
        if most and (count := most * (streams[0].dim + 1)) < len(keys):
            chosen = np.linspace(0, len(keys) - 1, count).astype(int)
            keys, energies = keys[chosen], {name: energy[chosen] for name, energy in energies.items()}
        needed = SLOPE_TOKENS * (streams[0].dim + 1)
        samples.facts["attention_tokens"], samples.facts["attention_tokens_needed"] = len(keys), needed
        samples.progress(
            f"attention from keys: {len(keys):,} measured tokens; {needed:,} are needed to trust it in full"
        )
        keys = keys.reshape(len(keys), -1, streams[0].dim)
        relative = [energy / np.maximum(energy.mean(axis=0), 1e-30) for energy in energies.values()]
        attention = learn_attention_predictor(keys, (relative[0] + relative[1]) / 2, shrink, split=most is not None)
        # Energy that the gains account for must not be counted again in the weights.
        gains = attention_gains(keys, attention)
        samples.facts["predicted_heads"] = int(attention[:, :-1].any(axis=1).sum())
        samples.facts["saturated_gains"] = round(float((np.abs(np.log(gains)) >= MAX_LOG_GAIN - 1e-3).mean()), 4)
        remaining = energies["v"] / gains**2
        share = remaining.mean(axis=0) / np.maximum(energies["v"].mean(axis=0), 1e-30)
        fisher["v"] = fisher["v"] * share[:, None, None]
    if not samples.group:
        means = [np.trace(fisher[s.name], axis1=1, axis2=2).mean() / s.dim for s in streams]
        samples.units["mean eigenvalue"] = float(np.mean(means))
    mean = samples.units["mean eigenvalue"]
    if not len(held):  # nothing is known of these layers: as much as of the main group's on average
        fisher = {name: mean * np.eye(part.shape[-1]) + part for name, part in fisher.items()}
    if not mean > 0:
        raise InputError("the dumps' sensitivity is zero everywhere: the model does not read this cache")
    return {stream.name: head_weights(fisher[stream.name], mean) for stream in streams}, attention


def head_weights(fisher: np.ndarray, mean: float) -> np.ndarray:
    """Return (F + ridge)^(power / 2) of each head, with F in units of the mean eigenvalue over all heads.

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


def learn_attention_predictor(
    keys: np.ndarray, energy: np.ndarray, shrink: bool = True, split: bool = False
) -> np.ndarray:
    """Regress each token's gradient energy on its key, and return the logarithm of the gains that follow.

    For each head, the energy of a token (the squared norm of the loss gradient with respect to its cached keys and values,
    divided by the head's mean, so without unit) is modelled as `exp(slopes . key + bias)`. Slopes and bias are then multiplied
    by half the `trust`: half, since a gain multiplies values and energy is quadratic.

    Parameters
    ----------
    keys
        Un-rotated keys `[N, n, D]`.
    energy
        Energy `[N, n]` of each token and head, relative to the head's mean.
    shrink
        False for the smallest penalty, and a prediction for every head.
    split
        Whether products are made of few tokens at a time: several times as fast on few cores, and other in their last bits.

    Returns
    -------
    np.ndarray
        Slopes of each head and, in the last column, its bias: `[n, D + 1]` float32. Key times slopes plus bias is the natural
        logarithm of the gain.

    Notes
    -----
    Ridge-penalised gamma regression with a logarithmic link, solved by Newton's method for all heads at once (McCullagh and
    Nelder, Generalized Linear Models, chapter 8). The penalty is chosen by cross-validation; slopes of a head whose held-out
    tokens are not predicted better than by their mean are zero.
    """
    mean, spread = keys.mean(axis=0), keys.std(axis=0)
    # A dim that hardly varies would be magnified, and with it the error of decoded keys, which is many times larger.
    spread = np.maximum(spread, _LEAST_SPREAD * np.sqrt(np.square(spread).mean(axis=1, keepdims=True))) + 1e-6
    x = np.concatenate([(keys - mean) / spread, np.ones((*keys.shape[:2], 1), np.float32)], axis=-1).swapaxes(0, 1)
    y = energy.T + np.float32(_MIN_ENERGY)
    penalty, kept = _cross_validate(x, y, split) if shrink else (_PENALTIES[-1], np.ones(len(x), dtype=bool))
    coefficients = np.zeros((x.shape[0], x.shape[2]), np.float32)
    coefficients[:, -1] = np.log(y.mean(axis=1))
    if kept.any():
        coefficients[kept] = _fit(x[kept], y[kept], penalty, coefficients[kept], _NEWTON_ROUNDS, split)
    slopes = coefficients[:, :-1] / spread
    bias = coefficients[:, -1] - (slopes * mean).sum(axis=1)
    temper = trust(*x.shape[1:]) if shrink else TEMPER
    return (temper / 2 * np.concatenate([slopes, bias[:, None]], axis=1)).astype(np.float32)


def trust(tokens: int, numbers: int) -> float:
    """Return the exponent on predicted energies: predictions of few tokens hold for no other kind of text.

    Parameters
    ----------
    tokens
        Tokens that the predictor is learnt from.
    numbers
        Numbers in it for each head.

    Returns
    -------
    float
        0 to TEMPER.

    Examples
    --------
    >>> trust(15_000, 65), trust(780, 65)
    (0.5, 0.25)
    """
    return TEMPER * min(1.0, tokens / (SLOPE_TOKENS * numbers))


def _fit(x: np.ndarray, y: np.ndarray, penalty: float, first: np.ndarray, rounds: int, split: bool) -> np.ndarray:
    """Return the coefficients `[n, D + 1]` of all heads' regressions, from those of a first guess."""
    coefficients = first.copy()
    ridge = penalty * x.shape[1] * np.eye(x.shape[2], dtype=np.float32)
    ridge[-1, -1] = 0
    for _ in range(rounds):
        ratio = y * np.exp(-np.clip(x @ coefficients[..., None], -30, 30)[..., 0])
        gradient = ((1 - ratio)[:, None] @ x)[:, 0] + coefficients @ ridge
        hessian = _products(x * np.maximum(ratio, 0.3)[..., None], x, split) + ridge
        change = np.linalg.solve(hessian, gradient[..., None])
        coefficients -= change[..., 0] * np.minimum(1, _MAX_STEP / np.abs(x @ change).max(axis=1))
    return coefficients


def _products(scaled: np.ndarray, x: np.ndarray, split: bool) -> np.ndarray:
    """Return the sum over tokens of the products of each head's numbers, `[n, D + 1, D + 1]`."""
    # OpenBLAS gives larger products to threads, which cost many times as much as these are worth.
    size = max(1, _UNTHREADED // x.shape[2] ** 2) if split else max(1, x.shape[1])
    total = np.zeros((), np.float32)
    for start in range(0, x.shape[1], size):
        part = slice(start, start + size)
        total = total + scaled[:, part].swapaxes(1, 2) @ x[:, part]
    return total


def _cross_validate(x: np.ndarray, y: np.ndarray, split: bool) -> tuple[float, np.ndarray]:
    """Return the penalty whose predictions of held-out tokens are best, and the heads `[n]` where they beat the mean."""
    tokens = x.shape[1]
    loss, without = np.zeros((len(_PENALTIES), len(x))), np.zeros(len(x))
    for held in np.array_split(np.arange(tokens), min(_FOLDS, tokens)):
        others = np.setdiff1d(np.arange(tokens), held)
        if not len(others):
            return _PENALTIES[0], np.zeros(len(x), dtype=bool)
        known, wanted = (x[:, others], y[:, others]), (x[:, held], y[:, held])
        found = np.zeros((x.shape[0], x.shape[2]), np.float32)
        found[:, -1] = np.log(known[1].mean(axis=1))
        without += _gamma_loss(*wanted, found)
        for index, penalty in enumerate(_PENALTIES):  # each from the solution of a stronger one
            found = _fit(*known, penalty, found, _WARM_ROUNDS, split)
            loss[index] += _gamma_loss(*wanted, found)
    best = int(loss.sum(axis=1).argmin())
    return _PENALTIES[best], loss[best] < without


def _gamma_loss(x: np.ndarray, y: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """Return the summed loss `[n]` of each head's predictions under the gamma distribution, trusted as far as gains do.

    Each head's bias is that which suits these tokens best: it scales the head's gains alike.
    """
    logs = TEMPER * np.clip((x @ coefficients[..., None])[..., 0], -30, 30)
    scale = (y * np.exp(-logs)).mean(axis=1, dtype=np.float64)
    return np.asarray(len(y[0]) * np.log(scale) + logs.sum(axis=1, dtype=np.float64))


def attention_gains(keys: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """Return the factors on each token's values that follow from its keys.

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
    """Return the inverse matrices; `apply_weights` with them undoes the weighting.

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
        with np.errstate(all="ignore"):
            inverse = np.linalg.inv(weights.astype(np.float64)).astype(np.float32)
    except np.linalg.LinAlgError:
        inverse = np.full(1, np.nan, np.float32)
    if not within(inverse, MAX_INVERSE):
        raise FormatError("the artifacts' weights have no inverse; calibrate again")
    return inverse

"""How close two caches or two sets of logits are, and how many times smaller a file is."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np


def relative_error(original: np.ndarray, decoded: np.ndarray) -> float:
    """Squared error over squared original, both summed over everything, in float64 layer by layer."""
    error = energy = 0.0
    for a, b in zip(original, decoded):
        wide = a.astype(np.float32)
        error += float(np.square(wide - b, dtype=np.float64).sum())
        energy += float(np.square(wide, dtype=np.float64).sum())
    return error / energy if energy else 0.0


def layer_mse(original: np.ndarray, decoded: np.ndarray) -> list[float]:
    """Mean squared error of each layer of `[L, B, H, T, D]`; empty tensors give 0."""
    return [
        float(np.square(a.astype(np.float32) - b, dtype=np.float64).mean()) if a.size else 0.0
        for a, b in zip(original, decoded)
    ]


def kl_divergence(reference: mx.array, other: mx.array) -> mx.array:
    """KL(reference || other) in nats at each position of logits `[n, vocabulary]`, in float32."""
    p, q = (
        x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (reference.astype(mx.float32), other.astype(mx.float32))
    )
    return (mx.exp(p) * (p - q)).sum(axis=-1)


def top1_agreement(reference: mx.array, other: mx.array) -> float:
    """Share of positions of `[n, vocabulary]` where both put the same token first."""
    return float(mx.mean(mx.argmax(reference, axis=-1) == mx.argmax(other, axis=-1)))


def cosine(a: mx.array, b: mx.array) -> mx.array:
    """Cosine of the last axis."""
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    return (a * b).sum(axis=-1) / (mx.linalg.norm(a, axis=-1) * mx.linalg.norm(b, axis=-1))


def perplexity(logits: mx.array, targets: mx.array) -> float:
    """exp of the mean cross-entropy of logits `[n, vocabulary]` against tokens `[n]`."""
    return float(mx.exp(nn.losses.cross_entropy(logits.astype(mx.float32), targets, reduction="mean")))

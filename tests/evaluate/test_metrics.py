import math

import mlx.core as mx
import numpy as np
import pytest

from mlxkv.evaluate import metrics


def test_kl_of_two_coins_is_the_textbook_number():
    p, q = mx.log(mx.array([[0.5, 0.5]])), mx.log(mx.array([[0.9, 0.1]]))
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert metrics.kl_divergence(p, q).item() == pytest.approx(expected, rel=1e-5)
    assert metrics.kl_divergence(p, p + 3).item() == pytest.approx(0, abs=1e-6)


def test_perplexity_of_a_uniform_guess_is_the_vocabulary():
    assert metrics.perplexity(mx.zeros((5, 64)), mx.array([1, 2, 3, 4, 5])) == pytest.approx(64, rel=1e-5)


def test_top1_agreement_counts_positions():
    a = mx.array([[0.0, 1], [1, 0], [0, 1], [0, 1]])
    assert metrics.top1_agreement(a, mx.array([[0.0, 1], [0, 1], [0, 1], [1, 0]])) == 0.5


def test_cosine_sees_direction_only():
    a = mx.array([[1.0, 2, 3]])
    assert metrics.cosine(a, 5 * a).item() == pytest.approx(1)
    assert metrics.cosine(a, -a).item() == pytest.approx(-1)


def test_errors_are_relative_and_by_layer():
    original = np.ones((2, 1, 1, 4, 3), np.float16)
    decoded = original.copy()
    decoded[1] *= 3
    assert metrics.relative_error(original, decoded) == pytest.approx(4 * 12 / 24)
    assert metrics.layer_mse(original, decoded) == [0, 4]
    assert metrics.layer_mse(original[..., :0], decoded[..., :0]) == [0, 0]

"""Products with packed rows, as decode attention's reference makes them, against unpacking first."""

import mlx.core as mx
import numpy as np
import pytest

from mlxkv.kernels import _products as products
from mlxkv.kernels.bits import pack, unpack


def normal(shape):
    return mx.random.normal(shape, key=mx.random.key(sum(shape)))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("tokens", "dims"), [(1, 64), (1, 32), (32, 1), (64, 1), (1, 48), (5, 1), (8, 16)])
def test_scales_taken_out_of_a_product_change_nothing_but_rounding(bits, tokens, dims):
    packed = pack((3 * normal((2, 3, 64, 64)) + 5).astype(mx.float16), bits, tokens, dims)
    rows = np.array(unpack(packed, mx.float32))
    x, weights = normal((2, 3, 4, 64)), normal((2, 3, 5, 64))
    np.testing.assert_allclose(products.scores_of(x, packed), np.array(x) @ rows.swapaxes(-1, -2), atol=2e-3)
    np.testing.assert_allclose(products.weighted_sum(weights, packed), np.array(weights) @ rows, atol=2e-3)


@pytest.mark.parametrize(("tokens", "dims"), [(1, 64), (32, 1), (8, 16)])
def test_no_tokens_give_no_scores_and_zeros(tokens, dims):
    packed = pack(mx.zeros((1, 2, 0, 64), mx.float16), 4, tokens, dims)
    assert products.scores_of(normal((1, 2, 3, 64)), packed).shape == (1, 2, 3, 0)
    assert not mx.any(products.weighted_sum(mx.zeros((1, 2, 3, 0)), packed)).item()

"""Products with packed rows, as decode attention's reference makes them, against unpacking first."""

import mlx.core as mx
import numpy as np
import pytest

from mlxkv.kernels import _products as products
from mlxkv.kernels.bits import code_planes, pack, unpack, unpack_codes

TILES = [(1, 64), (1, 32), (32, 1), (64, 1), (1, 48), (5, 1), (8, 16), (2, 64), (1, 1)]


def normal(shape):
    return mx.random.normal(shape, key=mx.random.key(sum(shape)))


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * float(np.abs(expected).max(initial=1)))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dim", [64, 80, 20, 7])
def test_planes_are_the_codes_of_every_nth_dim(bits, dim):
    packed = pack(normal((2, 3, dim)), bits, 1, dim)
    planes, codes = code_planes(packed), np.array(unpack_codes(packed))
    for j, plane in enumerate(planes):
        np.testing.assert_array_equal(plane, codes[..., j :: len(planes)])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [1, 3, 9])
@pytest.mark.parametrize(("tokens", "dims"), TILES)
def test_scales_taken_out_of_a_product_change_nothing_but_rounding(bits, group, tokens, dims):
    packed = pack((3 * normal((2, 3, 64, 64)) + 5).astype(mx.float16), bits, tokens, dims)
    rows = np.array(unpack(packed, mx.float32))
    x, weights = normal((2, 3, group, 64)), normal((2, 3, group, 64))
    close(products.scores_of(x, packed), np.array(x) @ rows.swapaxes(-1, -2))
    close(products.weighted_sum(weights, packed), np.array(weights) @ rows)


@pytest.mark.parametrize("dim", [48, 33])
@pytest.mark.parametrize(("tokens", "dims"), [(1, 33), (1, 24), (5, 1), (3, 11)])
def test_rows_of_any_width_are_multiplied(dim, tokens, dims):
    for bits in (2, 3, 4, 8):
        packed = pack(normal((1, 2, 30, dim)), bits, tokens, dims)
        rows = np.array(unpack(packed, mx.float32))
        x, weights = normal((1, 2, 3, dim)), normal((1, 2, 3, 30))
        close(products.scores_of(x, packed), np.array(x) @ rows.swapaxes(-1, -2))
        close(products.weighted_sum(weights, packed), np.array(weights) @ rows)


@pytest.mark.parametrize(("tokens", "dims"), [(1, 64), (32, 1), (8, 16)])
def test_no_tokens_give_no_scores_and_zeros(tokens, dims):
    packed = pack(mx.zeros((1, 2, 0, 64), mx.float16), 4, tokens, dims)
    assert products.scores_of(normal((1, 2, 3, 64)), packed).shape == (1, 2, 3, 0)
    assert not mx.any(products.weighted_sum(mx.zeros((1, 2, 3, 0)), packed)).item()


def parts_of(rotated):
    """Sinks, packed rows and newest tokens."""
    first, old, new = (normal((2, 3, rows, 32)) for rows in (4, 120, 9))
    packed = pack(old, 4, 60, 1, rotated), pack(old + 1, 4, 2, 32, rotated)
    return [(first, first + 1), packed, (new.astype(mx.float16), new.astype(mx.float16))]


@pytest.mark.parametrize("floats", [1, 32 * 60, 32 * 120, 2 * 32 * 120])
@pytest.mark.parametrize("rotated", [False, True])
def test_rows_taken_in_pieces_give_what_they_give_at_once(rotated, floats, monkeypatch):
    queries, parts = normal((2, 3, 3, 32)), parts_of(rotated)
    expected = products.attention_over(queries, parts, None, None)
    monkeypatch.setattr(products, "TILE_FLOATS", floats)
    for found, whole in zip(products.attention_over(queries, parts, None, None), expected):
        close(found, np.array(whole))


def test_a_piece_is_made_after_the_piece_before(monkeypatch):
    monkeypatch.setattr(products, "TILE_FLOATS", 32 * 60)
    waits, depends = [], mx.depends
    monkeypatch.setattr(mx, "depends", lambda x, before: waits.append(len(before)) or depends(x, before))
    products.attention_over(normal((2, 3, 3, 32)), parts_of(False)[1:2], None, None)
    assert waits == [1] * (2 * 3 * 2 - 1)  # of keys: two pieces a head, all but the first; values are not unpacked


@pytest.mark.parametrize("masked", [False, True])
def test_exponentials_over_their_sum_are_the_softmax(masked):
    scores, sinks = 30 * normal((2, 3, 4, 50)), 30 * normal((12,))
    weights, total = products.exponentials(scores, None, masked)
    np.testing.assert_allclose(weights / total, mx.softmax(scores, axis=-1), rtol=2e-5, atol=1e-30)
    logits = mx.broadcast_to(sinks.reshape(1, 3, 4, 1), (2, 3, 4, 1))
    weights, total = products.exponentials(scores, sinks, masked)
    expected = mx.softmax(mx.concatenate([scores, logits], axis=-1), axis=-1)[..., :-1]
    np.testing.assert_allclose(weights / total, expected, rtol=2e-5, atol=1e-30)


def test_a_query_that_sees_nothing_has_weights_of_zero():
    weights, total = products.exponentials(mx.full((1, 1, 2, 5), -mx.inf), None, True)
    assert not np.array(weights).any()
    assert np.array(total).all()

"""Codes of rotated rows: the rotation itself, and attention that rotates the query and the output instead of the rows."""

import hashlib

import mlx.core as mx
import numpy as np
import pytest
from kernel_checks import assert_same

from mlxkv.kernels import bits
from mlxkv.kernels import decode_attention as attention
from mlxkv.kernels._rotation import rotate, rotate_back, rotation
from mlxkv.kernels.bits import pack, unpack

WIDTHS = (64, 80, 96, 112, 128, 256, 72, 33, 1)
KINDS = [((4, 60, 1, True), (4, 2, "D", True)), ((2, 30, 1, True), (2, 1, "D", False)), ((4, 1, "D", False), (8, 1, "D", True))]  # fmt: skip


def normal(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize("dim", WIDTHS)
def test_a_rotation_keeps_products_and_spreads_every_dim(dim):
    matrix = np.array(rotation(dim)).astype(np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(dim), atol=1e-6)
    assert abs(matrix).max() <= 1.42 * dim**-0.5
    x = normal(5, dim)
    np.testing.assert_allclose(rotate_back(rotate(x)), x, atol=1e-5)


def test_the_rotation_is_the_one_that_saved_caches_have():
    signs = b"".join(np.signbit(np.array(rotation(dim))).tobytes() for dim in (64, 128, 80, 33))
    assert hashlib.sha256(signs).hexdigest()[:16] == "05d898b972591798"


@pytest.mark.parametrize("dim", WIDTHS)
@pytest.mark.parametrize("kinds", KINDS)
def test_attention_over_rotated_buckets_is_that_over_their_unpacked_rows(dim, kinds):
    buckets = [(pack(normal(1, 2, 16, dim, seed=5), 16, 1, 1),) * 2]
    buckets += [tuple(pack(normal(1, 2, 120, dim, seed=i), *(dim if n == "D" else n for n in kind)) for i, kind in enumerate(kinds))]  # fmt: skip
    queries = normal(1, 6, 1, dim, seed=9)
    keys, values = (mx.concatenate([unpack(pair[i], mx.float32) for pair in buckets], axis=2) for i in (0, 1))
    expected = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=dim**-0.5, mask=None)
    output, _ = attention.reference_decode_attention(queries, buckets, dim**-0.5)
    np.testing.assert_allclose(output, expected, atol=4e-5)  # codes and minima are summed apart, and cancel


@pytest.mark.parametrize("dim", [64, 33])
def test_the_kernels_equal_the_reference_on_rotated_rows(kernel_path, dim):
    x = normal(1, 2, 120, dim, seed=1).astype(mx.float16)
    for tile in ((60, 1), (2, dim)):
        packed, expected = bits.metal_pack(x, 4, *tile, True), bits.reference_pack(x, 4, *tile, True)
        assert mx.array_equal(packed.words, expected.words)
        assert_same(bits.metal_unpack(packed, mx.float16), bits.reference_unpack(expected, mx.float16))
    queries = normal(1, 6, 1, dim, seed=9)
    buckets = [(pack(x, 4, 60, 1, True), pack(x, 4, 2, dim, True)), (pack(x, 4, 1, dim), pack(x, 4, 1, dim))]
    call = queries, buckets, dim**-0.5
    outputs = attention.metal_decode_attention(*call)[0], attention.reference_decode_attention(*call)[0]
    np.testing.assert_allclose(*outputs, atol=4e-5)


def test_a_constant_mean_widens_no_group_of_rotated_rows():
    x = normal(1, 1, 120, 64) + 20 * normal(1, 1, 1, 64, seed=3) * (mx.arange(64) % 16 == 0)
    plain, rotated = (
        mx.abs(unpack(pack(x, 4, *tile), mx.float32) - x).mean().item() for tile in ((1, 64), (60, 1, True))
    )
    assert rotated < plain / 6

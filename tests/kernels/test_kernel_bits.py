"""Codes of 2, 3, 4 and 8 bits: the reference is what plain NumPy says, and the kernels equal the reference."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from kernel_checks import assert_same
from metal_host import HostError, installed

from mlxkv.errors import InputError, MismatchError
from mlxkv.kernels import bits

PER_TOKEN, PER_CHANNEL = (1, 32), (32, 1)
FLOATS = [mx.float32, mx.float16, mx.bfloat16]
SIZES = [(1, 1), (1, 31), (31, 33), (32, 32), (33, 80), (2, 128)]


def rows(T, D, dtype=mx.float16, lead=(2, 4), seed=0):
    """Rows of very different sizes, among them constant ones, ones whose scale underflows, and one with a NaN."""
    x = np.random.default_rng(seed).standard_normal((*lead, T, D))
    x *= np.resize([1, 1e3, 1e-5, 0, 2e-7], (T, 1))
    x[..., 0, 0] += 7
    x[0, 1, T // 2, D // 2] = np.nan
    return mx.array(x.astype(np.float32)).astype(dtype)


def plain(T, D, seed=0, dtype=mx.float16):
    return mx.array(np.random.default_rng(seed).standard_normal((2, T, D)).astype(np.float32)).astype(dtype)


def wide(x):
    return np.array(x.astype(mx.float32))


def check(x, width, tile):
    packed, expected = bits.metal_pack(x, width, *tile), bits.reference_pack(x, width, *tile)
    for part in ("words", "bias", "scale"):
        assert np.array_equal(wide(getattr(packed, part)), wide(getattr(expected, part)), equal_nan=True)
    assert_same(packed.words, expected.words)
    assert_same(bits.metal_unpack(packed, x.dtype), bits.reference_unpack(expected, x.dtype))


@pytest.mark.parametrize(("T", "D"), SIZES)
@pytest.mark.parametrize("tile", [PER_TOKEN, PER_CHANNEL])
@pytest.mark.parametrize("width", bits.CODE_BITS)
def test_the_kernels_equal_the_reference(width, tile, T, D, kernel_path):
    check(rows(T, D), width, tile)


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_dtype_packs_alike(dtype, kernel_path):
    check(rows(33, 80, dtype), 8, PER_TOKEN)


def test_inputs_small_enough_for_the_constant_address_space_pack_alike(kernel_path):
    check(plain(1, 3)[:1], 3, PER_TOKEN)


@pytest.mark.parametrize("shape", [(0, 64), (2, 3, 0, 64), (0, 5, 64)])
def test_no_tokens_give_empty_words_without_a_kernel(shape, kernel_path):
    packed = bits.metal_pack(mx.zeros(shape), 3, 32, 1)
    assert packed.words.shape == (*shape[:-1], 6)
    assert bits.metal_unpack(packed, mx.float16).shape == shape


def test_the_dispatchers_take_the_kernels_where_there_is_metal(monkeypatch):
    x, seen = plain(5, 33), []
    monkeypatch.setattr(bits, "metal_pack", lambda *call: seen.append("pack") or bits.reference_pack(*call))
    monkeypatch.setattr(bits, "metal_unpack", lambda *call: seen.append("unpack") or bits.reference_unpack(*call))
    bits.unpack(bits.pack(x, 4, 1, 32), mx.float32)
    assert seen == (["pack", "unpack"] if bits.metal.available() else [])
    with installed():
        bits.unpack(bits.pack(x, 4, 1, 32), mx.float32)
    assert seen[-2:] == ["pack", "unpack"]


@pytest.mark.parametrize("width", bits.CODE_BITS)
@pytest.mark.parametrize(
    ("T", "D", "tile"), [(5, 33, (2, 7)), (1, 1, (3, 5)), (33, 64, PER_CHANNEL), (4, 40, PER_TOKEN)]
)
def test_the_reference_is_what_a_loop_over_values_says(width, T, D, tile):
    x = plain(T, D, dtype=mx.float32)
    packed = bits.reference_pack(x, width, *tile)
    decoded, values = wide(bits.reference_unpack(packed, mx.float32)), wide(x)
    words = np.array(packed.words).view(np.uint8)
    for n, t, d in np.ndindex(values.shape):
        a, b = t // tile[0] * tile[0], d // tile[1] * tile[1]
        cell = values[n, a : a + tile[0], b : b + tile[1]]
        shift, scale = cell.min(), (cell.max() - cell.min()) / np.float32(2**width - 1)
        assert wide(packed.bias)[n, a // tile[0], b // tile[1]] == shift
        assert wide(packed.scale)[n, a // tile[0], b // tile[1]] == scale
        code = round((values[n, t, d] - shift) / (scale or 1))
        stream = np.unpackbits(words[n, t], bitorder="little")
        assert np.packbits(stream[d * width : (d + 1) * width], bitorder="little")[0] == code
        assert abs(decoded[n, t, d] - (scale * code + shift)) <= 1e-6
    assert not np.unpackbits(words, axis=-1, bitorder="little")[..., D * width :].any()


@pytest.mark.parametrize("width", bits.CODE_BITS)
@pytest.mark.parametrize(("group", "dim"), [(32, 96), (64, 64)])
def test_per_token_words_are_those_of_mx_quantize(width, group, dim):
    x = plain(9, dim, dtype=mx.float32)
    words, scale, shift = mx.quantize(x, group, width)
    theirs = bits.QuantizedArray(words, shift, scale, width, dim, 1, group)
    np.testing.assert_allclose(bits.unpack(theirs, mx.float32), mx.dequantize(words, scale, shift, group, width), atol=1e-6)  # fmt: skip
    ours = bits.pack(x, width, 1, group)
    found = mx.dequantize(ours.words, ours.scale, ours.bias, group, width)
    np.testing.assert_allclose(found, bits.unpack(ours, mx.float32), atol=1e-6)


@pytest.mark.parametrize(("dtype", "rounding"), [(mx.float32, 2**-23), (mx.float16, 2**-11), (mx.bfloat16, 2**-8)])
@pytest.mark.parametrize("width", bits.CODE_BITS)
def test_no_value_is_further_off_than_half_a_step_and_the_scales_rounding(width, dtype, rounding):
    x = plain(64, 48, dtype=dtype)
    packed = bits.pack(x, width, 32, 1)
    step = np.repeat(wide(packed.scale), 32, axis=-2)
    error = np.abs(wide(bits.unpack(packed, mx.float32)) - wide(x))
    assert (error <= step * (0.5 + (2**width - 1) * rounding) + 1e-6).all()
    assert (error > step * 0.4).any()


@pytest.mark.parametrize("dtype", FLOATS)
def test_constant_tiles_come_back_exactly(dtype):
    x = mx.full((2, 3, 64), -0.1, dtype)
    packed = bits.pack(x, 2, 1, 32)
    assert not np.array(packed.scale.astype(mx.float32)).any()
    assert mx.array_equal(bits.unpack(packed, dtype), x)


def test_the_full_range_of_float16_does_not_overflow():
    x = mx.array([[-65504.0, 65504.0, 0, 3]], mx.float16)
    assert np.allclose(wide(bits.unpack(bits.pack(x, 2, 1, 4), mx.float32))[0, :2], x[0, :2], rtol=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_tile_with_a_value_that_is_not_finite_decodes_as_nan_and_no_other_tile_does(bad):
    x = plain(4, 64)
    x[1, 2, 40] = bad
    expected = np.zeros(x.shape, bool)
    expected[1, 2, 32:] = True
    assert np.array_equal(np.isnan(wide(bits.unpack(bits.pack(x, 4, 1, 32), mx.float16))), expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("D", [1, 31, 64])
def test_unpacked_storage_is_the_values_themselves(dtype, D, kernel_path):
    x = plain(5, D, dtype=dtype)
    packed = bits.metal_pack(x, 16, 1, 32)
    assert packed.is_unquantized
    assert packed.dtype == dtype
    assert packed.nbytes == 2 * 5 * -(-D * x.dtype.size // 4) * 4
    assert mx.array_equal(bits.metal_unpack(packed, dtype), x)


def test_nbytes_counts_words_and_both_scales():
    packed = bits.pack(plain(33, 80), 3, 32, 1)
    assert packed.shape == (2, 33, 80)
    assert packed.nbytes == 2 * 33 * 8 * 4 + 2 * (2 * 2 * 80 * 2)


@pytest.mark.parametrize("change", [{"bits": 5}, {"bits": 32}, {"dim": 0}, {"tile_tokens": 0}, {"tile_dims": -1}])
def test_packed_refuses_numbers_that_cannot_be(change):
    with pytest.raises(InputError):
        replace(bits.pack(plain(4, 64), 4, 1, 32), **change)


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 3},
        {"dim": 65},
        {"tile_tokens": 2},
        {"tile_dims": 64},
        {"words": mx.zeros((2, 4, 8), mx.int32)},
        {"scale": mx.zeros((2, 4, 2))},
        {"scale": mx.zeros((4, 2), mx.float16)},
    ],
)
def test_packed_refuses_parts_that_do_not_fit_together(change):
    with pytest.raises(MismatchError, match="expected"):
        replace(bits.pack(plain(4, 64), 4, 1, 32), **change)


@pytest.mark.parametrize("pack", [bits.reference_pack, bits.metal_pack])
@pytest.mark.parametrize("call", [(5, 1, 32), (4, 0, 32), (4, 1, 0), (32, 1, 1)])
def test_pack_refuses_other_bits_and_tiles(call, pack):
    with pytest.raises(InputError, match="one of"):
        pack(plain(4, 64), *call)
    with pytest.raises(InputError, match="int32"):
        pack(mx.zeros((4, 64), mx.int32), 4, 1, 32)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("body", "old", "new"),
    [
        ("bits_pack", "bit + 32 + BITS - 1", "bit + 32"),
        ("bits_pack", "int d = bit / BITS", "int d = bit / BITS + 1"),
        ("bits_pack", "metal::min(int(dim), ", "("),
        ("bits_pack", "metal::rint", "metal::floor"),
        ("bits_pack", "float((1 << BITS) - 1)", "float(1 << BITS)"),
        ("bits_pack", "steps > 0.0f", "!(steps <= 0.0f)"),
        ("bits_pack", "step == 0.0f ? 1.0f : step", "step"),
        ("bits_pack", "code >> -left : code << left", "0u : code << left"),
        ("bits_pack", "code >> -left : code << left", "code >> -left : code << (left + 1)"),
        ("bits_pack", "size_t(place.z) * x_shape[1] + place.y", "place.y"),
        ("bits_pack", "place.y / TOKENS", "place.y % TOKENS"),
        ("bits_pack", "place.y / TOKENS", "place.y / (TOKENS + 1)"),
        ("bits_pack", "tiles + d / DIMS", "tiles + d / (DIMS + 1)"),
        ("bits_unpack", "place.x, BITS", "place.x + 1, BITS"),
        ("bits_unpack", "row * words_shape[2]", "row"),
        ("bits_unpack", "place.y / TOKENS", "place.y * TOKENS"),
        ("bits_unpack", "place.x / DIMS", "place.x / (DIMS + 1)"),
        ("bits_unpack", "float(scale[tile]) * code + float(shift[tile])", "float(shift[tile]) * code + float(scale[tile])"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_found(body, old, new):
    with installed((body, old, new)), pytest.raises((AssertionError, HostError)):  # noqa: PT012
        check(rows(33, 80), 3, (32, 1))
        check(rows(33, 80), 8, (1, 32))

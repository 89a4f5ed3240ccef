import mlx.core as mx
import numpy as np
import pytest

from mlxkv.codec.stages import quantize as stage
from mlxkv.kernels.groups import BITS, from_codes, to_codes

# E4M3: sign, 4 exponent bits with bias 7, 3 mantissa bits; 0x7f and 0xff are NaN, exponent 0 is subnormal.
SIGN, EXPONENT, MANTISSA = (np.arange(256) >> 7), (np.arange(256) >> 3) & 15, np.arange(256) & 7
MAGNITUDE = np.where(EXPONENT == 0, MANTISSA * 2.0**-9, (1 + MANTISSA / 8) * 2.0 ** (EXPONENT - 7.0))
E4M3 = np.where(np.arange(256) % 128 == 127, np.nan, np.where(SIGN, -MAGNITUDE, MAGNITUDE))


def random_groups(size, tokens=400, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal((tokens, size)) * scale).astype(np.float32)


def columns(x):
    """Groups `[tokens, size]` as the codec holds them: `[1, size, tokens]`."""
    return mx.array(np.ascontiguousarray(x.T))[None]


def quantize(x, kind):
    """Shift and scale `[tokens]` and codes `[tokens, size]`."""
    shift, scale = stage.fit(columns(x), kind)
    return shift[0], scale[0], to_codes(columns(x), shift, scale, kind)[0].T


def coded(x, kind):
    return np.array(stage.quantization_round_trip(columns(x), kind)[0].T)


def plain_min_max(x, bits):
    low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
    shift, levels = low.astype(np.float16).astype(np.float32), 2**bits - 1
    scale = ((high - low) / levels).astype(np.float16).astype(np.float32)
    return np.clip(np.round((x - shift) / np.where(scale == 0, 1, scale)), 0, levels) * scale + shift


def test_mlx_decodes_all_fp8_codes_as_e4m3():
    found = np.array(mx.from_fp8(mx.arange(256).astype(mx.uint8), mx.float32))
    assert np.array_equal(found, E4M3.astype(np.float32), equal_nan=True)
    assert np.nanmax(found) == 448.0


def test_decoding_fp8_is_the_table_times_scale_plus_shift():
    codes = mx.arange(256).astype(mx.uint8)[None, :, None]
    shift, scale = mx.array([[2.5]], dtype=mx.float16), mx.array([[0.25]], dtype=mx.float16)
    found = np.array(from_codes(codes, shift, scale, "fp8"))
    assert np.array_equal(found[0, :, 0], (E4M3 * 0.25 + 2.5).astype(np.float32), equal_nan=True)


def test_mlx_encodes_to_the_nearest_fp8_code():
    random = np.random.default_rng(0)
    x = np.concatenate([random.standard_normal(3000) * 10.0**power for power in range(-4, 3)]).astype(np.float32)
    x = x[np.abs(x) <= 448]
    finite = E4M3[np.isfinite(E4M3)]
    nearest = np.abs(x[:, None].astype(np.float64) - finite).min(axis=1)
    found = np.array(mx.from_fp8(mx.to_fp8(mx.array(x)), mx.float32))
    assert np.array_equal(np.abs(x.astype(np.float64) - found), nearest)


def test_fp8_keeps_its_own_values():
    finite = E4M3[np.isfinite(E4M3)].astype(np.float32)
    assert np.array_equal(np.array(mx.from_fp8(mx.to_fp8(mx.array(finite)), mx.float32)), finite)


def test_the_two_nan_codes_of_fp8_decode_to_nan_and_no_others_do():
    codes = mx.arange(256).astype(mx.uint8)[None, :, None]
    found = np.array(from_codes(codes, mx.zeros((1, 1), mx.float16), mx.ones((1, 1), mx.float16), "fp8")).ravel()
    assert np.flatnonzero(np.isnan(found)).tolist() == [127, 255]


def test_fp8_saturates():
    found = np.array(mx.from_fp8(mx.to_fp8(mx.array([448.0, 449.0, 463.9, 500.0, 1e9, -1e9])), mx.float32))
    assert np.array_equal(found, [448, 448, 448, 448, 448, -448])


def test_the_groups_extreme_lands_on_the_largest_fp8_value():
    x = random_groups(64)
    shift, scale, codes = quantize(x, "fp8")
    top = np.abs(E4M3[np.array(codes)]).max(axis=-1)
    assert np.array_equal(top, np.full(len(x), 448.0))
    assert np.abs(np.array(shift) - x.mean(axis=-1)).max() < 1e-3
    assert np.array(scale).min() > 0


@pytest.mark.parametrize("kind", ["int2", "int4", "fp8"])
@pytest.mark.parametrize("size", [1, 16, 64, 256])
def test_shift_scale_and_codes_have_the_documented_types(size, kind):
    shift, scale, codes = quantize(random_groups(size, tokens=10), kind)
    assert (shift.shape, scale.shape, codes.shape) == ((10,), (10,), (10, size))
    assert (shift.dtype, scale.dtype, codes.dtype) == (mx.float16, mx.float16, mx.uint8)
    assert kind == "fp8" or np.array(codes).max() < 2 ** BITS[kind]


@pytest.mark.parametrize("kind", ["int2", "int4"])
@pytest.mark.parametrize("size", [16, 64, 256])
def test_inside_the_range_the_error_is_at_most_half_a_step(size, kind):
    x = random_groups(size)
    shift, scale, _ = quantize(x, kind)
    step, low = np.array(scale, np.float32)[:, None], np.array(shift, np.float32)[:, None]
    inside = (x >= low) & (x <= low + step * (2 ** BITS[kind] - 1))
    error = np.abs(coded(x, kind) - x)
    assert inside.mean() > 0.8
    assert (error <= step * 0.5001 + 1e-6)[inside].all()


@pytest.mark.parametrize("kind", ["int2", "int4", "fp8"])
@pytest.mark.parametrize("size", [1, 16, 1024])
def test_constant_groups_are_exact_to_float16(size, kind):
    values = np.array([0.0, 1.0, -3.14159, 1e-3, 1000.3, 60001.0, -65504.0, 6e-8], np.float32)
    found = coded(np.repeat(values[:, None], size, axis=1), kind)
    half_step = np.maximum(2.0 ** (np.frexp(values)[1] - 12), 2.0**-25)
    assert (np.abs(found - values[:, None]) <= half_step[:, None] * 1.01).all()


@pytest.mark.parametrize("kind", ["int2", "int4", "fp8"])
def test_groups_of_one_are_rounded_to_float16(kind):
    x = random_groups(1, tokens=1000, scale=30.0)
    found, rounded = coded(x, kind), x.astype(np.float16).astype(np.float32)
    if kind == "fp8":  # the rest after rounding is coded, too
        assert (np.abs(found - x) <= np.abs(rounded - x)).all()
    else:
        assert np.array_equal(found, rounded)


@pytest.mark.parametrize("kind", ["int2", "int4"])
@pytest.mark.parametrize("size", [16, 64, 256, 1024])
def test_the_refit_lowers_the_error_of_plain_min_max(size, kind):
    x = random_groups(size, seed=size)
    refitted, plain = (np.square(y - x).mean() for y in (coded(x, kind), plain_min_max(x, BITS[kind])))
    assert refitted < plain


@pytest.mark.parametrize("size", [16, 256])
def test_more_bits_mean_less_error(size):
    x = random_groups(size)
    errors = [np.square(coded(x, kind) - x).mean() for kind in ("int2", "int4")]
    assert errors[1] < errors[0] / 4
    assert np.square(coded(x, "fp8") - x).mean() < errors[0] / 4


@pytest.mark.parametrize("kind", ["int2", "int4"])
def test_values_on_a_grid_are_exact(kind):
    codes = np.random.default_rng(0).integers(0, 2 ** BITS[kind], (50, 64))
    codes[:, 0], codes[:, 1] = 0, 2 ** BITS[kind] - 1
    x = (codes * 0.125 - 3).astype(np.float32)
    assert np.array_equal(coded(x, kind), x)


@pytest.mark.parametrize("kind", ["int2", "int4", "fp8"])
@pytest.mark.parametrize("size", [1, 16, 64])
def test_the_largest_allowed_values_stay_finite(size, kind):
    random = np.random.default_rng(0)
    x = np.concatenate([random.choice([-65504.0, 65504.0], (100, size)), random.uniform(-65504, 65504, (100, size))])
    x[:100, -1] = -65504 + 40000 * random.random(100)
    found = coded(x.astype(np.float32), kind)
    assert np.isfinite(found).all()
    assert np.abs(found - x).max() < 65504 * (0.5 if kind == "int2" else 0.1)


@pytest.mark.parametrize("kind", ["int2", "int4", "fp8"])
def test_tiny_values_do_no_harm(kind):
    for size in (1e-8, 1e-20, 1e-40):
        assert np.abs(coded(random_groups(16, scale=size), kind)).max() <= 1e-6

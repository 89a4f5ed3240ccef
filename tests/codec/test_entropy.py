"""Quantized coefficients come back exactly, in about as many bytes as their statistics allow."""

import struct
import zlib

import numpy as np
import pytest

from mlxkv.codec.stages import entropy
from mlxkv.codec.stages.entropy import (
    CLASSES,
    MAX_MAGNITUDE,
    SHIFTS,
    Section,
    encode,
    estimate,
    histograms,
    learn_tables,
)
from mlxkv.errors import FormatError, InputError
from mlxkv.kernels import rans
from mlxkv.kernels.rans import TOTAL


def coefficients(tokens, components, seed=0, largest=8.0, gains=0.0):
    """Integers of Laplace-distributed coefficients that fall off with the component, tokens of unlike energy."""
    random = np.random.default_rng(seed)
    scales = largest * np.exp(-6 * np.arange(components) / components)
    energy = np.exp(gains * random.standard_normal((tokens, 1)))
    return np.rint(energy * random.laplace(0, scales, (tokens, components))).astype(np.int32)


def decode(data, tables, tokens, components):
    return entropy.decode([Section(data, tables, tokens, components)])[0]


@pytest.fixture(scope="module")
def tables():
    return learn_tables(np.concatenate([histograms(coefficients(512, 800, seed, 4.0**seed)) for seed in range(4)]))


@pytest.mark.parametrize(("tokens", "components"), [(512, 300), (500, 37), (1, 16), (33, 1), (7, 15), (2, 900)])
def test_integers_come_back(tables, tokens, components):
    integers = coefficients(tokens, components)
    assert np.array_equal(decode(encode(integers, tables), tables, tokens, components), integers)


@pytest.mark.parametrize("shape", [(5, 0), (1, 5), (40, 20)])
def test_nothing_but_zeros_costs_a_byte_a_token(tables, shape):
    data = encode(np.zeros(shape, np.int32), tables)
    assert shape[0] <= len(data) < 40 + shape[0]  # a byte each at least: it bounds what a reader allocates
    assert np.array_equal(decode(data, tables, *shape), np.zeros(shape))


def test_magnitudes_beyond_every_table_come_back(tables):
    integers = coefficients(64, 40)
    integers[::9, ::7] = [[127, -127, 128, -128, 2**31 - 1, 1 - 2**31]]
    assert np.array_equal(decode(encode(integers, tables), tables, 64, 40), integers)
    around = np.random.default_rng(0).integers(-140, 140, (64, 40)).astype(np.int32)
    wide = learn_tables(histograms(around))
    assert wide[:, 253].any(), "the largest magnitude is in the table, the next one not"
    assert np.array_equal(decode(encode(around, wide), wide, 64, 40), around)


def test_a_large_block_of_almost_nothing_has_lanes_enough_to_be_read(tables):
    integers = np.zeros((700, 96), np.int32)
    integers[np.arange(96), np.arange(96)] = 1
    data = encode(integers, tables)
    assert len(data) < 2 * 700
    assert np.array_equal(decode(data, tables, 700, 96), integers)


def test_sections_decode_together_whatever_their_lanes_shapes_and_tables(tables, monkeypatch):
    others = learn_tables(histograms(coefficients(512, 200, 9, 60.0)))
    arrays = [coefficients(*shape) for shape in ((512, 300), (60, 900), (1, 7), (5, 0))]
    sections = [
        Section(encode(array, kind), kind, *array.shape) for kind in (tables, others, tables.copy()) for array in arrays
    ]
    calls = []
    monkeypatch.setattr(entropy.rans, "decode", lambda *given: calls.append(given) or rans.reference_decode(*given))
    found = entropy.decode(sections)
    assert len(calls) == 1
    for section, array, back in zip(sections, 3 * arrays, found, strict=True):
        assert back.shape == (section.tokens, section.components)
        assert np.array_equal(back, array)


def test_sections_that_would_fill_memory_together_decode_alone(tables, monkeypatch):
    slow, wide = np.eye(160, 60, dtype=np.int32), coefficients(512, 300)
    arrays, sizes = [slow, *8 * [wide]], []
    sections = [Section(encode(array, tables), tables, *array.shape) for array in arrays]
    monkeypatch.setattr(entropy.rans, "decode", lambda *given: sizes.append(given[-1]) or rans.reference_decode(*given))
    found = entropy.decode(sections)
    assert all(np.array_equal(back, array) for back, array in zip(found, arrays, strict=True))
    assert sum(sizes) < 1.1 * sum(array.size for array in arrays)


def test_whatever_the_scale_a_code_is_near_the_entropy_of_its_source(tables):
    for largest in (0.5, 2.0, 8.0, 30.0):
        integers = coefficients(512, 640, 9, largest)
        groups = np.split(integers, 40, axis=1)  # of almost one scale
        counts = [np.unique(group, return_counts=True)[1] for group in groups]
        ideal = sum(-(n * np.log2(n / n.sum())).sum() for n in counts) / 8
        assert len(encode(integers, tables)) < 1.05 * ideal + 900, largest  # 900: classes, shifts and lanes


@pytest.mark.parametrize(("tokens", "components", "largest"), [(512, 640, 8.0), (512, 640, 0.5), (200, 60, 30.0)])
def test_an_estimate_is_near_what_encoding_makes(tables, tokens, components, largest):
    integers = coefficients(tokens, components, 5, largest)
    integers[0, 0] = 1000
    assert estimate(integers, tables) == pytest.approx(len(encode(integers, tables)), rel=0.02)


def test_neighbours_of_very_different_scale_cost_what_they_cost_alone(tables):
    scales = np.array([40.0, 0.3, 12.0, 2.0, 0.7, 25.0])
    integers = np.rint(np.random.default_rng(3).laplace(0, scales, (400, 6))).astype(np.int32)
    alone = sum(len(encode(integers[:, [i]], tables)) for i in range(6))
    assert len(encode(integers, tables)) < alone - 4 * 400  # five times no shifts


def test_tables_are_probabilities_ordered_by_size_and_symmetric(tables):
    assert tables.shape == (CLASSES, 256)
    assert (tables.sum(axis=1, dtype=int) == TOTAL).all()
    assert (tables[:, entropy.ESCAPE] > 0).all()
    signed = tables.astype(int)
    assert np.abs(signed[:, 1:255:2] - signed[:, 2:255:2]).max() <= 1
    means = signed[:, :255] @ ((np.arange(255) + 1) // 2) / TOTAL
    assert (np.diff(means) > -0.02 * means[1:]).all()


def test_tables_follow_what_they_learn_from():
    mostly_zero = learn_tables(histograms(coefficients(512, 400, largest=0.3)))
    never_zero = learn_tables(histograms(coefficients(512, 400, largest=0.3) + 50))
    assert mostly_zero[:, 0].min() > never_zero[:, 0].max()
    with pytest.raises(InputError, match="all zero"):
        learn_tables(np.zeros((5, MAX_MAGNITUDE + 2), int))


def test_tokens_that_are_louder_than_others_cost_less_with_their_shift(tables, monkeypatch):
    integers = coefficients(512, 640, gains=0.5)
    with_shifts = len(encode(integers, tables))
    monkeypatch.setattr(entropy, "SHIFTS", 0)
    without = encode(integers, tables)
    assert with_shifts < 0.97 * len(without)
    assert np.array_equal(decode(without, tables, 512, 640), integers)


def test_components_may_stand_in_any_order(tables):
    integers = coefficients(512, 320)
    shuffled = integers[:, np.random.default_rng(0).permutation(320)]
    assert len(encode(shuffled, tables)) < 1.02 * len(encode(integers, tables)) + 100


# Bytes from elsewhere


def test_bytes_written_by_the_first_version_still_decode():
    """Frozen; the deflated model inside may be written otherwise by another zlib."""
    signed = np.zeros((CLASSES, 256), np.uint16)
    signed[:, [0, 1, 2, 255]] = [4053, 20, 20, 3]
    signed[10, :5] = [1093, 1000, 1000, 500, 500]
    integers = (np.arange(48).reshape(6, 8) * 7 % 5 - 2).astype(np.int32) * (np.arange(8) % 3 > 0)
    integers[3, 4] = 1000
    data = bytes.fromhex(FROZEN)
    assert np.array_equal(decode(data, signed, 6, 8), integers)
    again = encode(integers, signed)
    model = struct.unpack_from("<I", again, 8)[0]
    assert again[12 + model :] == data[12 + struct.unpack_from("<I", data, 8)[0] :]


FROZEN = "01000000010000000f00000078da63e066f80a42ac0c000b610211000000000000e8030000be220300340ce2dc05e1728521d5"


def test_damage_is_an_error_or_other_integers_of_the_same_shape(tables):
    data, random, refused = encode(coefficients(60, 30), tables), np.random.default_rng(1), 0
    for _ in range(40):
        bad = bytearray(data)
        bad[random.integers(len(bad))] ^= 1 << random.integers(8)
        try:
            assert decode(bytes(bad), tables, 60, 30).shape == (60, 30)
        except FormatError:
            refused += 1
    assert refused > 30
    for cut in range(0, len(data), 101):
        with pytest.raises(FormatError):
            decode(data[:cut], tables, 60, 30)


@pytest.mark.parametrize(("place", "claim"), [(0, 2**31), (0, 0), (4, 2**30), (4, 1), (8, 2**31)])
def test_claims_that_do_not_fit_are_refused(tables, place, claim):
    data = bytearray(encode(coefficients(200, 60), tables))
    struct.pack_into("<I", data, place, claim)
    with pytest.raises(FormatError):
        decode(bytes(data), tables, 200, 60)


@pytest.mark.parametrize("model", [
    bytes(300), bytes(59), bytes(10**8), bytes([CLASSES + 1]) + bytes(99)])  # fmt: skip
def test_classes_that_do_not_fit_are_refused(tables, model):
    data, packed = encode(coefficients(200, 60), tables), zlib.compress(model)
    length = struct.unpack_from("<I", data, 8)[0]
    with pytest.raises(FormatError, match="classes"):
        decode(data[:8] + struct.pack("<I", len(packed)) + packed + data[12 + length :], tables, 200, 60)


def test_shifts_beyond_the_largest_are_refused(tables):
    data = bytearray(encode(coefficients(200, 60), tables))
    data[12 + struct.unpack_from("<I", data, 8)[0]] = SHIFTS + 1
    with pytest.raises(FormatError, match="shifts"):
        decode(bytes(data), tables, 200, 60)


# Tables that need no calibration


def test_even_tables_fit_coefficients_of_their_size():
    tables, random = entropy.even_tables(), np.random.default_rng(0)
    assert (tables.sum(axis=1, dtype=int) == 4096).all()
    for index in (6, 18, 30, 42):
        values = np.rint(random.standard_normal((2000, 1)) * 2 ** (index / 6) / 8).astype(np.int32)
        bits = [
            entropy.estimate(values, tables, entropy.Sizes(np.array([c]), np.zeros(2000, int))) for c in range(1, 65)
        ]
        assert abs(int(np.argmin(bits)) - index) <= 3


def test_sizes_of_rows_and_columns_together_make_the_code_shorter_and_come_back():
    random = np.random.default_rng(0)
    scale = np.exp(random.standard_normal((60, 1))) * np.exp(random.standard_normal(40))
    coefficients = (2 * scale * random.standard_normal((60, 40))).astype(np.float32)
    coefficients[:, 3] = 0
    integers, tables = np.rint(coefficients).astype(np.int32), entropy.even_tables()
    sizes = entropy.sizes_of(coefficients)
    data = entropy.encode(integers, tables, sizes)
    assert len(data) < len(entropy.encode(integers, tables))
    section = entropy.Section(data, tables, 60, 40, entropy.WIDE_SHIFTS)
    assert np.array_equal(entropy.decode([section])[0], integers)
    with pytest.raises(FormatError, match="shifts"):
        entropy.decode([section._replace(most_shift=entropy.SHIFTS)])

"""A basis in few bytes: within its bound, and no more is lost than that takes."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from synthetic import rd_artifacts

from mlxkv.codec.methods.kvtc_rd import KVTCRDConfig
from mlxkv.codec.stages import basis
from mlxkv.errors import FormatError, InputError


def rows_of(width, tokens=400, seed=0):
    random = np.random.default_rng(seed)
    mixed = np.linalg.qr(random.standard_normal((width, width)))[0]
    rows = random.standard_normal((tokens, width)) * 0.9 ** np.arange(width) @ mixed
    return (rows - rows.mean(axis=0)).astype(np.float32)


@pytest.mark.parametrize("width", [48, 50])
def test_a_basis_stays_within_its_bound_and_uses_it(width):
    rows = rows_of(width)
    errors = []
    for budget in (300, 500, 900, 1600, 2600):
        found = basis.learn_basis(rows.copy(), 1e-4, budget, 0)
        assert 0.8 * budget < held(found) <= budget
        back = np.array(found.reconstruct(found.project(mx.array(rows), found.rank)))
        errors.append(np.square(back - rows).sum() / np.square(rows).sum())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3
    loose, unbounded = (basis.learn_basis(rows.copy(), 1e-4, budget, 0) for budget in (10_000, None))
    assert held(loose) == held(unbounded) < 5000
    assert np.array_equal(loose.codes, unbounded.codes)


def held(found):
    return found.codes.nbytes + found.scale.nbytes + found.spread.nbytes


def test_all_entries_cost_alike_and_what_is_below_the_noise_is_left_out():
    rows, step = rows_of(64), 0.01
    found, exact = (basis.learn_basis(rows.copy(), each, None, 0) for each in (step, 1e-5))
    difference = np.array(found.matrix - exact.matrix[: found.rank]) * found.spread[:, None]
    by_component = np.sqrt(np.square(difference).mean(axis=1))
    np.testing.assert_allclose(by_component, step / np.sqrt(12), rtol=0.5)
    assert abs(difference).max() <= step * 0.501
    assert found.rank < exact.rank == 64
    assert (exact.spread[found.rank :] / np.sqrt(64) < 1.1 * step).all()


def test_integers_of_two_bytes_come_back_exactly():
    random = np.random.default_rng(0)
    spread = np.array([3000.0, 100.0, 20.0, 2.0], np.float32)
    entries = (random.standard_normal((4, 500)) * spread[:, None]).astype(np.float32)
    found = basis._round_to_step(entries, np.ones(4, np.float32), 1.0)
    assert np.array_equal(np.array(found.matrix), np.rint(entries))
    clipped = basis._round_to_step(entries * np.float32(100), np.ones(4, np.float32), 1.0)
    np.testing.assert_allclose(clipped.matrix, entries * 100, atol=0.51 * np.abs(entries).max() * 100 / basis.MAX_ENTRY)


def test_weak_components_do_not_take_up_strong_ones():
    rows = rows_of(64)
    found, exact = (basis.learn_basis(rows.copy(), step, None, 0) for step in (0.02, 1e-5))
    count, strong = found.rank, found._strong_count
    assert 5 < strong < count - 5
    together, alone = (np.array(each.project(mx.array(rows), count)) for each in (found, exact))
    leaked = np.array(mx.array(rows) @ found.matrix.T)[:, strong:] - alone[:, strong:]
    assert np.square(together[:, strong:] - alone[:, strong:]).sum() < 0.3 * np.square(leaked).sum()


@pytest.mark.parametrize("step", [0.003, 1e-4])
def test_refined_coefficients_make_up_for_the_rounding_of_the_basis(step):
    rows = rows_of(24)
    found = basis.learn_basis(rows.copy(), step, None, 0)
    assert found.rank == 24
    left = [rows - np.array(found.reconstruct(found.project(mx.array(rows), 24, refined))) for refined in (False, True)]
    assert np.square(left[1]).sum() < 0.1 * np.square(left[0]).sum()


@pytest.mark.parametrize(
    "change",
    [
        {"codes": np.zeros(0, np.uint8)},
        {"codes": np.frombuffer((49 * 48).to_bytes(4, "little"), np.uint8)},
        {"scale": np.full(48, np.nan, np.float32)},
        {"spread": np.ones(47, np.float32)},
        {"spread": np.ones(48, np.float64)},
        {"width": 47},
    ],
)
def test_parts_that_are_not_of_one_basis_are_refused(change):
    found = basis.learn_basis(rows_of(48), 1e-4, None, 0)
    with pytest.raises(FormatError):
        replace(found, **change).matrix  # noqa: B018


def test_codes_that_inflate_to_more_or_less_than_they_say_are_refused():
    found = basis.learn_basis(rows_of(48), 1e-4, None, 0)
    for size in (48 * 48, 2 * 48 * 48):
        assert size != found._byte_count
        codes = np.r_[np.frombuffer(size.to_bytes(4, "little"), np.uint8), found.codes[4:]]
        with pytest.raises(FormatError, match="inflate"):
            replace(found, codes=codes).matrix  # noqa: B018


def test_components_that_no_step_reaches_are_left_out():
    found = basis.learn_basis(rows_of(48), 1e-4, None, 0)
    spread = found.spread.astype(float)
    for least in (0.0, 0.05, 0.3, 10.0):
        count = found.rank_above(least)
        assert (spread[count:] < least).all()
        assert count == 0 or spread[count - 1] >= least
    assert found.project(mx.array(rows_of(48)), 0).shape == (400, 0)


def test_a_bound_that_nothing_fits_is_refused(tmp_path):
    with pytest.raises(InputError, match="hold no component"):
        basis.learn_basis(rows_of(48), 1e-4, 20, 0)
    with pytest.raises(InputError, match="raise basis_bytes"):
        rd_artifacts(tmp_path, basis_bytes=30_000)
    limit = 75_000
    assert rd_artifacts(tmp_path, basis_bytes=limit).nbytes <= limit


@pytest.mark.parametrize(
    "wrong", [{"basis_bytes": 0}, {"basis_bytes": 1.5}, {"samples_per_file": 0}, {"sinks": -1}, {"seed": None}]
)
def test_settings_of_another_type_or_range_are_refused(wrong):
    with pytest.raises(InputError):
        KVTCRDConfig(**wrong)


def test_a_sparse_component_with_large_integers_is_kept_however_wide_it_is():
    entries = np.zeros((2, 40_000), np.float32)
    entries[0], entries[1, 7] = 2.0, 150.0  # the second's mean square is below 1
    found = basis._round_to_step(entries, np.ones(2, np.float32), 1.0)
    assert np.array_equal(np.array(found.matrix), entries)

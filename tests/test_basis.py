"""A basis in 8 and 4 bits: within its bound, and no more is lost than that takes."""

import mlx.core as mx
import numpy as np
import pytest
from synthetic import rd_artifacts

from mlxkv.codec import basis
from mlxkv.codec.kvtc_rd import Settings
from mlxkv.errors import InputError


def rows_of(width, tokens=400, seed=0):
    random = np.random.default_rng(seed)
    mixed = np.linalg.qr(random.standard_normal((width, width)))[0]
    rows = random.standard_normal((tokens, width)) * 0.9 ** np.arange(width) @ mixed
    return (rows - rows.mean(axis=0)).astype(np.float32)


@pytest.mark.parametrize("width", [48, 50])
def test_a_basis_stays_within_its_bound_and_uses_it(width):
    rows, heads = rows_of(width), width // 2
    errors = []
    for budget in (500, 900, 1600, 2600, 10_000):
        found = basis.learn(rows.copy(), heads, budget, 0)
        held = found.V8.nbytes + found.V4.nbytes + found.scale.nbytes + found.spread.nbytes
        assert 0.8 * min(budget, (found.V8.shape[1] == width and held) or budget) < held <= budget
        back = np.array(found.rows(found.project(mx.array(rows), found.rank)))
        errors.append(np.square(back - rows).sum() / np.square(rows).sum())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4
    assert basis.learn(rows.copy(), heads, None, 0).V8.shape == (width, width)


def test_weak_components_do_not_take_up_strong_ones():
    rows = rows_of(64) * np.float32(100)
    found = basis.learn(rows.copy(), 4, 3200, 0)
    assert found.V4.shape[1] > 20
    exact = basis.learn(rows.copy(), 4, None, 0)
    together, alone = np.array(found.project(mx.array(rows), 64)), np.array(exact.project(mx.array(rows), 64))
    weak = slice(found.V8.shape[1], found.rank)
    leaked = np.array(mx.array(rows) @ found.matrix.T)[:, weak] - alone[:, weak]
    assert np.square(together[:, weak] - alone[:, weak]).sum() < 0.3 * np.square(leaked).sum()


@pytest.mark.parametrize("budget", [2200, None])
def test_refined_coefficients_make_up_for_the_rounding_of_the_basis(budget):
    rows = rows_of(48)
    found = basis.learn(rows.copy(), 4, budget, 0)
    left = [rows - np.array(found.rows(found.project(mx.array(rows), 48, refined))) for refined in (False, True)]
    assert np.square(left[1]).sum() < 0.1 * np.square(left[0]).sum()


def test_components_that_no_step_reaches_are_left_out():
    found = basis.learn(rows_of(48), 4, None, 0)
    spread = found.spread.astype(float)
    for least in (0.0, 0.05, 0.3, 10.0):
        count = found.reaching(least)
        assert (spread[count:] < least).all()
        assert count == 0 or spread[count - 1] >= least
    assert found.project(mx.array(rows_of(48)), 0).shape == (400, 0)


def test_a_bound_that_nothing_fits_is_refused(tmp_path):
    with pytest.raises(InputError, match="hold no component"):
        basis.learn(rows_of(48), 4, 20, 0)
    with pytest.raises(InputError, match="raise basis_bytes"):
        rd_artifacts(tmp_path, basis_bytes=30_000)
    limit = 75_000
    assert rd_artifacts(tmp_path, basis_bytes=limit).nbytes <= limit


@pytest.mark.parametrize(
    "wrong", [{"basis_bytes": 0}, {"basis_bytes": 1.5}, {"samples_per_file": 0}, {"s": -1}, {"seed": None}]
)
def test_settings_of_another_type_or_range_are_refused(wrong):
    with pytest.raises(InputError):
        Settings(**wrong)

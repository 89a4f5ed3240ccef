import tracemalloc

import numpy as np
import pytest

from mlxkv.codec.stages import pca
from mlxkv.codec.stages.pca import principal_components


def low_rank(samples, width, directions=20, seed=0, noise=0.01):
    random = np.random.default_rng(seed)
    strength = 0.8 ** np.arange(directions)
    rows = (random.standard_normal((samples, directions)) * strength) @ random.standard_normal((directions, width))
    return (rows + noise * random.standard_normal(rows.shape) + random.standard_normal(width)).astype(np.float32)


def captured(rows, mean, basis):
    centred = rows.astype(np.float64) - mean
    return np.square(centred @ basis.astype(np.float64)).sum() / np.square(centred).sum()


def is_orthonormal(basis):
    return np.abs(basis.T.astype(np.float64) @ basis - np.eye(basis.shape[1])).max() < 1e-5


SHAPES = {"few samples": (90, 300), "many samples": (300, 90), "square": (120, 120)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_basis_holds_as_much_energy_as_the_svd_does(shape):
    rows = low_rank(*shape)
    mean, basis = principal_components(rows.copy(), 12)
    _, _, best = np.linalg.svd(rows.astype(np.float64) - rows.mean(axis=0), full_matrices=False)
    assert np.allclose(mean, rows.mean(axis=0), atol=1e-5)
    assert basis.shape == (shape[1], 12)
    assert captured(rows, mean, basis) == pytest.approx(captured(rows, mean, best[:12].T), abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_randomised_way_agrees_with_the_exact_one(monkeypatch, shape):
    rows = low_rank(*shape)
    mean, exact = principal_components(rows.copy(), 12)
    monkeypatch.setattr(pca, "EXACT_SIDE", 0)
    monkeypatch.setattr(pca, "OVERSAMPLE", 8)
    _, randomised = principal_components(rows.copy(), 12)
    assert not np.array_equal(exact, randomised)
    assert captured(rows, mean, randomised) == pytest.approx(captured(rows, mean, exact), abs=1e-4)
    assert np.abs(np.abs((exact[:, :5] * randomised[:, :5]).sum(axis=0)) - 1).max() < 1e-3
    assert np.sign((exact[:, :5] * randomised[:, :5]).sum(axis=0)).tolist() == [1] * 5


@pytest.mark.parametrize("exact_side", [0, 10**6], ids=["randomised", "exact"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_basis_is_orthonormal_and_ordered(monkeypatch, shape, exact_side):
    monkeypatch.setattr(pca, "EXACT_SIDE", exact_side)
    rows = low_rank(*shape)
    mean, basis = principal_components(rows.copy(), 30)
    energy = np.square((rows - mean) @ basis).sum(axis=0)
    assert is_orthonormal(basis)
    assert (energy[1:] <= energy[:-1] * 1.001).all()
    assert basis.dtype == mean.dtype == np.float32


@pytest.mark.parametrize("exact_side", [0, 10**6], ids=["randomised", "exact"])
def test_the_same_rows_give_the_same_basis(monkeypatch, exact_side):
    monkeypatch.setattr(pca, "EXACT_SIDE", exact_side)
    first, again = (principal_components(low_rank(90, 300), 12, seed=3)[1] for _ in range(2))
    assert np.array_equal(first, again)


def test_the_largest_entry_of_a_component_is_positive():
    _, basis = principal_components(low_rank(90, 300), 12)
    assert (basis[np.abs(basis).argmax(axis=0), np.arange(12)] > 0).all()


@pytest.mark.parametrize(
    ("samples", "width", "rank", "expected"), [(10, 50, 40, 9), (50, 10, 40, 10), (2, 50, 5, 1), (30, 30, 99, 29)]
)
def test_no_more_components_exist_than_samples_and_dims_allow(samples, width, rank, expected):
    rows = low_rank(samples, width)
    mean, basis = principal_components(rows.copy(), rank)
    assert basis.shape == (width, expected)
    assert is_orthonormal(basis)
    assert captured(rows, mean, basis) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("shape", [(40, 200), (200, 40)])
def test_the_basis_stays_orthonormal_where_the_spectrum_has_run_out(shape):
    rows = np.outer(np.arange(shape[0]), np.ones(shape[1])).astype(np.float32)
    mean, basis = principal_components(rows.copy(), 10)
    assert is_orthonormal(basis)
    assert captured(rows, mean, basis) == pytest.approx(1, abs=1e-6)


def test_few_samples_never_need_a_square_matrix_of_the_width():
    rows = low_rank(50, 6000)
    tracemalloc.start()
    try:
        _, basis = principal_components(rows, 40)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert is_orthonormal(basis)
    assert peak < 10 * rows.nbytes < 6000 * 6000 * 4 / 10


def test_the_randomised_way_needs_little_memory_too(monkeypatch):
    monkeypatch.setattr(pca, "EXACT_SIDE", 0)
    rows = low_rank(200, 6000)
    tracemalloc.start()
    try:
        _, basis = principal_components(rows, 10)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert is_orthonormal(basis)
    assert peak < 10 * rows.nbytes < 6000 * 6000 * 4 / 2


@pytest.mark.parametrize("shape", [(900, 120), (100, 120), (400, 300)])
def test_leading_components_hold_as_much_as_the_exact_ones(shape):
    random = np.random.default_rng(0)
    rows = (random.standard_normal(shape) * 0.97 ** np.arange(shape[1])) @ np.linalg.qr(
        random.standard_normal((shape[1],) * 2)
    )[0]
    rows = (rows - rows.mean(axis=0)).astype(np.float32)
    found = pca.leading_components(rows, 20)
    np.testing.assert_allclose(found.T @ found, np.eye(20), atol=1e-4)
    exact = pca.components_of_centred(rows, 20)
    assert np.square(rows @ found).sum() > 0.995 * np.square(rows @ exact).sum()

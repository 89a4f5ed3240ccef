"""Allocators against brute force, and the controls that importance has to beat."""

from itertools import product

import numpy as np
import pytest

from mlxkv.errors import InputError
from mlxkv.live.allocation import (
    allocate_by_position,
    allocate_exact,
    allocate_greedy,
    allocate_random,
    allocate_uniform,
    layer_budget_factors,
    regret,
    total_error,
)

ERRORS, COSTS = (0.22, 0.028, 0.0054, 0.00002), (40, 56, 72, 136)
ALL = [allocate_greedy, allocate_exact, allocate_uniform, allocate_random, allocate_by_position]


def problems(count=40):
    """Weights of 1 to 6 items, precisions with bytes and errors in any convexity, and a budget that can be met."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        items, levels = rng.integers(1, 7), rng.integers(1, 5)
        costs = np.sort(rng.integers(3, 40, levels)).tolist()
        errors = np.sort(rng.random(levels))[::-1].tolist()
        yield rng.random(items), errors, costs, int(items * costs[0] + rng.integers(0, 80))


def best_error(weights, errors, costs, budget):
    choices = [np.array(choice) for choice in product(range(len(costs)), repeat=len(weights))]
    return min(total_error(weights, errors, c) for c in choices if np.array(costs)[c].sum() <= budget)


def test_exact_is_as_good_as_trying_everything():
    for problem in problems():
        levels = allocate_exact(*problem)
        assert total_error(problem[0], problem[1], levels) == pytest.approx(best_error(*problem))


def test_greedy_is_worse_than_the_best_by_one_step_at_most():
    for weights, errors, costs, budget in problems():
        step = max(weights) * (max(errors) - min(errors))
        found = total_error(weights, errors, allocate_greedy(weights, errors, costs, budget))
        best = best_error(weights, errors, costs, budget)
        assert best - 1e-12 <= found <= best + step


def test_greedy_is_the_best_where_its_budget_ends_on_a_step():
    weights = np.array([8.0, 4.0, 2.0, 1.0])
    levels = allocate_greedy(weights, ERRORS, COSTS, 72 * 2 + 56 * 2)
    assert total_error(weights, ERRORS, levels) == pytest.approx(best_error(weights, ERRORS, COSTS, 72 * 2 + 56 * 2))


@pytest.mark.parametrize("allocate", ALL)
def test_no_allocator_exceeds_its_budget(allocate):
    for weights, errors, costs, budget in problems():
        assert np.array(costs)[allocate(weights, errors, costs, budget)].sum() <= budget


@pytest.mark.parametrize("allocate", ALL)
def test_a_budget_that_nothing_fits_into_is_refused(allocate):
    with pytest.raises(InputError, match="3 items of at least 40 bytes do not fit into 119"):
        allocate(np.ones(3), ERRORS, COSTS, 119)


@pytest.mark.parametrize("allocate", [allocate_greedy, allocate_exact])
def test_heavier_items_get_no_less_precision(allocate):
    levels = allocate(np.arange(30)[::-1] ** 2.0, ERRORS, COSTS, 30 * 70)
    assert (np.diff(levels) <= 0).all()
    assert len(set(levels.tolist())) > 1


def test_controls_hand_out_the_precisions_of_greedy_without_looking_at_weights():
    weights = np.random.default_rng(1).random(50)
    counts = np.bincount(allocate_greedy(weights, ERRORS, COSTS, 50 * 70))
    drawn, again = (allocate_random(weights, ERRORS, COSTS, 50 * 70, seed=3) for _ in range(2))
    early, late = (allocate_by_position(weights, ERRORS, COSTS, 50 * 70, first=first) for first in ("early", "late"))
    for levels in (drawn, early, late):
        np.testing.assert_array_equal(np.bincount(levels), counts)
    np.testing.assert_array_equal(drawn, again)
    assert (np.diff(early) <= 0).all()
    np.testing.assert_array_equal(early, late[::-1])
    assert len(set(allocate_uniform(weights, ERRORS, COSTS, 50 * 70).tolist())) == 1


def test_only_the_oracle_has_no_regret():
    rng = np.random.default_rng(2)
    future = rng.random(30) ** 4
    guess = future * rng.uniform(0.5, 2, 30)
    regrets = [regret(f(w, ERRORS, COSTS, 2000), future, ERRORS, COSTS, 2000)
               for f, w in ((allocate_exact, future), (allocate_exact, guess), (allocate_random, guess))]  # fmt: skip
    assert regrets[0] == 0
    assert regrets[0] < regrets[1] < regrets[2]


@pytest.mark.parametrize("kind", ["equal", "linear", "exponential"])
def test_layers_share_the_whole_budget(kind):
    shares = layer_budget_factors(kind, 7)
    assert shares.mean() == pytest.approx(1)
    assert shares[0] / shares[-1] == pytest.approx(1 if kind == "equal" else 2)
    steps = {"equal": shares, "linear": np.diff(shares), "exponential": shares[1:] / shares[:-1]}[kind]
    np.testing.assert_allclose(steps, steps[0])

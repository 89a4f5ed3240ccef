"""Allocation of precisions to items, for the least weighted error within a byte budget.

This is a multiple-choice knapsack problem. Items are tokens, or blocks of tokens. All allocators have the same
parameters: the items' weights `[n]`; for each precision, in order of non-decreasing bytes, the error of an item of
weight 1 and the bytes of an item; and a budget in bytes. They return the index of each item's precision, `[n]`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import numpy as np

from mlxkv.errors import InputError

Errors = Sequence[float]
Costs = Sequence[int]
Allocator = Callable[[np.ndarray, Errors, Costs, int], np.ndarray]


def allocate_greedy(weights: np.ndarray, errors: Errors, costs: Costs, budget: int) -> np.ndarray:
    """Start with the cheapest precision everywhere, then repeat the step that saves most error per byte while one fits.

    Parameters
    ----------
    weights
        `[n]`, 0 or more.
    errors
        Error of an item of weight 1 at each precision.
    costs
        Bytes of an item at each precision, non-decreasing.
    budget
        Maximal bytes of all items together.

    Returns
    -------
    np.ndarray
        Index of each item's precision, `[n]`.

    Raises
    ------
    InputError
        When the cheapest precision everywhere is over budget.

    Notes
    -----
    Steps follow the lower convex hull of (bytes, error), so the error exceeds the optimum by at most one step.

    Examples
    --------
    Two items, of which only one can have the better precision:

    >>> allocate_greedy(np.array([1.0, 3.0]), errors=[0.5, 0.1], costs=[10, 20], budget=30).tolist()
    [0, 1]
    """
    _check_budget(weights, costs, budget)
    hull = _convex_hull(errors, costs)
    levels = np.full(len(weights), hull[0])
    left = budget - len(weights) * costs[0]
    heap = [_hull_step(weights, errors, costs, hull, item, 0) for item in range(len(weights)) if len(hull) > 1]
    heapq.heapify(heap)
    while heap:
        _, item, step = heapq.heappop(heap)
        price = costs[hull[step + 1]] - costs[hull[step]]
        if price > left:
            continue
        left -= price
        levels[item] = hull[step + 1]
        if step + 2 < len(hull):
            heapq.heappush(heap, _hull_step(weights, errors, costs, hull, item, step + 1))
    return levels


def allocate_exact(weights: np.ndarray, errors: Errors, costs: Costs, budget: int) -> np.ndarray:
    """Find the optimal allocation by dynamic programming over bytes.

    Parameters
    ----------
    weights, errors, costs, budget
        As in `allocate_greedy`.

    Returns
    -------
    np.ndarray
        Index of each item's precision, `[n]`.

    Raises
    ------
    InputError
        When the cheapest precision everywhere is over budget.

    Notes
    -----
    The running time is O(n * precisions * budget / greatest common divisor of the costs).

    Examples
    --------
    >>> allocate_exact(np.array([1.0, 3.0]), errors=[0.5, 0.1], costs=[10, 20], budget=30).tolist()
    [0, 1]
    """
    _check_budget(weights, costs, budget)
    unit = int(np.gcd.reduce(np.array(costs)))
    room = min(budget, len(weights) * costs[-1]) // unit
    best, choices = np.zeros(room + 1), np.zeros((len(weights), room + 1), np.int8)
    for item, weight in enumerate(weights):
        options = np.full((len(costs), room + 1), np.inf)
        for level, cost in enumerate(costs):
            options[level, cost // unit :] = best[: max(0, room + 1 - cost // unit)] + weight * errors[level]
        choices[item] = options.argmin(axis=0)
        best = options.min(axis=0)
    levels = np.zeros(len(weights), np.int64)
    for item in reversed(range(len(weights))):
        levels[item] = choices[item, room]
        room -= costs[levels[item]] // unit
    return levels


def allocate_uniform(weights: np.ndarray, errors: Errors, costs: Costs, budget: int) -> np.ndarray:
    """Give all items the highest precision that fits for all.

    Parameters
    ----------
    weights, errors, costs, budget
        As in `allocate_greedy`; only the number of weights matters.

    Returns
    -------
    np.ndarray
        The same index for each item, `[n]`.

    Raises
    ------
    InputError
        When the cheapest precision everywhere is over budget.
    """
    _check_budget(weights, costs, budget)
    return np.full(len(weights), max(level for level, cost in enumerate(costs) if len(weights) * cost <= budget))


def allocate_random(weights: np.ndarray, errors: Errors, costs: Costs, budget: int, seed: int = 0) -> np.ndarray:
    """Assign the precisions that `allocate_greedy` chose to random items.

    This is a baseline that importance-driven allocation has to beat.

    Parameters
    ----------
    weights, errors, costs, budget
        As in `allocate_greedy`.
    seed
        Seed of the draw, 0 or more.

    Returns
    -------
    np.ndarray
        Index of each item's precision, `[n]`.

    Raises
    ------
    InputError
        When the cheapest precision everywhere is over budget.
    """
    return np.random.default_rng(seed).permutation(allocate_greedy(weights, errors, costs, budget))


def allocate_by_position(
    weights: np.ndarray, errors: Errors, costs: Costs, budget: int, first: str = "early"
) -> np.ndarray:
    """Assign the precisions that `allocate_greedy` chose to items by position.

    This is a baseline that importance-driven allocation has to beat.

    Parameters
    ----------
    weights, errors, costs, budget
        As in `allocate_greedy`.
    first
        "early" gives the high precisions to the first items, "late" to the last.

    Returns
    -------
    np.ndarray
        Index of each item's precision, `[n]`.

    Raises
    ------
    InputError
        When the cheapest precision everywhere is over budget.
    """
    levels = np.sort(allocate_greedy(weights, errors, costs, budget))
    return levels if first == "late" else levels[::-1].copy()


def total_error(weights: np.ndarray, errors: Errors, levels: np.ndarray) -> float:
    """Return the weighted error of an allocation.

    Parameters
    ----------
    weights
        `[n]`.
    errors
        Error of an item of weight 1 at each precision.
    levels
        `[n]`, as allocators return them.

    Returns
    -------
    float
        The sum over items.

    Examples
    --------
    >>> total_error(np.array([1.0, 3.0]), [0.5, 0.25], np.array([0, 1]))
    1.25
    """
    return float(weights @ np.asarray(errors)[levels])


def regret(levels: np.ndarray, future: np.ndarray, errors: Errors, costs: Costs, budget: int) -> float:
    """Return how much an allocation's error exceeds that of the optimal allocation, known only in hindsight.

    An allocation is decided with weights that predict how important items will be. Regret measures it with the weights
    that turned out to be right.

    Parameters
    ----------
    levels
        `[n]`, as allocators return them.
    future
        The weights that turned out to be right, `[n]`.
    errors, costs, budget
        As in `allocate_greedy`.

    Returns
    -------
    float
        0 for an optimal allocation, else above 0.
    """
    oracle = allocate_exact(future, errors, costs, budget)
    return total_error(future, errors, levels) - total_error(future, errors, oracle)


def layer_budget_factors(kind: str, layers: int, ratio: float = 2.0) -> np.ndarray:
    """Return the split of a budget over layers.

    Parameters
    ----------
    kind
        "equal"; or decreasing from the first layer to the last, in equal differences ("linear") or by equal factors
        ("exponential").
    layers
        Number of layers.
    ratio
        The first layer's factor divided by the last layer's; ignored for "equal".

    Returns
    -------
    np.ndarray
        A factor for each layer's budget, `[layers]`, with mean 1.

    Examples
    --------
    >>> layer_budget_factors("linear", 3, ratio=3.0).tolist()
    [1.5, 1.0, 0.5]
    """
    if kind == "equal":
        return np.ones(layers)
    factors = np.linspace(ratio, 1, layers) if kind == "linear" else np.geomspace(ratio, 1, layers)
    return factors / factors.mean()


def _check_budget(weights: np.ndarray, costs: Costs, budget: int) -> None:
    """Refuse a budget that even the cheapest precision exceeds."""
    if len(weights) * costs[0] > budget:
        raise InputError(f"{len(weights)} items of at least {costs[0]} bytes do not fit into {budget}")


def _convex_hull(errors: Errors, costs: Costs) -> list[int]:
    """Return the precisions on the lower convex hull of (bytes, error), cheapest first."""
    hull = [_cheapest(errors, costs)]
    while True:
        here = hull[-1]
        gains = {
            level: (errors[here] - errors[level]) / (costs[level] - costs[here])
            for level in range(len(costs))
            if errors[level] < errors[here] and costs[level] > costs[here]
        }
        if not gains:
            return hull
        hull.append(max(gains, key=lambda level: (gains[level], level)))


def _cheapest(errors: Errors, costs: Costs) -> int:
    """Return the cheapest precision; of several with the same cost, the one with the least error."""
    return min(range(len(costs)), key=lambda level: (costs[level], errors[level]))


def _hull_step(
    weights: np.ndarray, errors: Errors, costs: Costs, hull: list[int], item: int, step: int
) -> tuple[float, int, int]:
    """Return a heap entry: the negated error that an item's next step saves per byte, the item and the step."""
    here, there = hull[step], hull[step + 1]
    return float(weights[item]) * (errors[there] - errors[here]) / (costs[there] - costs[here]), item, step

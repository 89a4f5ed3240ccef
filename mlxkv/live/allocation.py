"""Which precision each item gets, for the least weighted error within a budget: a knapsack with several choices an item.

Items are tokens, or blocks of them. All functions take weights `[n]`, and for each precision, in an order in which bytes never fall,
the error of an item of weight 1 and the bytes of an item; they return the index of each item's precision, `[n]`, at
`budget` bytes or fewer in all. They raise InputError where even the cheapest precision is too much for that.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import numpy as np

from mlxkv.errors import InputError

Errors = Sequence[float]
Costs = Sequence[int]
Allocator = Callable[[np.ndarray, Errors, Costs, int], np.ndarray]


def greedy(weights: np.ndarray, errors: Errors, costs: Costs, budget: int) -> np.ndarray:
    """From the cheapest precision up, always the step that takes away most error a byte, while there is one that fits.

    Steps lead along the convex hull of (bytes, error), so the result is worse than the best by one step at most.
    """
    _check(weights, costs, budget)
    hull = _hull(errors, costs)
    levels = np.full(len(weights), hull[0])
    left = budget - len(weights) * costs[0]
    heap = [_step(weights, errors, costs, hull, item, 0) for item in range(len(weights)) if len(hull) > 1]
    heapq.heapify(heap)
    while heap:
        _, item, place = heapq.heappop(heap)
        price = costs[hull[place + 1]] - costs[hull[place]]
        if price > left:
            continue
        left -= price
        levels[item] = hull[place + 1]
        if place + 2 < len(hull):
            heapq.heappush(heap, _step(weights, errors, costs, hull, item, place + 1))
    return levels


def exact(weights: np.ndarray, errors: Errors, costs: Costs, budget: int) -> np.ndarray:
    """The best there is, by dynamic programming over bytes: O(n * precisions * budget / greatest common divisor)."""
    _check(weights, costs, budget)
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


def uniform(weights: np.ndarray, errors: Errors, costs: Costs, budget: int) -> np.ndarray:
    """One precision for all: the highest that fits."""
    _check(weights, costs, budget)
    return np.full(len(weights), max(level for level, cost in enumerate(costs) if len(weights) * cost <= budget))


def randomly(weights: np.ndarray, errors: Errors, costs: Costs, budget: int, seed: int = 0) -> np.ndarray:
    """The precisions of `greedy`, dealt out at random: what importance has to beat."""
    return np.random.default_rng(seed).permutation(greedy(weights, errors, costs, budget))


def by_position(weights: np.ndarray, errors: Errors, costs: Costs, budget: int, first: str = "early") -> np.ndarray:
    """The precisions of `greedy`, the high ones for the first items ("early") or for the last ("late")."""
    levels = np.sort(greedy(weights, errors, costs, budget))
    return levels if first == "late" else levels[::-1].copy()


def total_error(weights: np.ndarray, errors: Errors, levels: np.ndarray) -> float:
    """The weighted error of an allocation."""
    return float(weights @ np.asarray(errors)[levels])


def regret(levels: np.ndarray, future: np.ndarray, errors: Errors, costs: Costs, budget: int) -> float:
    """How much more error an allocation has than the oracle's: the exact one for the weights that came true, `[n]`."""
    oracle = exact(future, errors, costs, budget)
    return total_error(future, errors, levels) - total_error(future, errors, oracle)


def layer_shares(kind: str, layers: int, ratio: float = 2.0) -> np.ndarray:
    """How the budget is split over layers, `[layers]` with mean 1: "equal", or from the first layer falling to the last
    by the factor `ratio`, in equal differences ("linear") or in equal factors ("exponential")."""
    if kind == "equal":
        return np.ones(layers)
    shares = np.linspace(ratio, 1, layers) if kind == "linear" else np.geomspace(ratio, 1, layers)
    return shares / shares.mean()


def _check(weights: np.ndarray, costs: Costs, budget: int) -> None:
    if len(weights) * costs[0] > budget:
        raise InputError(f"{len(weights)} items of at least {costs[0]} bytes do not fit into {budget}")


def _hull(errors: Errors, costs: Costs) -> list[int]:
    """Precisions on the lower convex hull of (bytes, error), from the cheapest on."""
    hull = [_start(errors, costs)]
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


def _start(errors: Errors, costs: Costs) -> int:
    """The cheapest precision, and of several that cost the same the best."""
    return min(range(len(costs)), key=lambda level: (costs[level], errors[level]))


def _step(
    weights: np.ndarray, errors: Errors, costs: Costs, hull: list[int], item: int, place: int
) -> tuple[float, int, int]:
    here, there = hull[place], hull[place + 1]
    return float(weights[item]) * (errors[there] - errors[here]) / (costs[there] - costs[here]), item, place

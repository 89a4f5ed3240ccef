import json
from functools import cache
from itertools import pairwise

import numpy as np
import pytest

from mlxkv.codec.stages.plan import CODED_TYPES, GROUP_SIZES, Group, Plan, Run, allocate_bits, cost
from mlxkv.errors import FormatError

MIXED = Plan(
    (Group(16, "fp8"), Group(1, "int4"), Group(1, "int4"), Group(7, "none"), Group(1, "int4"), Group(64, "int2"))
)


@pytest.mark.parametrize(
    ("size", "kind"),
    [
        (0, "none"),
        (-1, "none"),
        (0, "int2"),
        (2, "int2"),
        (17, "fp8"),
        (2048, "int4"),
        (16, "int8"),
        (16, ""),
        (1, None),
    ],
)
def test_an_impossible_group_is_refused(size, kind):
    with pytest.raises(FormatError, match="no such group"):
        Group(size, kind)


def test_only_uncoded_groups_may_have_any_size():
    assert Group(7, "none").bits == 0
    assert [Group(size, "int2").size for size in GROUP_SIZES] == [1, 16, 64, 256, 1024]


@pytest.mark.parametrize("size", GROUP_SIZES)
def test_a_group_costs_its_codes_and_32_bits(size):
    assert [Group(size, kind).bits for kind in CODED_TYPES] == [2 * size + 32, 4 * size + 32, 8 * size + 32]
    assert [cost(size, kind) for kind in ("none", *CODED_TYPES)] == [0, 2 * size + 32, 4 * size + 32, 8 * size + 32]


def test_a_plan_counts_components_and_bits():
    assert MIXED.rank == 16 + 2 + 7 + 1 + 64
    assert MIXED.bits == (16 * 8 + 32) + 3 * (4 + 32) + (64 * 2 + 32)
    assert (Plan().rank, Plan().bits, list(Plan().runs())) == (0, 0, [])


def test_runs_join_equal_neighbours_and_leave_out_what_is_not_coded():
    assert list(MIXED.runs()) == [
        Run(0, 1, 16, "fp8"),
        Run(16, 2, 1, "int4"),
        Run(25, 1, 1, "int4"),
        Run(26, 1, 64, "int2"),
    ]
    assert [run.stop for run in MIXED.runs()] == [16, 18, 26, 90]
    assert list(Plan((Group(1, "int2"), Group(1, "int4"), Group(16, "int4"))).runs()) == [
        Run(0, 1, 1, "int2"),
        Run(1, 1, 1, "int4"),
        Run(2, 1, 16, "int4"),
    ]


@pytest.mark.parametrize("plan", [MIXED, Plan(), Plan((Group(1024, "fp8"),))])
def test_a_plan_survives_json(plan):
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_the_json_of_a_plan_is_the_documented_one():
    assert Plan((Group(16, "int4"), Group(3, "none"))).to_json() == {
        "groups": [{"size": 16, "type": "int4"}, {"size": 3, "type": "none"}]
    }


@pytest.mark.parametrize(
    "group",
    [
        {"size": True, "type": "int4"},
        {"size": "16", "type": "int4"},
        {"size": 16.0, "type": "int4"},
        {"size": -1, "type": "none"},
        {"size": 0, "type": "none"},
        {"size": None, "type": "none"},
        {"size": 15, "type": "int4"},
        {"size": 10**30, "type": "int4"},
        {"size": 16, "type": "int3"},
        {"size": 16, "type": None},
        {"size": 16, "type": ["int4"]},
        {"size": 16},
        {"type": "int4"},
        [16, "int4"],
        None,
        3,
        "none",
    ],
)
def test_a_hostile_group_is_refused(group):
    with pytest.raises(FormatError):
        Plan.from_json({"groups": [group]})


@pytest.mark.parametrize(
    "data", [{}, {"groups": None}, {"groups": 3}, {"groups": "ab"}, {"groups": {"a": 1}}, [], None, "x"]
)
def test_a_hostile_plan_is_refused(data):
    with pytest.raises(FormatError):
        Plan.from_json(data)


def random_problem(seed, rank, sizes):
    random = np.random.default_rng(seed)
    energy = random.exponential(size=rank) * 0.8 ** np.arange(rank)
    errors = {}
    for size in sizes:
        for kind, share in zip(CODED_TYPES, (0.3, 0.05, 0.01)):
            whole = np.convolve(energy, np.ones(size), "valid")
            errors[size, kind] = whole * share * random.uniform(0.2, 1.8, len(whole))
    return energy, errors


def total_error(plan, energy, errors):
    start, total = 0, 0.0
    for group in plan.groups:
        if group.kind == "none":
            total += energy[start : start + group.size].sum()
        else:
            total += errors[group.size, group.kind][start]
        start += group.size
    return total + energy[start:].sum()


def brute_force(energy, errors, budget):
    """The least error over every sequence of groups within the budget, tried one by one."""
    options = [(1, "none"), *errors]

    def best(start, bits):
        if start == len(energy):
            return 0.0
        found = []
        for size, kind in options:
            if start + size <= len(energy) and cost(size, kind) <= bits:
                error = energy[start] if kind == "none" else errors[size, kind][start]
                found.append(error + remembered(start + size, bits - cost(size, kind)))
        return min(found)

    # Without memory for up to 6 components, where 4**6 sequences are few; with it for 18 and groups of 16.
    remembered = best if len(energy) <= 6 else cache(best)
    return best(0, budget)


@pytest.mark.parametrize("rank", [1, 2, 4, 6])
@pytest.mark.parametrize("budget", [0, 33, 34, 35, 40, 75, 100, 150, 240, 1000])
def test_the_programme_finds_what_brute_force_finds(rank, budget):
    for seed in range(3):
        energy, errors = random_problem(seed, rank, [1])
        plan = allocate_bits(energy, errors, budget)
        assert plan.bits <= budget
        assert total_error(plan, energy, errors) == pytest.approx(brute_force(energy, errors, budget), rel=1e-12)


@pytest.mark.parametrize("rank", [16, 17, 18])
@pytest.mark.parametrize("budget", [34, 63, 64, 96, 100, 135, 160, 200, 10**6])
def test_the_programme_finds_what_brute_force_finds_with_groups_of_sixteen(rank, budget):
    for seed in range(3):
        energy, errors = random_problem(seed, rank, [1, 16])
        plan = allocate_bits(energy, errors, budget)
        assert plan.bits <= budget
        assert total_error(plan, energy, errors) == pytest.approx(brute_force(energy, errors, budget), rel=1e-12)


def test_more_budget_never_costs_accuracy():
    energy, errors = random_problem(5, 90, [1, 16, 64])
    plans = [allocate_bits(energy, errors, budget) for budget in range(0, 800, 13)]
    found = [total_error(plan, energy, errors) for plan in plans]
    assert all(b <= a + 1e-12 for a, b in pairwise(found))
    assert found[-1] < found[0] / 5
    assert all(plan.bits <= budget for plan, budget in zip(plans, range(0, 800, 13)))


def test_groups_larger_than_the_rank_are_left_out():
    energy, errors = random_problem(0, 20, [1, 16])
    errors[64, "fp8"] = np.zeros(0)
    assert all(group.size < 64 for group in allocate_bits(energy, errors, 10**6).groups)


def test_too_small_a_budget_codes_nothing():
    energy, errors = random_problem(0, 20, [1, 16])
    assert allocate_bits(energy, errors, 33) == Plan()
    assert allocate_bits(energy, errors, 34).rank > 0


def test_uncoded_components_are_joined_and_left_off_at_the_end():
    energy = np.array([0.0, 0.0, 0.0, 9.0, 0.0, 0.0])
    errors = {(1, kind): np.zeros(6) for kind in CODED_TYPES}
    assert allocate_bits(energy, errors, 34) == Plan((Group(3, "none"), Group(1, "int2")))


def test_a_cheaper_group_with_less_error_wins():
    energy, errors = (
        np.ones(16),
        {(16, "int2"): np.array([0.5]), (16, "int4"): np.array([0.1]), (16, "fp8"): np.array([0.2])},
    )
    assert allocate_bits(energy, errors, 1000) == Plan((Group(16, "int4"),))
    assert allocate_bits(energy, errors, 95) == Plan((Group(16, "int2"),))

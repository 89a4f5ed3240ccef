"""Bit allocation: a plan assigns a type to each group of components, and a dynamic programme finds the best plan.

KVTC (arXiv 2511.01815, section 3): contiguous groups of 1, 16, 64, 256 or 1024 components, each of type none, int2, int4
or fp8; a coded group costs `bits * size + 32` bits per token. The programme finds the exact optimum over
(components covered, bits spent) for a given table of group errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np

from mlxkv.errors import FormatError
from mlxkv.kernels.groups import BITS, Run
from mlxkv.spec import is_int

GROUP_SIZES = (1, 16, 64, 256, 1024)
CODED_TYPES = ("int2", "int4", "fp8")
OVERHEAD_BITS = 32  # float16 shift (offset) and scale
MAX_RUNS = 4096  # of equal neighbouring groups in a plan from any source: each costs time in every block
_UNIT_BITS = 2  # of the dynamic programme: every cost is a multiple of two bits

ErrorTable = Mapping[tuple[int, str], np.ndarray]


@dataclass(frozen=True)
class Group:
    """Neighbouring components of one type.

    Parameters
    ----------
    size
        Number of components: 1, 16, 64, 256 or 1024, or any number for type "none".
    kind
        "none", "int2", "int4" or "fp8".

    Raises
    ------
    FormatError
        For another size or type.
    """

    size: int
    kind: str

    def __post_init__(self) -> None:
        if self.kind not in BITS or self.size < 1 or (self.kind != "none" and self.size not in GROUP_SIZES):
            shown = f"{self.size} x {self.kind}"[:80]
            raise FormatError(f"no such group: {shown}; sizes {GROUP_SIZES}, types {', '.join(BITS)}")

    @property
    def bits(self) -> int:
        """Bits per token, shift and scale included."""
        return cost(self.size, self.kind)


@dataclass(frozen=True)
class Plan:
    """Groups in the order of components. Components after the last group are not coded.

    Parameters
    ----------
    groups
        The groups.

    Raises
    ------
    FormatError
        When the groups change between more than 4,096 runs of equal ones.

    Examples
    --------
    >>> plan = Plan((Group(16, "int4"), Group(4, "none"), Group(1, "fp8")))
    >>> plan.rank, plan.bits
    (21, 136)
    """

    groups: tuple[Group, ...] = ()

    def __post_init__(self) -> None:
        if len(self._runs) > MAX_RUNS:
            raise FormatError(f"a plan of {len(self._runs)} runs of groups: there may be at most {MAX_RUNS}")

    @cached_property
    def rank(self) -> int:
        """Number of components covered."""
        return sum(group.size for group in self.groups)

    @cached_property
    def bits(self) -> int:
        """Bits per token before any lossless stage."""
        return sum(group.bits for group in self.groups)

    def runs(self) -> Iterator[Run]:
        """Return the coded groups, equal neighbours together.

        Returns
        -------
        Iterator[Run]
            First component, number of groups, their size and type.
        """
        return iter(self._runs)

    @cached_property
    def _runs(self) -> tuple[Run, ...]:
        """The coded runs."""
        runs, start = [], 0
        for (size, kind), equal in groupby(self.groups, key=lambda group: (group.size, group.kind)):
            count = len(list(equal))
            if kind != "none":
                runs.append(Run(start, count, size, kind))
            start += count * size
        return tuple(runs)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON values.

        Returns
        -------
        dict
            Sizes and types of the groups.
        """
        return {"groups": [{"size": group.size, "type": group.kind} for group in self.groups]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Return the inverse of `to_json`.

        Parameters
        ----------
        data
            Output of `to_json`, from any source.

        Returns
        -------
        Plan
            The plan.

        Raises
        ------
        FormatError
            For anything that is not a plan.
        """
        try:
            return cls(tuple(Group(_int(group["size"]), group["type"]) for group in data["groups"]))
        except (KeyError, TypeError) as error:
            raise FormatError(f"not a bit plan: {repr(error)[:200]}") from None


def cost(size: int, kind: str) -> int:
    """Return the bits per token that one group costs.

    Parameters
    ----------
    size
        Number of components.
    kind
        "none", "int2", "int4" or "fp8".

    Returns
    -------
    int
        Bits, shift and scale included.

    Examples
    --------
    >>> cost(64, "int2")
    160
    """
    return 0 if kind == "none" else BITS[kind] * size + OVERHEAD_BITS


def allocate_bits(energy: np.ndarray, errors: ErrorTable, budget: int) -> Plan:
    """Return the plan with the least squared error within a budget.

    Parameters
    ----------
    energy
        Squared error `[r]` of leaving each component out.
    errors
        Squared error of coding a group, by (size, type): `[r - size + 1]`, indexed by the group's first component.
    budget
        Bits per token.

    Returns
    -------
    Plan
        The best plan; empty when the budget codes nothing.

    Notes
    -----
    `best[i, b]` is the least error of the first i components in b units of two bits, and `choice[i, b]` the last group of
    that solution. Only the rows of `best` that the largest group can reach back to are kept.
    """
    rank = len(energy)
    options = [(1, "none"), *((size, kind) for size, kind in errors if size <= rank)]
    units = min(budget, rank * max(cost(1, kind) for kind in CODED_TYPES)) // _UNIT_BITS
    ring = max(size for size, _ in options) + 1  # no group reaches further back
    best = np.zeros((ring, units + 1))
    choice = np.zeros((rank + 1, units + 1), dtype=np.uint8)
    for i in range(1, rank + 1):
        row, chosen = best[i % ring], choice[i]
        np.add(best[(i - 1) % ring], energy[i - 1], out=row)
        for index, (size, kind) in enumerate(options[1:], start=1):
            price = cost(size, kind) // _UNIT_BITS
            if size > i or price > units:
                continue
            candidate = best[(i - size) % ring, : units + 1 - price] + errors[size, kind][i - size]
            better = candidate < row[price:]
            np.copyto(row[price:], candidate, where=better)
            chosen[price:][better] = index
    return _trace_back(options, choice)


def _trace_back(options: list[tuple[int, str]], choice: np.ndarray) -> Plan:
    """Follow the choices from the last component to the first."""
    i, spent = choice.shape[0] - 1, choice.shape[1] - 1
    groups = []
    while i:
        size, kind = options[choice[i, spent]]
        groups.append(Group(size, kind))
        i, spent = i - size, spent - cost(size, kind) // _UNIT_BITS
    groups.reverse()
    while groups and groups[-1].kind == "none":
        groups.pop()
    return Plan(tuple(_merge_skipped(groups)))


def _merge_skipped(groups: list[Group]) -> Iterator[Group]:
    """Yield groups with neighbours of type "none" merged."""
    for kind, equal in groupby(groups, key=lambda group: group.kind):
        if kind == "none":
            yield Group(sum(group.size for group in equal), kind)
        else:
            yield from equal


def _int(value: Any) -> int:
    """Check that a value read from a file is a whole number and return it."""
    if not is_int(value):
        raise TypeError(f"expected a whole number, got {value!r}")
    return value

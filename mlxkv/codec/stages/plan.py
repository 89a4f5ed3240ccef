"""Which components are coded how: the plan, and the dynamic programme that finds the best one.

KVTC's allocation (arXiv 2511.01815, section 3): contiguous groups of 1, 16, 64, 256 or 1024 components, each
none, int2, int4 or fp8; a coded group costs `bits * size + 32` bits a token. The programme is exact over
(components covered, bits spent) for a given table of group errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from mlxkv.config import is_int
from mlxkv.errors import FormatError
from mlxkv.kernels.groups import BITS, Run

SIZES = (1, 16, 64, 256, 1024)
CODED = ("int2", "int4", "fp8")
OVERHEAD_BITS = 32  # shift and scale
_UNIT = 2  # every cost is a multiple of two bits

ErrorTable = Mapping[tuple[int, str], np.ndarray]


@dataclass(frozen=True)
class Group:
    """`size` neighbouring components, coded as `kind`. Only a "none" group may have any size."""

    size: int
    kind: str

    def __post_init__(self) -> None:
        if self.kind not in BITS or self.size < 1 or (self.kind != "none" and self.size not in SIZES):
            raise FormatError(f"no such group: {self.size} x {self.kind}; sizes {SIZES}, types {', '.join(BITS)}")

    @property
    def bits(self) -> int:
        """Bits a token, shift and scale included."""
        return cost(self.size, self.kind)


@dataclass(frozen=True)
class Plan:
    """The groups in order of components. Components behind the last group are not coded."""

    groups: tuple[Group, ...] = ()

    @property
    def rank(self) -> int:
        """Components covered."""
        return sum(group.size for group in self.groups)

    @property
    def bits(self) -> int:
        """Bits a token before any lossless stage."""
        return sum(group.bits for group in self.groups)

    def runs(self) -> Iterator[Run]:
        """The coded groups, equal neighbours together."""
        start = 0
        for (size, kind), equal in groupby(self.groups, key=lambda group: (group.size, group.kind)):
            count = len(list(equal))
            if kind != "none":
                yield Run(start, count, size, kind)
            start += count * size

    def to_json(self) -> dict[str, Any]:
        return {"groups": [{"size": group.size, "type": group.kind} for group in self.groups]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of `to_json`. Raises FormatError for anything that is not a plan."""
        try:
            return cls(tuple(Group(_int(group["size"]), group["type"]) for group in data["groups"]))
        except (KeyError, TypeError) as error:
            raise FormatError(f"not a bit plan: {error!r}") from None


def cost(size: int, kind: str) -> int:
    """Bits a token for one group."""
    return 0 if kind == "none" else BITS[kind] * size + OVERHEAD_BITS


def allocate(energy: np.ndarray, errors: ErrorTable, budget: int) -> Plan:
    """The plan of least squared error within `budget` bits a token.

    energy `[r]`: squared error of leaving a component out. errors: for (size, kind) the squared error of coding
    the group that starts at each component, `[r - size + 1]`.

    best[i, b] is the least error of components 0..i in b units of two bits; `choice` keeps the last group taken.
    Only the rows that the largest group can reach back to are kept.
    """
    rank = len(energy)
    options = [(1, "none"), *((size, kind) for size, kind in errors if size <= rank)]
    units = min(budget, rank * max(cost(1, kind) for kind in CODED)) // _UNIT
    ring = max(size for size, _ in options) + 1  # no group reaches further back
    best = np.zeros((ring, units + 1))
    choice = np.zeros((rank + 1, units + 1), dtype=np.uint8)
    for i in range(1, rank + 1):
        row, chosen = best[i % ring], choice[i]
        np.add(best[(i - 1) % ring], energy[i - 1], out=row)
        for index, (size, kind) in enumerate(options[1:], start=1):
            spent = cost(size, kind) // _UNIT
            if size > i or spent > units:
                continue
            candidate = best[(i - size) % ring, : units + 1 - spent] + errors[size, kind][i - size]
            better = candidate < row[spent:]
            np.copyto(row[spent:], candidate, where=better)
            chosen[spent:][better] = index
    return _trace_back(options, choice)


def _trace_back(options: list[tuple[int, str]], choice: np.ndarray) -> Plan:
    i, spent = choice.shape[0] - 1, choice.shape[1] - 1
    groups = []
    while i:
        size, kind = options[choice[i, spent]]
        groups.append(Group(size, kind))
        i, spent = i - size, spent - cost(size, kind) // _UNIT
    groups.reverse()
    while groups and groups[-1].kind == "none":
        groups.pop()
    return Plan(tuple(_merge_skipped(groups)))


def _merge_skipped(groups: list[Group]) -> Iterator[Group]:
    for kind, equal in groupby(groups, key=lambda group: group.kind):
        if kind == "none":
            yield Group(sum(group.size for group in equal), kind)
        else:
            yield from equal


def _int(value: Any) -> int:
    if not is_int(value):
        raise TypeError(f"expected a whole number, got {value!r}")
    return value

"""A basis in few bytes: what an entry's rounding costs grows with its component's spread, so all cost alike.

Entries times their component's spread have one step (reverse water-filling): weak components are left with small integers,
which DEFLATE makes short, and the weakest are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

from mlxkv.codec.stages.pca import principal_components
from mlxkv.errors import FormatError, InputError
from mlxkv.io import lossless

TYPES = {"codes": "uint8", "scale": "float32", "spread": "float32"}
STRONG_ENERGY_SHARE = 0.9  # of the rows' energy: components that weak ones must not take up
MAX_ENTRY = 127 * 256 + 127
LENGTH_BYTES = 4  # bytes that say how many the integers are
_SAMPLED = 256  # components whose bytes stand for all
_STEP_FACTOR = 2 ** (1 / 16)


@dataclass(frozen=True)
class Basis:
    """Components of rows `[n, p]`, strongest first, as integers.

    codes: `[bytes]` uint8; a little-endian count of bytes, and these in DEFLATE: the low byte of each integer `[rank, p]`,
    signed, then of the first components the high byte, signed. scale: `[rank]` float32, of a component's integers. spread:
    `[rank]` float32, the standard deviation that each coefficient had.
    """

    codes: np.ndarray
    scale: np.ndarray
    spread: np.ndarray
    width: int

    def __post_init__(self) -> None:
        parts = {name: getattr(self, name) for name in TYPES}
        if {name: str(part.dtype) for name, part in parts.items()} != TYPES:
            raise FormatError(f"a basis has the types {TYPES}, not {[str(part.dtype) for part in parts.values()]}")
        if any(part.ndim != 1 for part in parts.values()) or self.scale.shape != self.spread.shape:
            raise FormatError(f"these are no parts of one basis: {[part.shape for part in parts.values()]}")
        if not (np.isfinite(self.scale).all() and np.isfinite(self.spread).all()):
            raise FormatError("a basis has NaN or infinite scales")
        least = self.rank * self.width
        if not least <= self._size <= 2 * least or (self.width and self._size % self.width):
            raise FormatError(f"{self._size} bytes are no integers of {self.rank} components {self.width} wide")

    @property
    def rank(self) -> int:
        """Components."""
        return self.spread.size

    @property
    def _size(self) -> int:
        return int.from_bytes(self.codes[:LENGTH_BYTES].tobytes(), "little")

    @cached_property
    def matrix(self) -> mx.array:
        """`[rank, p]` float32. Raises FormatError for codes that do not inflate."""
        planes = np.frombuffer(lossless.decode("deflate", self.codes[LENGTH_BYTES:].tobytes(), self._size), np.int8)
        low, high = (part.reshape(-1, self.width) for part in np.split(planes, [self.rank * self.width]))
        entries = low.astype(np.float32)
        entries[: len(high)] += 256 * high.astype(np.float32)
        return mx.array(entries * self.scale[:, None])

    @cached_property
    def _strong(self) -> int:
        energy = np.cumsum(np.square(self.spread))
        return int(np.searchsorted(energy, STRONG_ENERGY_SHARE * energy[-1])) + 1

    def rank_above(self, least: float) -> int:
        """How many components there are before all others spread less than `least`."""
        return int(np.flatnonzero(np.r_[np.inf, self.spread] >= least)[-1])

    def project(self, rows: mx.array, count: int, refined: bool = False) -> mx.array:
        """Coefficients `[n, count]` of the strongest components of rows `[n, p]`. refined: also make up for what rounding
        the components did, at three times the cost."""
        coefficients = self._projected(rows, count)
        return coefficients + self._projected(rows - self.rows(coefficients), count) if refined else coefficients

    def _projected(self, rows: mx.array, count: int) -> mx.array:
        first, others = self.matrix[: self._strong], self.matrix[self._strong : count]
        if count <= self._strong:
            return rows @ first[:count].T
        coefficients = rows @ first.T
        # Rounded weak components are not quite orthogonal to strong ones, which would leak into them.
        return mx.concatenate([coefficients, (rows - coefficients @ first) @ others.T], axis=1)

    def rows(self, coefficients: mx.array) -> mx.array:
        """Rows `[n, p]` of coefficients `[n, count]` of the strongest components."""
        return coefficients @ self.matrix[: coefficients.shape[1]]


def learn_basis(rows: np.ndarray, step: float, budget: int | None, seed: int) -> Basis:
    """The basis of rows `[N, p]`, centred in place; step: of its entries times their spreads, longer where the basis would
    else be of more than `budget` bytes.

    Raises InputError for a budget that not even one component fits in.
    """
    _, components = principal_components(rows, rows.shape[1], seed)
    spread = np.sqrt(np.square(rows @ components, dtype=np.float64).mean(axis=0)).astype(np.float32)
    entries = components.T * spread[:, None]
    if budget is not None:
        step = _step_within_budget(entries, step, budget)
    found = _round_to_step(entries, spread, step)
    while budget is not None and _stored_bytes(found) > budget:
        if found.rank == 1:
            raise InputError(f"{budget} bytes hold no component of {rows.shape[1]} entries: raise basis_bytes")
        step *= _STEP_FACTOR
        found = _round_to_step(entries, spread, step)
    return found


def _step_within_budget(entries: np.ndarray, step: float, budget: int) -> float:
    """The shortest step from `step` on within the budget, by the bytes of some components."""
    sample = entries[:: max(1, len(entries) // _SAMPLED)]
    spread = np.ones(len(sample), np.float32)
    low, high = step, 2 * float(np.abs(entries).max())
    while high > low * _STEP_FACTOR:
        step = float(np.sqrt(low * high))
        fits = _stored_bytes(_round_to_step(sample, spread, step)) * len(entries) / len(sample) <= budget
        low, high = (low, step) if fits else (step, high)
    return low


def _round_to_step(entries: np.ndarray, spread: np.ndarray, step: float) -> Basis:
    """entries: `[rank, p]` components times their spreads."""
    steps = np.maximum(step, np.abs(entries).max(axis=1, initial=0) / MAX_ENTRY)
    integers = np.rint(entries / steps[:, None]).astype(np.int16)
    wide = int(np.flatnonzero(np.r_[True, (np.abs(integers) > 127).any(axis=1)])[-1])
    # Weaker components would be mostly the rounding's own noise, which takes up what belongs to others.
    told = np.square(integers, dtype=np.float32).mean(axis=1) >= 1
    rank = max(1, wide, int(np.flatnonzero(np.r_[True, told])[-1]))
    low = integers[:rank].astype(np.int8)
    high = (integers[:wide] - low[:wide]) // 256
    data = low.tobytes() + high.astype(np.int8).tobytes()
    codes = len(data).to_bytes(LENGTH_BYTES, "little") + lossless.encode("deflate", data)
    scale = steps[:rank] / np.maximum(spread[:rank], np.finfo(np.float32).tiny)
    return Basis(np.frombuffer(codes, np.uint8), scale.astype(np.float32), spread[:rank], entries.shape[1])


def _stored_bytes(basis: Basis) -> int:
    return basis.codes.nbytes + basis.scale.nbytes + basis.spread.nbytes

"""A basis in few bytes: the error that an entry's rounding causes grows with its component's spread, so entries are scaled by it.

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

_TYPES = {"codes": "uint8", "scale": "float32", "spread": "float32"}
STRONG_ENERGY_SHARE = 0.9  # of the rows' energy is in the strong components, which weak ones must not leak into
MAX_ENTRY = 127 * 256 + 127  # largest integer of two signed bytes
LENGTH_BYTES = 4  # of the count that the codes begin with
_SAMPLED_COMPONENTS = 256  # whose bytes stand for those of all
_STEP_FACTOR = 2 ** (1 / 16)  # between steps that are tried


@dataclass(frozen=True)
class Basis:
    """Components of rows `[n, p]`, strongest first, stored as integers.

    Parameters
    ----------
    codes
        `[bytes]` uint8: a little-endian count of bytes, and these in DEFLATE. First the low byte of each integer
        `[rank, p]`, signed, then the high byte of the first components' integers, signed.
    scale
        Factor `[rank]` float32 of each component's integers.
    spread
        Standard deviation `[rank]` float32 of each coefficient in calibration.
    width
        Width p of the rows.

    Raises
    ------
    FormatError
        When the parts are not of one basis.
    """

    codes: np.ndarray
    scale: np.ndarray
    spread: np.ndarray
    width: int

    def __post_init__(self) -> None:
        parts = {name: getattr(self, name) for name in _TYPES}
        if {name: str(part.dtype) for name, part in parts.items()} != _TYPES:
            raise FormatError(f"a basis has the types {_TYPES}, not {[str(part.dtype) for part in parts.values()]}")
        if any(part.ndim != 1 for part in parts.values()) or self.scale.shape != self.spread.shape:
            raise FormatError(f"these are no parts of one basis: {[part.shape for part in parts.values()]}")
        if not (np.isfinite(self.scale).all() and np.isfinite(self.spread).all()):
            raise FormatError("a basis has NaN or infinite scales")
        least = self.rank * self.width
        if not least <= self._byte_count <= 2 * least or (self.width and self._byte_count % self.width):
            raise FormatError(f"{self._byte_count} bytes are no integers of {self.rank} components {self.width} wide")

    @property
    def rank(self) -> int:
        """Number of components."""
        return self.spread.size

    @property
    def _byte_count(self) -> int:
        """Bytes of the integers before DEFLATE."""
        return int.from_bytes(self.codes[:LENGTH_BYTES].tobytes(), "little")

    @cached_property
    def matrix(self) -> mx.array:
        """Components `[rank, p]` float32. Raises FormatError for codes that do not inflate."""
        planes = np.frombuffer(
            lossless.decode("deflate", self.codes[LENGTH_BYTES:].tobytes(), self._byte_count), np.int8
        )
        low, high = (part.reshape(-1, self.width) for part in np.split(planes, [self.rank * self.width]))
        entries = low.astype(np.float32)
        entries[: len(high)] += 256 * high.astype(np.float32)
        return mx.array(entries * self.scale[:, None])

    @cached_property
    def _strong_count(self) -> int:
        """Number of the components that hold most of the energy."""
        energy = np.cumsum(np.square(self.spread))
        return int(np.searchsorted(energy, STRONG_ENERGY_SHARE * energy[-1])) + 1

    def rank_above(self, least: float) -> int:
        """Return how many components there are before all others spread less than a bound.

        Parameters
        ----------
        least
            Standard deviation of a coefficient.

        Returns
        -------
        int
            Number of components, 0 to `rank`.
        """
        return int(np.flatnonzero(np.r_[np.inf, self.spread] >= least)[-1])

    def project(self, rows: mx.array, count: int, refine: bool = False) -> mx.array:
        """Return the coefficients of rows.

        Parameters
        ----------
        rows
            Centred rows `[n, p]` float32.
        count
            Number of components, the strongest ones.
        refine
            Also correct for the rounding of the components, at three times the cost.

        Returns
        -------
        mx.array
            Coefficients `[n, count]` float32.
        """
        coefficients = self._project_once(rows, count)
        return (
            coefficients + self._project_once(rows - self.reconstruct(coefficients), count) if refine else coefficients
        )

    def _project_once(self, rows: mx.array, count: int) -> mx.array:
        """Return coefficients `[n, count]` as if the rounded components were orthonormal."""
        first, others = self.matrix[: self._strong_count], self.matrix[self._strong_count : count]
        if count <= self._strong_count:
            return rows @ first[:count].T
        coefficients = rows @ first.T
        # Rounded weak components are not quite orthogonal to strong ones, which would leak into them.
        return mx.concatenate([coefficients, (rows - coefficients @ first) @ others.T], axis=1)

    def reconstruct(self, coefficients: mx.array) -> mx.array:
        """Return the rows that coefficients stand for.

        Parameters
        ----------
        coefficients
            Coefficients `[n, count]` of the strongest components.

        Returns
        -------
        mx.array
            Centred rows `[n, p]` float32.
        """
        return coefficients @ self.matrix[: coefficients.shape[1]]


def learn_basis(rows: np.ndarray, step: float, budget: int | None, seed: int) -> Basis:
    """Return the basis of rows, which are centred in place.

    Parameters
    ----------
    rows
        Rows `[N, p]` float32.
    step
        Step of the entries times their spreads; longer where the basis would otherwise exceed the budget.
    budget
        Bytes of the basis, at most; None for no bound.
    seed
        Seed of the principal components.

    Returns
    -------
    Basis
        The rounded basis.

    Raises
    ------
    InputError
        For a budget that not even one component fits in.
    """
    _, components = principal_components(rows, rows.shape[1], seed)
    spread = np.sqrt(np.square(rows @ components, dtype=np.float64).mean(axis=0)).astype(np.float32)
    entries = components.T * spread[:, None]
    if budget is not None:
        step = _step_within_budget(entries, step, budget)
    basis = _round_to_step(entries, spread, step)
    while budget is not None and _stored_bytes(basis) > budget:
        if basis.rank == 1:
            raise InputError(f"{budget} bytes hold no component of {rows.shape[1]} entries: raise basis_bytes")
        step *= _STEP_FACTOR
        basis = _round_to_step(entries, spread, step)
    return basis


def _step_within_budget(entries: np.ndarray, step: float, budget: int) -> float:
    """Return the shortest step from `step` on within the budget, estimated from the bytes of some components."""
    sample = entries[:: max(1, len(entries) // _SAMPLED_COMPONENTS)]
    spread = np.ones(len(sample), np.float32)
    low, high = step, 2 * float(np.abs(entries).max())
    while high > low * _STEP_FACTOR:
        step = float(np.sqrt(low * high))
        fits = _stored_bytes(_round_to_step(sample, spread, step)) * len(entries) / len(sample) <= budget
        low, high = (low, step) if fits else (step, high)
    return low


def _round_to_step(entries: np.ndarray, spread: np.ndarray, step: float) -> Basis:
    """Round entries `[rank, p]`, which are components times their spreads."""
    steps = np.maximum(step, np.abs(entries).max(axis=1, initial=0) / MAX_ENTRY)
    integers = np.rint(entries / steps[:, None]).astype(np.int16)
    wide = int(np.flatnonzero(np.r_[True, (np.abs(integers) > 127).any(axis=1)])[-1])
    # Weaker components would be mostly the rounding's own noise, which takes up what belongs to others.
    informative = np.square(integers, dtype=np.float32).mean(axis=1) >= 1
    rank = max(1, wide, int(np.flatnonzero(np.r_[True, informative])[-1]))
    low = integers[:rank].astype(np.int8)
    high = (integers[:wide] - low[:wide]) // 256
    data = low.tobytes() + high.astype(np.int8).tobytes()
    codes = len(data).to_bytes(LENGTH_BYTES, "little") + lossless.encode("deflate", data)
    scale = steps[:rank] / np.maximum(spread[:rank], np.finfo(np.float32).tiny)
    return Basis(np.frombuffer(codes, np.uint8), scale.astype(np.float32), spread[:rank], entries.shape[1])


def _stored_bytes(basis: Basis) -> int:
    """Return the bytes of a basis in the artifacts."""
    return basis.codes.nbytes + basis.scale.nbytes + basis.spread.nbytes

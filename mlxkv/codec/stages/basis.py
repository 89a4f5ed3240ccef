"""Principal components stored in few bytes, as integers.

The spread of a component is the standard deviation of its coefficients. Rounding an entry of a component causes an error in
proportion to that spread, so entries are multiplied by the spread and then rounded with one step for all components (reverse
water-filling). Weak components become small integers, which DEFLATE compresses well, and the weakest are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

from mlxkv.codec.stages import shrinkage
from mlxkv.codec.stages.pca import components_of_centred, principal_components
from mlxkv.errors import FormatError, InputError
from mlxkv.io import lossless
from mlxkv.io.inputs import FREE_BYTES, MAX_RATIO

_TYPES = {"codes": "uint8", "scale": "float32", "spread": "float32"}
STRONG_ENERGY_SHARE = 0.9  # share of the rows' energy in the strong components, which weak ones must not leak into
MAX_ENTRY = 127 * 256 + 127  # largest integer of two signed bytes
LENGTH_BYTES = 4  # of the byte count at the beginning of the codes
_SAMPLED_COMPONENTS = 256  # from whose size that of all components is estimated
_STEP_FACTOR = 2 ** (1 / 16)  # ratio of successive steps tried to fit the budget


@dataclass(frozen=True)
class Basis:
    """Components of rows `[n, p]`, strongest first, stored as integers.

    Parameters
    ----------
    codes
        `[bytes]` uint8: a little-endian byte count, then that many bytes compressed by DEFLATE. These are the signed low
        bytes of all integers `[rank, p]`, then the signed high bytes of the leading components, which need two bytes.
    scale
        Factor `[rank]` float32 by which each component's integers are multiplied.
    spread
        Standard deviation `[rank]` float32 of each component's coefficients in calibration.
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
        if not (np.isfinite(self.scale).all() and np.isfinite(self.spread).all() and (self.spread >= 0).all()):
            raise FormatError("a basis has NaN or infinite scales, or negative spreads")
        least = self.rank * self.width
        if not least <= self._byte_count <= 2 * least or (self.width and self._byte_count % self.width):
            raise FormatError(f"{self._byte_count} bytes are no integers of {self.rank} components {self.width} wide")
        if 4 * least > max(FREE_BYTES, MAX_RATIO * self.codes.nbytes):
            raise FormatError(f"a basis of {self.codes.nbytes} bytes is not one of {self.rank} x {self.width} numbers")

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
        """Components `[rank, p]` float32. Raises FormatError for codes that do not inflate to finite ones."""
        planes = np.frombuffer(
            lossless.decode("deflate", self.codes[LENGTH_BYTES:].tobytes(), self._byte_count), np.int8
        )
        low, high = (part.reshape(-1, self.width) for part in np.split(planes, [self.rank * self.width]))
        entries = low.astype(np.float32)
        entries[: len(high)] += 256 * high.astype(np.float32)
        with np.errstate(over="ignore"):
            entries *= self.scale[:, None]
        if not np.isfinite(entries).all():
            raise FormatError("a basis has infinite components: calibrate again")
        return mx.array(entries)

    @cached_property
    def _strong_count(self) -> int:
        """Number of leading components that hold STRONG_ENERGY_SHARE of the energy."""
        energy = np.cumsum(np.square(self.spread))
        return int(np.searchsorted(energy, STRONG_ENERGY_SHARE * energy[-1])) + 1

    def rank_above(self, least: float) -> int:
        """Count the leading components until all later ones have a smaller standard deviation than the bound.

        Parameters
        ----------
        least
            Bound on the standard deviation of a component's coefficients.

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
            Number of components to use, strongest first.
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
        """Return coefficients `[n, count]`, treating the rounded components as orthonormal."""
        first, others = self.matrix[: self._strong_count], self.matrix[self._strong_count : count]
        if count <= self._strong_count:
            return rows @ first[:count].T
        coefficients = rows @ first.T
        # Rounded weak components are not quite orthogonal to strong ones, so project what the strong ones leave.
        return mx.concatenate([coefficients, (rows - coefficients @ first) @ others.T], axis=1)

    def reconstruct(self, coefficients: mx.array) -> mx.array:
        """Return the rows that coefficients represent.

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


def learn_basis(
    rows: np.ndarray, step: float, budget: int | None, seed: int, dim: int | None = None, share: float = 0.0
) -> Basis:
    """Learn the basis of rows, which are centred in place.

    Parameters
    ----------
    rows
        Rows `[N, p]` float32.
    step
        Rounding step of entries times spreads; increased where the basis would otherwise exceed the budget.
    budget
        Most bytes of the basis; None for no bound.
    seed
        Seed of the principal components.
    dim, share
        Width of a head, and the share of the heads' own covariance in that of rows (`mlxkv.codec.stages.shrinkage`). With
        no share, rows have no components beyond their own span.

    Returns
    -------
    Basis
        The rounded basis.

    Raises
    ------
    InputError
        For a budget too small for one component.
    """
    if dim and share:
        rows -= rows.mean(axis=0, dtype=np.float64).astype(np.float32)
        weight = (1 - share) / len(rows)
        rows = np.concatenate([rows, shrinkage.head_rows(rows, dim, share)])
        components = components_of_centred(rows, min(rows.shape), seed)
    else:
        weight = 1 / len(rows)
        _, components = principal_components(rows, rows.shape[1], seed)
    spread = np.sqrt(np.square(rows @ components, dtype=np.float64).sum(axis=0) * weight).astype(np.float32)
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
    """Return the smallest step, at least `step`, that fits the budget, estimated from some of the components."""
    sample = entries[:: max(1, len(entries) // _SAMPLED_COMPONENTS)]
    spread = np.ones(len(sample), np.float32)
    low, high = step, 2 * float(np.abs(entries).max())
    while high > low * _STEP_FACTOR:
        step = float(np.sqrt(low * high))
        fits = _stored_bytes(_round_to_step(sample, spread, step)) * len(entries) / len(sample) <= budget
        low, high = (low, step) if fits else (step, high)
    return low


def _round_to_step(entries: np.ndarray, spread: np.ndarray, step: float) -> Basis:
    """Make a basis from entries `[rank, p]`, which are components times their spreads, by rounding."""
    steps = np.maximum(step, np.abs(entries).max(axis=1, initial=0) / MAX_ENTRY)
    integers = np.rint(entries / steps[:, None]).astype(np.int16)
    wide = int(np.flatnonzero(np.r_[True, (np.abs(integers) > 127).any(axis=1)])[-1])
    # Weaker components would be mostly rounding noise, which overlaps with the other components.
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

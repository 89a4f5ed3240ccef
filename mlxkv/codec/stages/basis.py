"""Principal components stored in few bytes, as integers.

The spread of a component is the standard deviation of its coefficients. Rounding an entry of a component causes an error in
proportion to that spread, so entries are multiplied by the spread and then rounded with one step for all components (reverse
water-filling). Weak components become small integers, which DEFLATE compresses well, and the weakest are dropped.

From fewer tokens than directions only some components are learnt of whole rows, and the directions of each head code what these
leave. So there are more components than dims, and no direction is lost because no token took it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

from mlxkv.codec.stages.dead_zone import dequantize, quantize
from mlxkv.codec.stages.pca import leading_components, principal_components
from mlxkv.codec.stages.shrinkage import head_directions, head_products
from mlxkv.errors import FormatError, InputError
from mlxkv.io import lossless
from mlxkv.io.inputs import FREE_BYTES, MAX_RATIO

_TYPES = {"codes": "uint8", "scale": "float32", "spread": "float32"}
STRONG_ENERGY_SHARE = 0.9  # share of the rows' energy in the strong components, which weak ones must not leak into
MAX_ENTRY = 127 * 256 + 127  # largest integer of two signed bytes
TOKENS_A_COMPONENT = 3  # at least, of rows fewer than their dims
HEAD_ENTRY = 127  # integer of the largest entry of a head's direction
CHUNK_ROWS = 4_096  # that are worked on at a time where there are many
LENGTH_BYTES = 4  # of the byte count at the beginning of the codes
_SAMPLED_COMPONENTS = 256  # from whose size that of all components is estimated
_STEP_FACTOR = 2 ** (1 / 16)  # ratio of successive steps tried to fit the budget


@dataclass(frozen=True)
class Basis:
    """Components of rows `[n, p]`, strongest first, stored as integers.

    More than p of them are the components of whole rows and, after them, p of single heads, head by head, which code what the
    decoded ones of whole rows leave.

    Parameters
    ----------
    codes
        `[bytes]` uint8: a little-endian byte count, then that many bytes compressed by DEFLATE. These are the signed low
        bytes of all integers `[rank, p]`, then the signed high bytes of the leading components, which need two bytes. Those of
        heads are one byte each, `[p, dim]`, after all others.
    scale
        Factor `[rank]` float32 by which each component's integers are multiplied.
    spread
        Standard deviation `[rank]` float32 of each component's coefficients in calibration.
    width
        Width p of the rows.
    dim
        Width of a head, for components of heads.

    Raises
    ------
    FormatError
        When the parts are not of one basis.
    """

    codes: np.ndarray
    scale: np.ndarray
    spread: np.ndarray
    width: int
    dim: int = 1

    def __post_init__(self) -> None:
        parts = {name: getattr(self, name) for name in _TYPES}
        if {name: str(part.dtype) for name, part in parts.items()} != _TYPES:
            raise FormatError(f"a basis has the types {_TYPES}, not {[str(part.dtype) for part in parts.values()]}")
        if any(part.ndim != 1 for part in parts.values()) or self.scale.shape != self.spread.shape:
            raise FormatError(f"these are no parts of one basis: {[part.shape for part in parts.values()]}")
        if not (np.isfinite(self.scale).all() and np.isfinite(self.spread).all() and (self.spread >= 0).all()):
            raise FormatError("a basis has NaN or infinite scales, or negative spreads")
        whole, heads = self.whole * self.width, self._head_bytes
        if not whole <= self._byte_count - heads <= 2 * whole or (self.width and self._byte_count % self.width):
            raise FormatError(f"{self._byte_count} bytes are no integers of {self.rank} components {self.width} wide")
        if 4 * (whole + heads) > max(FREE_BYTES, MAX_RATIO * self.codes.nbytes):
            raise FormatError(f"a basis of {self.codes.nbytes} bytes is not one of {self.rank} x {self.width} numbers")

    @property
    def rank(self) -> int:
        """Number of components."""
        return self.spread.size

    @property
    def whole(self) -> int:
        """Number of components of whole rows; all but where there are more than dims."""
        return self.rank - self.width if self.rank > self.width else self.rank

    @property
    def _head_bytes(self) -> int:
        """Bytes of the components of heads before DEFLATE."""
        return self.width * self.dim if self.rank > self.width else 0

    @property
    def _byte_count(self) -> int:
        """Bytes of the integers before DEFLATE."""
        return int.from_bytes(self.codes[:LENGTH_BYTES].tobytes(), "little")

    @property
    def matrix(self) -> mx.array:
        """Components of whole rows `[whole, p]` float32. Raises FormatError for codes that do not inflate to finite ones."""
        return self._parts[0]

    @property
    def heads(self) -> mx.array:
        """Components of heads `[p / dim, dim, dim]` float32, a row each; none where there are no more than p components."""
        return self._parts[1]

    @cached_property
    def _parts(self) -> tuple[mx.array, mx.array]:
        """Components of whole rows and of heads."""
        planes = np.frombuffer(
            lossless.decode("deflate", self.codes[LENGTH_BYTES:].tobytes(), self._byte_count), np.int8
        )
        sizes = [self.whole * self.width, self._byte_count - self._head_bytes]
        low, high, heads = (part.astype(np.float32) for part in np.split(planes, sizes))
        low[: high.size] += 256 * high
        with np.errstate(over="ignore"):
            parts = (
                low.reshape(self.whole, self.width) * self.scale[: self.whole, None],
                heads.reshape(-1, self.dim) * self.scale[self.whole :, None],
            )
        if not all(np.isfinite(part).all() for part in parts):
            raise FormatError("a basis has infinite components: calibrate again")
        return mx.array(parts[0]), mx.array(parts[1].reshape(-1, self.dim, self.dim))

    @cached_property
    def _strong_count(self) -> int:
        """Number of leading components that hold STRONG_ENERGY_SHARE of the energy."""
        energy = np.cumsum(np.square(self.spread[: self.whole]))
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
            Number of components, 0 to `rank`; of heads all or none.
        """
        count = int(np.flatnonzero(np.r_[np.inf, self.spread] >= least)[-1])
        return count if count <= self.whole else self.rank

    def project(self, rows: mx.array, count: int, refine: bool = False, step: float = 1.0) -> mx.array:
        """Return the coefficients of rows.

        Parameters
        ----------
        rows
            Centred rows `[n, p]` float32.
        count
            Number of components to use, strongest first; of heads all or none.
        refine
            Also correct for the rounding of the components, at three times the cost.
        step
            Width of the quantization interval that the coefficients will have: components of heads code what is left after it.

        Returns
        -------
        mx.array
            Coefficients `[n, count]` float32.
        """
        whole = min(count, self.whole)
        coefficients = self._project_once(rows, whole)
        if refine:
            coefficients += self._project_once(rows - self.reconstruct(coefficients), whole)
        if count == whole:
            return coefficients
        return self._with_heads(rows, coefficients, step)

    def project_at(self, rows: mx.array, steps: Sequence[float]) -> Iterator[mx.array]:
        """Return the coefficients of rows at several steps, computing once what is the same for all.

        Parameters
        ----------
        rows
            Centred rows `[n, p]` float32.
        steps
            Widths of the quantization interval.

        Yields
        ------
        mx.array
            What `project` returns for all components and this step.
        """
        coefficients = self._project_once(rows, self.whole)
        mx.eval(coefficients)
        for step in steps:
            yield self._with_heads(rows, coefficients, step) if self.rank > self.whole else coefficients

    def _with_heads(self, rows: mx.array, coefficients: mx.array, step: float) -> mx.array:
        """Append coefficients of heads, which code what those of whole rows leave."""
        left = rows - self.reconstruct(dequantize(quantize(coefficients, step), step))
        return mx.concatenate([coefficients, by_head(left, self.heads.swapaxes(1, 2))], axis=1)

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
        return combine(coefficients, self.matrix, self.heads)


def by_head(rows: mx.array, matrices: mx.array) -> mx.array:
    """Multiply each head's part of rows by its matrix.

    Parameters
    ----------
    rows
        Rows `[n, heads * D]`.
    matrices
        Matrices `[heads, D, E]`.

    Returns
    -------
    mx.array
        Rows `[n, heads * E]`.
    """
    heads, dim = matrices.shape[:2]
    return (rows.reshape(-1, heads, dim).swapaxes(0, 1) @ matrices).swapaxes(0, 1).reshape(len(rows), -1)


def combine(coefficients: mx.array, whole: mx.array, heads: mx.array) -> mx.array:
    """Return the sum of components times their coefficients.

    Parameters
    ----------
    coefficients
        Coefficients `[n, count]` of the first components; those of the others are 0.
    whole
        Components of whole rows `[r, p]`.
    heads
        Components of heads `[heads, D, E]`, which come after them; may be none.

    Returns
    -------
    mx.array
        Rows `[n, p]`, or `[n, heads * E]`.
    """
    count = coefficients.shape[1]
    rows = coefficients[:, : len(whole)] @ whole[:count]
    if count <= len(whole):
        return rows
    missing = len(whole) + heads.shape[0] * heads.shape[1] - count
    return rows + by_head(mx.pad(coefficients[:, len(whole) :], [(0, 0), (0, missing)]), heads)


def learn_basis(
    rows: np.ndarray, step: float, budget: int | None, seed: int, dim: int | None = None, most: int | None = None
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
    dim
        Width of a head. Rows fewer than p are then given the directions of each head as well; without it, they have no
        components beyond their own span.
    most
        Components of whole rows, at most. Rows that have more are given the directions of each head as well. None for no bound.

    Returns
    -------
    Basis
        The rounded basis.

    Raises
    ------
    InputError
        For a budget too small for one component.
    """
    rank = len(rows) // TOKENS_A_COMPONENT if len(rows) < rows.shape[1] and dim else rows.shape[1]
    rank = min(rank, most or rank)
    few = dim is not None and rank < rows.shape[1]
    if most:
        rows -= rows.mean(axis=0, dtype=np.float64).astype(np.float32)
        components = leading_components(rows, max(1, min(rank, len(rows) - 1)), seed)
    else:
        _, components = principal_components(rows, rank, seed)
    coefficients = rows @ components
    spread = np.sqrt(np.square(coefficients, dtype=np.float64).mean(axis=0)).astype(np.float32)
    entries = components.T * spread[:, None]
    heads = _head_part(rows, coefficients, components, dim, CHUNK_ROWS if most else len(rows)) if few and dim else None
    if budget is not None:
        step = _step_within_budget(entries, step, budget - (_deflated_bytes(heads[0]) if heads else 0))
    basis = _round_to_step(entries, spread, step, heads)
    while budget is not None and _stored_bytes(basis) > budget:
        if basis.whole == 1:
            raise InputError(f"{budget} bytes hold no component of {rows.shape[1]} entries: raise basis_bytes")
        step *= _STEP_FACTOR
        basis = _round_to_step(entries, spread, step, heads)
    return basis


def _head_part(
    rows: np.ndarray, coefficients: np.ndarray, components: np.ndarray, dim: int, chunk: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the directions of heads as integers `[p, dim]` int8 with their scales and spreads `[p]`."""
    own = left = np.zeros((), np.float32)
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        own = own + head_products(part, dim)
        left = left + head_products(part - coefficients[start : start + chunk] @ components.T, dim)
    count = np.float32(len(rows))
    directions, spread = head_directions(own / count, left / count)
    largest = np.abs(directions).max(axis=1)
    integers = np.rint(directions * (HEAD_ENTRY / largest)[:, None]).astype(np.int8)
    # So that every direction has the length 1 again after rounding.
    scale = 1 / np.sqrt(np.square(integers, dtype=np.float64).sum(axis=1))
    return integers, scale.astype(np.float32), spread


def _deflated_bytes(integers: np.ndarray) -> int:
    """Return the bytes of integers and their scales and spreads in the artifacts, approximately."""
    return len(lossless.encode("deflate", integers.tobytes())) + 8 * len(integers)


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


def _round_to_step(
    entries: np.ndarray, spread: np.ndarray, step: float,
    heads: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
) -> Basis:  # fmt: skip
    """Make a basis from entries `[rank, p]`, which are components times their spreads, by rounding; append those of heads."""
    steps = np.maximum(step, np.abs(entries).max(axis=1, initial=0) / MAX_ENTRY)
    integers = np.rint(entries / steps[:, None]).astype(np.int16)
    wide = int(np.flatnonzero(np.r_[True, (np.abs(integers) > 127).any(axis=1)])[-1])
    # Weaker components would be mostly rounding noise, which overlaps with the other components.
    informative = np.square(integers, dtype=np.float32).mean(axis=1) >= 1
    rank = max(1, wide, int(np.flatnonzero(np.r_[True, informative])[-1]))
    low = integers[:rank].astype(np.int8)
    high = (integers[:wide] - low[:wide]) // 256
    data = low.tobytes() + high.astype(np.int8).tobytes()
    scale = (steps[:rank] / np.maximum(spread[:rank], np.finfo(np.float32).tiny)).astype(np.float32)
    spread, dim = spread[:rank], 1
    if heads:
        data, dim = data + heads[0].tobytes(), heads[0].shape[1]
        scale, spread = (np.concatenate(pair) for pair in zip((scale, spread), heads[1:]))
    codes = len(data).to_bytes(LENGTH_BYTES, "little") + lossless.encode("deflate", data)
    return Basis(np.frombuffer(codes, np.uint8), scale, spread, entries.shape[1], dim)


def _stored_bytes(basis: Basis) -> int:
    """Return the bytes of a basis in the artifacts."""
    return basis.codes.nbytes + basis.scale.nbytes + basis.spread.nbytes

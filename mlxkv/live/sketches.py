"""Sketches: estimates of how much was added for each of many keys, in fewer counters than there are keys.

A sketch object holds no data: it defines how counters are updated and queried. The counters, `[N, depth, width]`
float32 for N independent tables, belong to the caller, who can multiply them to let old amounts decay. The hash
functions are derived from the seed and are never stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import mlx.core as mx

from mlxkv.config import Config, integer
from mlxkv.errors import InputError
from mlxkv.kernels import count_min
from mlxkv.kernels.count_min import hash_functions


@dataclass(frozen=True)
class Sketch(Config, ABC):
    """Base class of sketches.

    Parameters
    ----------
    width
        Counters per row.
    depth
        Rows per table.
    seed
        Seed of the hash functions.

    Raises
    ------
    InputError
        When width or depth is below 1, or seed below 0.
    """

    width: int = integer(512, least=1, most=2**20)
    depth: int = integer(4, least=1, most=2**12)
    seed: int = integer(0, most=2**63 - 1)

    @abstractmethod
    def update(self, counters: mx.array, keys: mx.array, amounts: mx.array) -> mx.array:
        """Add each key's amount to the counters.

        Parameters
        ----------
        counters
            `[N, depth, width]` float32.
        keys
            Integers `[T]`, the same for all tables, or `[N, T]`; for RACE vectors `[N, T, D]`. A key may occur several
            times.
        amounts
            `[N, T]`.

        Returns
        -------
        mx.array
            The new counters, `[N, depth, width]` float32.
        """

    @abstractmethod
    def query(self, counters: mx.array, keys: mx.array) -> mx.array:
        """Return an estimate of the total that was added for each key.

        Parameters
        ----------
        counters
            `[N, depth, width]` float32.
        keys
            As in `update`.

        Returns
        -------
        mx.array
            `[N, T]` float32.
        """

    def top_k(self, counters: mx.array, keys: mx.array, k: int) -> tuple[mx.array, mx.array]:
        """Return the keys with the largest estimates.

        Parameters
        ----------
        counters
            `[N, depth, width]` float32.
        keys
            As in `update`.
        k
            Number of keys to return; all of them if there are fewer.

        Returns
        -------
        tuple of mx.array
            Indices into `keys`, and estimates, both `[N, k]`, highest estimate first.
        """
        estimates = self.query(counters, keys)
        indices = mx.argsort(-estimates, axis=-1)[:, :k]
        return indices, mx.take_along_axis(estimates, indices, axis=-1)

    def empty(self, tables: int) -> mx.array:
        """Return the counters of empty sketches.

        Parameters
        ----------
        tables
            N, the number of tables.

        Returns
        -------
        mx.array
            Zeros `[N, depth, width]` float32.
        """
        return mx.zeros((tables, self.depth, self.width))

    def nbytes(self, tables: int = 1) -> int:
        """Return the bytes of the counters, the only data that a sketch needs.

        Parameters
        ----------
        tables
            N, the number of tables.

        Returns
        -------
        int
            4 bytes per counter.
        """
        return 4 * tables * self.depth * self.width


@dataclass(frozen=True)
class CountMin(Sketch):
    """Count-Min sketch, for integer keys and amounts of 0 or more: an estimate that never underestimates.

    Parameters
    ----------
    width
        Counters per row.
    depth
        Rows per table.
    seed
        Seed of the hash functions.

    Raises
    ------
    InputError
        When width or depth is below 1, or seed below 0.

    Notes
    -----
    Cormode and Muthukrishnan, "An improved data stream summary", J. Algorithms 55, 2005. With probability
    1 - exp(-depth), over the seeds, an estimate exceeds the truth by at most e / width of everything that was added.

    Examples
    --------
    >>> sketch = CountMin(width=64, depth=2)
    >>> keys = mx.array([7, 12, 7])
    >>> counters = sketch.update(sketch.empty(1), keys, mx.array([[1.0, 5.0, 2.0]]))
    >>> sketch.query(counters, mx.array([7, 12, 99])).tolist()
    [[3.0, 5.0, 0.0]]
    """

    signed: ClassVar[bool] = False

    @property
    def hashes(self) -> mx.array:
        """The hash functions, uint32 `[depth, 4]`."""
        return _hashes(self.depth, self.seed)

    def update(self, counters: mx.array, keys: mx.array, amounts: mx.array) -> mx.array:
        """Add each key's amount to the counters."""
        return count_min.update(counters, keys, amounts, self.hashes, self.signed)

    def query(self, counters: mx.array, keys: mx.array) -> mx.array:
        """Return an estimate of the total that was added for each key."""
        return count_min.query(counters, keys, self.hashes, self.signed)


@dataclass(frozen=True)
class CountSketch(CountMin):
    """Count-Sketch, for integer keys: an unbiased estimate per row, and the median of the rows.

    Parameters
    ----------
    width
        Counters per row.
    depth
        Rows per table.
    seed
        Seed of the hash functions.

    Raises
    ------
    InputError
        When width or depth is below 1, or seed below 0.

    Notes
    -----
    Charikar, Chen and Farach-Colton, "Finding frequent items in data streams", ICALP 2002. Each row is unbiased over
    the seeds; its standard error is about sqrt(sum of the other keys' squared amounts / width), far less than the error
    of Count-Min where many keys have similar amounts. The estimate is the median of the rows.
    """

    signed: ClassVar[bool] = True


@dataclass(frozen=True)
class Race(Sketch):
    """RACE sketch, for keys that are vectors: an estimate of how much was added near a vector.

    Parameters
    ----------
    width
        Counters per row, a power of 2.
    depth
        Rows per table.
    seed
        Seed of the random projections.

    Raises
    ------
    InputError
        When width is no power of 2, depth below 1 or seed below 0.

    Notes
    -----
    https://arxiv.org/abs/1912.02283. The estimate is unbiased over the seeds. What it estimates is the sum, over all
    vectors that were added, of the amount times (1 - angle / pi) ** log2(width). A row has one counter per sign pattern
    of log2(width) random projections, so the pattern itself is the index. Departs from the paper in taking the mean of
    the rows, not a median of means.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width & (self.width - 1):
            raise InputError(f"RACE's width must be a power of 2, not {self.width}")

    def update(self, counters: mx.array, keys: mx.array, amounts: mx.array) -> mx.array:
        """Add each vector's amount to the counters."""
        rows = counters.reshape(-1, 1, self.width)
        added = count_min.update(rows, self._columns(keys), mx.repeat(amounts, self.depth, axis=0), _IDENTITY)
        return added.reshape(counters.shape)

    def query(self, counters: mx.array, keys: mx.array) -> mx.array:
        """Return an estimate of how much was added near each vector."""
        rows = count_min.query(counters.reshape(-1, 1, self.width), self._columns(keys), _IDENTITY)
        return rows.reshape(-1, self.depth, rows.shape[-1]).mean(axis=1)

    def _columns(self, vectors: mx.array) -> mx.array:
        """Return each vector's column in each row, uint32 `[N * depth, T]`: the signs of its projections, as bits."""
        N, T, D = vectors.shape
        bits = self.width.bit_length() - 1
        signs = vectors.astype(mx.float32) @ _planes(self.depth * bits, D, self.seed) > 0  # [N, T, depth * bits]
        powers = mx.left_shift(mx.array(1, mx.uint32), mx.arange(bits, dtype=mx.uint32))
        numbers = (signs.reshape(N, T, self.depth, bits) * powers).sum(axis=-1)
        return numbers.swapaxes(1, 2).reshape(-1, T)


SKETCHES: dict[str, type[Sketch]] = {"count-min": CountMin, "count-sketch": CountSketch, "race": Race}
# Hash (1 * key + 0) mod p mod width: the count-min kernel then uses the key itself as the column.
_IDENTITY = mx.array([[1, 0, 1, 0]], dtype=mx.uint32)


@cache
def _hashes(depth: int, seed: int) -> mx.array:
    """Return the hash functions of a seed, cached."""
    return hash_functions(depth, seed)


@cache
def _planes(count: int, dims: int, seed: int) -> mx.array:
    """Return the normals of random hyperplanes, `[dims, count]`, cached."""
    return mx.random.normal((dims, count), key=mx.random.key(seed))

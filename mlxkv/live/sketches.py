"""Sketches on plain arrays: how much each of many keys has collected, in fewer counters than there are keys.

A sketch object says how to write and read. Counters, `[N, depth, width]` float32 for N independent tables, belong to the
caller, who lets them decay by multiplying them. The hash functions follow from the seed and are never stored.
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
    """Base of all sketches.

    Parameters
    ----------
    width
        Counters of a row.
    depth
        Rows of a table.
    seed
        Seed of the hash functions.

    Raises
    ------
    InputError
        When width or depth is below 1, or seed below 0.
    """

    width: int = integer(512, least=1)
    depth: int = integer(4, least=1)
    seed: int = integer(0)

    @abstractmethod
    def update(self, counters: mx.array, keys: mx.array, amounts: mx.array) -> mx.array:
        """Return counters to which each key's amount is added.

        Parameters
        ----------
        counters
            `[N, depth, width]` float32.
        keys
            Whole numbers `[T]`, the same for all tables, or `[N, T]`; for RACE vectors `[N, T, D]`. A key may occur
            many times.
        amounts
            `[N, T]`.

        Returns
        -------
        mx.array
            `[N, depth, width]` float32.
        """

    @abstractmethod
    def query(self, counters: mx.array, keys: mx.array) -> mx.array:
        """Return an estimate of how much each key has collected.

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
        """Return which of the keys have collected most.

        Parameters
        ----------
        counters
            `[N, depth, width]` float32.
        keys
            As in `update`.
        k
            Number of keys to return; all where there are fewer.

        Returns
        -------
        tuple of mx.array
            Indices among the keys and estimates, both `[N, k]`, from the highest estimate to the lowest.
        """
        estimates = self.query(counters, keys)
        indices = mx.argsort(-estimates, axis=-1)[:, :k]
        return indices, mx.take_along_axis(estimates, indices, axis=-1)

    def empty(self, tables: int) -> mx.array:
        """Return counters of sketches that have seen nothing.

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
        """Return the bytes of the counters, which is all that a sketch takes.

        Parameters
        ----------
        tables
            N, the number of tables.

        Returns
        -------
        int
            4 bytes a counter.
        """
        return 4 * tables * self.depth * self.width


@dataclass(frozen=True)
class CountMin(Sketch):
    """Count-Min, for keys that are whole numbers and amounts of 0 or more: never too low.

    Parameters
    ----------
    width
        Counters of a row.
    depth
        Rows of a table.
    seed
        Seed of the hash functions.

    Raises
    ------
    InputError
        When width or depth is below 1, or seed below 0.

    Notes
    -----
    Cormode and Muthukrishnan, "An improved data stream summary", J. Algorithms 55, 2005. An estimate is too high by
    more than e / width of all that was added with probability at most exp(-depth), over the seeds.

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
        """Return counters to which each key's amount is added."""
        return count_min.update(counters, keys, amounts, self.hashes, self.signed)

    def query(self, counters: mx.array, keys: mx.array) -> mx.array:
        """Return an estimate of how much each key has collected."""
        return count_min.query(counters, keys, self.hashes, self.signed)


@dataclass(frozen=True)
class CountSketch(CountMin):
    """Count-Sketch, for keys that are whole numbers: right on average.

    Parameters
    ----------
    width
        Counters of a row.
    depth
        Rows of a table.
    seed
        Seed of the hash functions.

    Raises
    ------
    InputError
        When width or depth is below 1, or seed below 0.

    Notes
    -----
    Charikar, Chen and Farach-Colton, "Finding frequent items in data streams", ICALP 2002. Each row is right on average
    over the seeds and errs by about the root of the other keys' squares over width: far less than Count-Min where many
    keys have similar amounts. The estimate is the median of the rows.
    """

    signed: ClassVar[bool] = True


@dataclass(frozen=True)
class Race(Sketch):
    """RACE, for keys that are vectors: estimates how much was added near a vector.

    Parameters
    ----------
    width
        Counters of a row, a power of 2.
    depth
        Rows of a table.
    seed
        Seed of the random projections.

    Raises
    ------
    InputError
        When width is no power of 2, depth below 1 or seed below 0.

    Notes
    -----
    https://arxiv.org/abs/1912.02283. The estimate is the sum over all that was added of the amount times
    (1 - angle / pi) ** log2(width), right on average over the seeds. There is a column for each pattern of signs of
    log2(width) random projections, so nothing is hashed a second time. It departs from the paper in taking the mean of
    the rows, not a median of means.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width & (self.width - 1):
            raise InputError(f"RACE's width must be a power of 2, not {self.width}")

    def update(self, counters: mx.array, keys: mx.array, amounts: mx.array) -> mx.array:
        """Return counters to which each vector's amount is added."""
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
# (1 * key + 0) mod p mod width: the count-min kernel then adds to the column that the key names.
_IDENTITY = mx.array([[1, 0, 1, 0]], dtype=mx.uint32)


@cache
def _hashes(depth: int, seed: int) -> mx.array:
    """Return the hash functions of a seed, made once."""
    return hash_functions(depth, seed)


@cache
def _planes(count: int, dims: int, seed: int) -> mx.array:
    """Return normals of random hyperplanes, `[dims, count]`."""
    return mx.random.normal((dims, count), key=mx.random.key(seed))

"""Sketches on plain arrays: how much each of many keys has collected, in fewer counters than there are keys.

A sketch object says how to write and read; counters `[N, depth, width]` float32, N independent tables, belong to the
caller, who decays them by a product. What the rows are hashed with follows from the seed and is never stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import mlx.core as mx

from mlxkv.config import is_int
from mlxkv.errors import InputError
from mlxkv.kernels import count_min
from mlxkv.kernels.count_min import hash_functions


@dataclass(frozen=True)
class Sketch(ABC):
    """width: counters of a row. depth: rows. seed: of the hash functions. Raises InputError for impossible ones."""

    width: int = 512
    depth: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if not is_int(self.width, least=1) or not is_int(self.depth, least=1) or not is_int(self.seed):
            raise InputError(f"width and depth must be 1 or more and seed 0 or more: {self}")

    @abstractmethod
    def update(self, counters: mx.array, keys: mx.array, amounts: mx.array) -> mx.array:
        """Counters with each key's amount added. keys: `[T]`, the same for all tables, or `[N, T]`; of RACE `[N, T, D]`. A
        key may occur many times. amounts: `[N, T]`."""

    @abstractmethod
    def query(self, counters: mx.array, keys: mx.array) -> mx.array:
        """What each of the keys has collected, as far as the sketch knows: `[N, T]`."""

    def top_k(self, counters: mx.array, keys: mx.array, k: int) -> tuple[mx.array, mx.array]:
        """Where among the keys those are that have collected most, and what they have, both `[N, k]`, most first."""
        estimates = self.query(counters, keys)
        places = mx.argsort(-estimates, axis=-1)[:, :k]
        return places, mx.take_along_axis(estimates, places, axis=-1)

    def empty(self, tables: int) -> mx.array:
        """Counters of sketches that have seen nothing."""
        return mx.zeros((tables, self.depth, self.width))

    def nbytes(self, tables: int = 1) -> int:
        """Bytes of the counters of so many tables: all that a sketch takes."""
        return 4 * tables * self.depth * self.width


@dataclass(frozen=True)
class CountMin(Sketch):
    """Keys are whole numbers. An estimate is never too low, and too high by more than e / width of all that was added
    with probability at most exp(-depth), over the seeds.

    Cormode and Muthukrishnan, "An improved data stream summary", J. Algorithms 55, 2005; amounts must be >= 0.
    """

    signed: ClassVar[bool] = False

    @property
    def hashes(self) -> mx.array:
        return _hashes(self.depth, self.seed)

    def update(self, counters: mx.array, keys: mx.array, amounts: mx.array) -> mx.array:
        return count_min.update(counters, keys, amounts, self.hashes, self.signed)

    def query(self, counters: mx.array, keys: mx.array) -> mx.array:
        return count_min.query(counters, keys, self.hashes, self.signed)


@dataclass(frozen=True)
class CountSketch(CountMin):
    """Keys are whole numbers. Each row's estimate is right on average over the seeds and errs by about the root of the
    other keys' squares over width: far less than Count-Min where many keys have alike. The median of the rows is taken.

    Charikar, Chen and Farach-Colton, "Finding frequent items in data streams", ICALP 2002.
    """

    signed: ClassVar[bool] = True


@dataclass(frozen=True)
class Race(Sketch):
    """Keys are vectors `[N, T, D]`. Estimates what lies near a vector: the sum over all that was added of the amount times
    (1 - angle / pi) ** log2(width), right on average over the seeds. width must be a power of 2.

    https://arxiv.org/abs/1912.02283, with a column for each pattern of signs of log2(width) random projections, so
    nothing is hashed a second time. Departs from it in taking the mean of the rows, not a median of means.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width & (self.width - 1):
            raise InputError(f"RACE's width must be a power of 2, not {self.width}")

    def update(self, counters: mx.array, keys: mx.array, amounts: mx.array) -> mx.array:
        rows = counters.reshape(-1, 1, self.width)
        added = count_min.update(rows, self._columns(keys), mx.repeat(amounts, self.depth, axis=0), _IDENTITY)
        return added.reshape(counters.shape)

    def query(self, counters: mx.array, keys: mx.array) -> mx.array:
        rows = count_min.query(counters.reshape(-1, 1, self.width), self._columns(keys), _IDENTITY)
        return rows.reshape(-1, self.depth, rows.shape[-1]).mean(axis=1)

    def _columns(self, vectors: mx.array) -> mx.array:
        """uint32 `[N * depth, T]`: the signs of a vector's projections, as the bits of a number."""
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
    return hash_functions(depth, seed)


@cache
def _planes(count: int, dims: int, seed: int) -> mx.array:
    """Normals of random hyperplanes, `[dims, count]`."""
    return mx.random.normal((dims, count), key=mx.random.key(seed))

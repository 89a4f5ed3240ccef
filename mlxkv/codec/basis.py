"""A basis in few bytes: strong components in 8 bits an entry, weak ones in 4, each head of each with a scale.

What a component's rounding costs grows with the component, so weak ones can be rounded more than strong ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

from mlxkv.codec.pca import principal_components
from mlxkv.errors import FormatError, InputError

LEAST_STRONG = 8  # one component in so many has 8 bits at least
TYPES = {"V8": "int8", "V4": "uint8", "scale": "float16", "spread": "float16"}


@dataclass(frozen=True)
class Basis:
    """Components of rows `[n, p]` of heads * dim = p, strongest first: r8 in 8 bits and r4 in 4.

    V8: `[p, r8]` int8. V4: `[ceil(p / 2), r4]` uint8, the even row in the low half, 8 standing for 0. scale: `[heads,
    r8 + r4]` float16. spread: `[r8 + r4]` float16, the standard deviation that each coefficient had.
    """

    V8: np.ndarray
    V4: np.ndarray
    scale: np.ndarray
    spread: np.ndarray
    width: int

    def __post_init__(self) -> None:
        parts = {name: getattr(self, name) for name in TYPES}
        if {name: str(part.dtype) for name, part in parts.items()} != TYPES:
            raise FormatError(f"a basis has the types {TYPES}, not {[str(part.dtype) for part in parts.values()]}")
        heads, rank = self.scale.shape if self.scale.ndim == 2 else (0, -1)
        fits = self.spread.shape == (rank,) and self.V8.ndim == self.V4.ndim == 2
        fits = fits and self.V8.shape[1] + self.V4.shape[1] == rank and not self.width % max(1, heads)
        if not fits or len(self.V8) != self.width or len(self.V4) != -(-self.width // 2):
            shapes = {name: part.shape for name, part in parts.items()}
            raise FormatError(f"these are no parts of one basis of rows {self.width} wide: {shapes}")
        if not (np.isfinite(self.scale).all() and np.isfinite(self.spread).all()):
            raise FormatError("a basis has NaN or infinite scales")

    @property
    def rank(self) -> int:
        """Components."""
        return self.spread.size

    @cached_property
    def matrix(self) -> mx.array:
        """`[rank, p]` float32: the first components lie together, so that products with them copy nothing."""
        low, high = self.V4 & 15, self.V4 >> 4
        weak = (
            np.stack([low, high], axis=1).reshape(2 * len(self.V4), self.V4.shape[1])[: self.width].astype(np.int8) - 8
        )
        codes = np.concatenate([self.V8, weak], axis=1).reshape(len(self.scale), -1, self.rank)
        entries = (codes * self.scale.astype(np.float32)[:, None]).reshape(self.width, self.rank)
        return mx.array(np.ascontiguousarray(entries.T))

    def reaching(self, least: float) -> int:
        """How many components there are before all others spread less than `least`."""
        return int(np.flatnonzero(np.r_[np.inf, self.spread] >= least)[-1])

    def project(self, rows: mx.array, count: int, refined: bool = False) -> mx.array:
        """Coefficients `[n, count]` of the strongest components of rows `[n, p]`. refined: also make up for what rounding
        the components did, at three times the cost."""
        coefficients = self._projected(rows, count)
        return coefficients + self._projected(rows - self.rows(coefficients), count) if refined else coefficients

    def _projected(self, rows: mx.array, count: int) -> mx.array:
        strong = min(count, self.V8.shape[1])
        first, others = self.matrix[:strong], self.matrix[strong:count]
        coefficients = rows @ first.T
        if count == strong:
            return coefficients
        # Rounded weak components are not quite orthogonal to strong ones, which would leak into them.
        return mx.concatenate([coefficients, (rows - coefficients @ first) @ others.T], axis=1)

    def rows(self, coefficients: mx.array) -> mx.array:
        """Rows `[n, p]` of coefficients `[n, count]` of the strongest components."""
        return coefficients @ self.matrix[: coefficients.shape[1]]


def learn(rows: np.ndarray, heads: int, budget: int | None, seed: int) -> Basis:
    """The basis of rows `[N, p]` in at most `budget` bytes, with all of its components if they fit in 4 bits; centres
    `rows` in place.

    Raises InputError for a budget that not even one component fits in.
    """
    width = rows.shape[1]
    strong, weak = _divided(width, heads, min(width, len(rows) - 1), budget)
    _, components = principal_components(rows, strong + weak, seed)
    spread = np.sqrt(np.square(rows @ components, dtype=np.float64).mean(axis=0)).astype(np.float16)
    by_head = components.reshape(heads, width // heads, strong + weak)
    largest = np.r_[np.full(strong, 127), np.full(weak, 7)]
    scale = (np.abs(by_head).max(axis=1) / largest).astype(np.float16)
    divisor = np.maximum(scale.astype(np.float32), 1e-8)[:, None]
    codes = np.clip(np.rint(by_head / divisor), -largest, largest).astype(np.int8).reshape(width, -1)
    low = (np.pad(codes[:, strong:], ((0, width % 2), (0, 0))) + 8).astype(np.uint8)
    return Basis(np.ascontiguousarray(codes[:, :strong]), low[::2] | low[1::2] << 4, scale, spread, width)


def _divided(width: int, heads: int, most: int, budget: int | None) -> tuple[int, int]:
    """Components in 8 bits and in 4."""
    if budget is None:
        return most, 0
    half, each = -(-width // 2), 2 * heads + 2
    rank = min(most, int(budget / (half + each + (width - half) / LEAST_STRONG)))
    if rank < 1:
        raise InputError(f"{budget} bytes hold no component of {width} entries: raise basis_bytes")
    strong = min(rank, (budget - rank * (half + each)) // (width - half))
    return strong, rank - strong

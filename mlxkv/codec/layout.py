"""Which tokens of a cache are raw sinks, coded blocks and window."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxkv.config import is_int
from mlxkv.errors import FormatError, MismatchError
from mlxkv.spec import STREAMS, CacheSpec

Layers = Sequence[np.ndarray] | Sequence[mx.array]
BLOCK = 512  # rows, batch times tokens, in a coded block: bounds the memory of both directions
ROWS_AT_ONCE = 4 * BLOCK  # whose lanes are decoded together
MAX_ROWS = 2**16  # that a reader accepts


class Piece(NamedTuple):
    """Tokens start .. stop that are coded together, in each stream's section of this name."""

    name: str
    start: int
    stop: int
    quality: float | None


@dataclass(frozen=True)
class Layout:
    """Which tokens of a cache `[batch, …, length, …]` are sinks, coded blocks and window."""

    batch: int
    length: int
    sinks: int
    recent: int
    block: int

    def __post_init__(self) -> None:
        counts, positive = (self.sinks, self.recent), (self.batch, self.length, self.block)
        valid = all(is_int(n) for n in counts) and all(is_int(n, least=1) for n in positive)
        if not valid or self.batch * min(self.block, self.length) > MAX_ROWS:
            raise FormatError(f"not a layout of tokens: {self}")

    def to_json(self) -> dict[str, int]:
        """By the keys of a container's header."""
        return {"batch": self.batch, "length": self.length, "s": self.sinks, "w": self.recent, "block": self.block}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Layout:
        """The inverse of `to_json`. Raises TypeError for other keys, FormatError for impossible numbers."""
        names = {"s": "sinks", "w": "recent", "sinks": "(sinks)", "recent": "(recent)"}
        return cls(**{names.get(key, key): value for key, value in data.items()})

    @property
    def middle(self) -> range:
        """The coded tokens; empty when sinks and window cover everything."""
        sink = min(self.sinks, self.length)
        return range(sink, max(sink, self.length - self.recent))

    def blocks(self) -> Iterator[tuple[int, int, int]]:
        """(index, start, stop) of every coded block."""
        for index, start in enumerate(range(self.middle.start, self.middle.stop, self.block)):
            yield index, start, min(start + self.block, self.middle.stop)

    def pieces(self, quality: float | None, window_quality: float | None) -> Iterator[Piece]:
        """All that is coded: the blocks and, where it has a quality, the window."""
        for index, start, stop in self.blocks():
            yield Piece(str(index), start, stop, quality)
        starts = range(self.middle.stop, 0 if window_quality is None else self.length, self.block)
        for index, start in enumerate(starts):
            yield Piece(f"window.{index}", start, min(start + self.block, self.length), window_quality)

    def groups(self, pieces: Sequence[Piece], first: int, last: int) -> Iterator[list[Piece]]:
        """Those that have tokens of first .. last, as many together as are decoded at once."""
        chosen = [piece for piece in pieces if piece.start < last and piece.stop > first]
        size = max(1, ROWS_AT_ONCE // (self.batch * self.block))
        return (chosen[i : i + size] for i in range(0, len(chosen), size))


def cache_shape(layers: Mapping[str, Layers], spec: CacheSpec) -> tuple[int, int, str]:
    """Batch, length and dtype of keys and values. Raises MismatchError when they are not one cache of this description."""
    shapes, dtypes = set(), set()
    for name in STREAMS:
        stream = spec.stream(name)
        if len(layers[name]) != stream.layers:
            raise MismatchError(f"{name} has {len(layers[name])} layers; the artifacts are for {stream.layers}")
        for array in layers[name]:
            if len(array.shape) != 4 or (array.shape[1], array.shape[3]) != (stream.heads, stream.dim):
                raise MismatchError(
                    f"{name} has a layer of shape {tuple(array.shape)}; expected [B, {stream.heads}, T, {stream.dim}]"
                )
            shapes.add((array.shape[0], array.shape[2]))
            dtypes.add(str(array.dtype).removeprefix("mlx.core."))
    if len(shapes) != 1 or min(min(shapes)) < 1:
        raise MismatchError(f"all layers need the same batch and length of at least 1, found [B, T] = {sorted(shapes)}")
    if len(dtypes) != 1 or not dtypes <= {"float16", "float32", "bfloat16"}:
        raise MismatchError(f"all layers need one dtype of float16, bfloat16 or float32, found {sorted(dtypes)}")
    return *shapes.pop(), dtypes.pop()

"""Which tokens of a cache are raw sinks, coded blocks and raw window."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mlxkv.errors import FormatError

BLOCK = 512
MAX_BLOCK = 2**16


@dataclass(frozen=True)
class Layout:
    """Which tokens of a cache `[batch, …, length, …]` are sinks, coded blocks and window."""

    batch: int
    length: int
    s: int
    w: int
    block: int = BLOCK

    def __post_init__(self) -> None:
        whole = all(type(n) is int for n in (self.batch, self.length, self.s, self.w, self.block))
        if (
            not whole
            or self.batch < 1
            or self.length < 1
            or self.s < 0
            or self.w < 0
            or not 1 <= self.block <= MAX_BLOCK
        ):
            raise FormatError(f"not a layout of tokens: {self}")

    @property
    def middle(self) -> range:
        """The coded tokens; empty when sinks and window cover everything."""
        sink = min(self.s, self.length)
        return range(sink, max(sink, self.length - self.w))

    def blocks(self) -> Iterator[tuple[int, int, int]]:
        """(index, start, stop) of every coded block."""
        for index, start in enumerate(range(self.middle.start, self.middle.stop, self.block)):
            yield index, start, min(start + self.block, self.middle.stop)

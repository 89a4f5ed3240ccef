"""Which tokens of a cache are raw sinks, coded blocks and raw window."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mlxkv.cache import is_whole
from mlxkv.errors import FormatError

BLOCK = 512  # rows, batch times tokens, in a coded block: bounds the memory of both directions
MAX_ROWS = 2**16  # that a reader accepts


@dataclass(frozen=True)
class Layout:
    """Which tokens of a cache `[batch, …, length, …]` are sinks, coded blocks and window."""

    batch: int
    length: int
    s: int
    w: int
    block: int

    def __post_init__(self) -> None:
        counts, positive = (self.s, self.w), (self.batch, self.length, self.block)
        valid = all(is_whole(n) for n in counts) and all(is_whole(n, least=1) for n in positive)
        if not valid or self.batch * min(self.block, self.length) > MAX_ROWS:
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

"""Layout of the tokens that a group of layers keeps: sinks, coded blocks and recent tokens.

    |-- sinks --|-- block 0 --|-- block 1 --| ... |-- last block --|-- the newest `recent` tokens --|

Sinks are stored unquantized; recent tokens are stored unquantized as well, or in blocks of a higher quality. Section names
and header keys call the recent tokens the window, whether or not the layers themselves keep a window of the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxkv.errors import FormatError, MismatchError
from mlxkv.spec import STREAMS, CacheSpec, Group, Stream, is_int

Layers = Sequence[np.ndarray] | Sequence[mx.array]
BLOCK_ROWS = 512  # rows (batch times tokens) of a coded block: bounds the memory of coding and decoding
DECODE_ROWS = 4 * BLOCK_ROWS  # rows whose rANS lanes are decoded together
MAX_BLOCK_ROWS = 2**16  # rows of a block that a reader accepts, at most
MAX_TOKENS = 2**31 - 1  # positions are int32
_JSON_KEYS = {"batch": "batch", "length": "length", "s": "sinks", "w": "recent", "block": "block_tokens"}
_START = "start"  # written only where it is not 0


class CodedBlock(NamedTuple):
    """Tokens that are coded together, in one section of each stream.

    Parameters
    ----------
    name
        Last part of the sections' names: "0", "1", ..., or "window.0", ... for recent tokens.
    start, stop
        The tokens, from `start` up to `stop`, counted from the first that the layers keep.
    quality
        Quality that they are coded with; None for a method with one ratio.
    """

    name: str
    start: int
    stop: int
    quality: float | None


@dataclass(frozen=True)
class Layout:
    """The partition of the tokens that a group of layers keeps.

    Parameters
    ----------
    batch
        Number of sequences B.
    length
        Number of tokens kept, below 2**31 as all of these numbers.
    sinks
        First tokens, stored unquantized.
    recent
        Newest tokens, which section names and header keys call the window.
    block_tokens
        Tokens of a block.
    start
        Position of the first token; above 0 only where a window has moved on, which has no sinks then.

    Raises
    ------
    FormatError
        When the numbers are out of range.

    Examples
    --------
    >>> layout = Layout(batch=1, length=1500, sinks=4, recent=128, block_tokens=512)
    >>> list(layout.blocks())
    [(0, 4, 516), (1, 516, 1028), (2, 1028, 1372)]
    """

    batch: int
    length: int
    sinks: int
    recent: int
    block_tokens: int
    start: int = 0

    def __post_init__(self) -> None:
        counts, positive = (self.sinks, self.recent, self.start), (self.batch, self.length, self.block_tokens)
        valid = all(is_int(n, 0, MAX_TOKENS) for n in counts) and all(is_int(n, 1, MAX_TOKENS) for n in positive)
        valid = valid and self.tokens <= MAX_TOKENS and not (self.start and self.sinks)
        if not valid or self.batch * min(self.block_tokens, self.length) > MAX_BLOCK_ROWS:
            raise FormatError(f"not a layout of tokens: {str(self)[:200]}")

    def to_json(self) -> dict[str, int]:
        """Return the layout by the keys of a container's header.

        Returns
        -------
        dict[str, int]
            The numbers `batch`, `length`, `s`, `w` and `block`, and `start` where it is above 0.
        """
        moved = {_START: self.start} if self.start else {}
        return {key: getattr(self, name) for key, name in _JSON_KEYS.items()} | moved

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Layout:
        """Return the inverse of `to_json`.

        Parameters
        ----------
        data
            What `to_json` returned, from any source.

        Returns
        -------
        Layout
            The layout.

        Raises
        ------
        FormatError
            For other keys, and for numbers that are out of range.
        """
        if not isinstance(data, Mapping) or set(data) - {_START} != set(_JSON_KEYS):
            raise FormatError(f"a layout of tokens has the keys {', '.join(_JSON_KEYS)}, not {str(data)[:80]}")
        return cls(**{_JSON_KEYS.get(key, key): value for key, value in data.items()})

    @property
    def tokens(self) -> int:
        """Number of tokens of the whole text T."""
        return self.start + self.length

    @property
    def middle(self) -> range:
        """Tokens between the sinks and the recent ones; empty when those cover everything."""
        sinks = min(self.sinks, self.length)
        return range(sinks, max(sinks, self.length - self.recent))

    @property
    def complete_blocks(self) -> int:
        """Number of blocks of the middle that have all their tokens: those that stay when a file grows."""
        return len(self.middle) // self.block_tokens

    def blocks(self) -> Iterator[tuple[int, int, int]]:
        """Yield the blocks of the middle.

        Yields
        ------
        tuple[int, int, int]
            Index, first token and the token after the last one.
        """
        for index, start in enumerate(range(self.middle.start, self.middle.stop, self.block_tokens)):
            yield index, start, min(start + self.block_tokens, self.middle.stop)

    def coded_blocks(self, quality: float | None, window_quality: float | None) -> Iterator[CodedBlock]:
        """Yield the coded blocks: those of the middle, then those of the recent tokens unless they are stored unquantized.

        Parameters
        ----------
        quality
            Quality of the middle; None for a method with one ratio.
        window_quality
            Quality of the recent tokens; None where they are stored unquantized.

        Yields
        ------
        CodedBlock
            A block with its quality.
        """
        for index, start, stop in self.blocks():
            yield CodedBlock(str(index), start, stop, quality)
        starts = range(self.middle.stop, 0 if window_quality is None else self.length, self.block_tokens)
        for index, start in enumerate(starts):
            yield CodedBlock(f"window.{index}", start, min(start + self.block_tokens, self.length), window_quality)

    def count_blocks(self, window_is_coded: bool) -> int:
        """Return the number of coded blocks, without making them.

        Parameters
        ----------
        window_is_coded
            Whether recent tokens are coded.

        Returns
        -------
        int
            Number of blocks that `coded_blocks` yields.
        """
        tokens = [len(self.middle), self.length - self.middle.stop if window_is_coded else 0]
        return sum(-(-count // self.block_tokens) for count in tokens)

    def decode_batches(self, blocks: Sequence[CodedBlock], first: int, last: int) -> Iterator[list[CodedBlock]]:
        """Yield the blocks that contain tokens first .. last, in groups that are decoded together.

        Parameters
        ----------
        blocks
            All coded blocks.
        first, last
            The tokens, from `first` up to `last`.

        Yields
        ------
        list[CodedBlock]
            Blocks to decode together.
        """
        chosen = [block for block in blocks if block.start < last and block.stop > first]
        size = max(1, DECODE_ROWS // (self.batch * self.block_tokens))
        return (chosen[i : i + size] for i in range(0, len(chosen), size))


def coded_streams(group: Group) -> list[Stream]:
    """Return the streams of a group of layers that are coded.

    Parameters
    ----------
    group
        Layers of one shape.

    Returns
    -------
    list[Stream]
        Those whose width is above 0: all but the unused values of MLA and of layers that keep keys alone.
    """
    return [group.stream(name) for name in STREAMS if group.stream(name).width]


def group_layouts(spec: CacheSpec, first: Layout) -> list[Layout]:
    """Return the layouts of all groups of layers, in their order.

    Parameters
    ----------
    spec
        Description of the cache.
    first
        The layout that a group has which keeps all tokens.

    Returns
    -------
    list[Layout]
        One for each of `spec.groups`: the newest tokens of those with a window.
    """
    layouts = []
    for group in spec.groups:
        rows = group.rows(first.length)
        start = first.length - rows
        layouts.append(replace(first, length=rows, start=start, sinks=0 if start else first.sinks))
    return layouts


def check_layouts(layouts: Sequence[Layout], spec: CacheSpec) -> None:
    """Check that layouts which a file names are of one text and of this description.

    Parameters
    ----------
    layouts
        Those of all groups, from any source.
    spec
        Description of the cache.

    Raises
    ------
    FormatError
        When they are not.
    """
    if len(layouts) != len(spec.groups):
        raise FormatError(f"layouts of {len(layouts)} groups of layers, and the artifacts have {len(spec.groups)}")
    batch, tokens = layouts[0].batch, layouts[0].tokens
    for layout, group in zip(layouts, spec.groups):
        if (layout.batch, layout.tokens, layout.length) != (batch, tokens, group.rows(tokens)):
            raise FormatError(f"layers with a window of {group.window} do not keep these: {str(layout)[:200]}")


def cache_shape(layers: Mapping[str, Layers], group: Group) -> tuple[int, int, str]:
    """Check the layers of a group and return the batch, length and type that they share.

    Parameters
    ----------
    layers
        Cached tensors `[B, H, T, D]` of each stream, one for each layer of the group.
    group
        Description that they must fit.

    Returns
    -------
    tuple[int, int, str]
        Batch B, length T and the name of the type.

    Raises
    ------
    MismatchError
        When they are not one cache of this description.
    """
    shapes, dtypes = set(), set()
    for name in STREAMS:
        stream = group.stream(name)
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

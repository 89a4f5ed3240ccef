"""Writing a compressed cache: header and sections, block by block.

Entropy coding of one block runs in parallel with the arithmetic of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxkv.codec import unquantized
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.layout import (
    BLOCK_ROWS,
    CodedBlock,
    Layers,
    Layout,
    cache_shape,
    coded_streams,
    group_layouts,
)
from mlxkv.codec.methods.base import BlockCoder
from mlxkv.codec.stages.rows import to_plain_rows, to_rows
from mlxkv.codec.unquantized import CACHE_SECTIONS, SINK_SECTIONS, split_section
from mlxkv.dump import stream_key
from mlxkv.errors import InputError, MismatchError
from mlxkv.io.container import Section, encode_section
from mlxkv.kernels import metal
from mlxkv.spec import STREAMS
from mlxkv.version import __version__

Progress = Callable[[int], None]
MAX_PENDING = 8  # sections that wait to be entropy-coded, at most


class GroupBlock(NamedTuple):
    """A coded block of one group of layers.

    Parameters
    ----------
    group
        Number of the group; 0 is the main one.
    block
        The block.
    """

    group: int
    block: CodedBlock


@dataclass(frozen=True)
class CacheEncoder:
    """Encoder of caches to the header and the sections of a container.

    Caches are keys and values `[B, H, T, D]`, a list for each stream with one for each of its layers, by the names of
    `stream_key`.

    Parameters
    ----------
    artifacts
        The calibration.
    coders
        Its coders of blocks, one for each group of layers.
    recent
        Newest tokens, stored unquantized or at `window_quality`.
    sinks
        First tokens to store unquantized.
    lossless
        Lossless coding, one of `mlxkv.io.lossless.CODINGS`.
    quality
        Quality of the tokens between sinks and recent tokens; None for a method with one ratio.
    window_quality
        Quality of the recent tokens; None where they are stored unquantized.
    """

    artifacts: CalibrationArtifacts
    coders: tuple[BlockCoder, ...]
    recent: int
    sinks: int
    lossless: str
    quality: float | None
    window_quality: float | None

    def build_header(
        self,
        layers: Mapping[str, Layers],
        tokens: int | None,
        extras: Mapping[str, np.ndarray],
        meta: Mapping[str, Any],
    ) -> tuple[dict[str, Any], dict[str, bytes], list[Layout]]:
        """Return the header of a cache and the arrays that are stored unquantized.

        Parameters
        ----------
        layers
            The cache.
        tokens
            Number of tokens of the text; None for as many as the layers have.
        extras
            Arrays to store unquantized, by name.
        meta
            JSON values to store in the header.

        Returns
        -------
        tuple[dict, dict[str, bytes], list[Layout]]
            The header's own fields, the bytes of unquantized arrays by section, and the layout of each group.

        Raises
        ------
        InputError
            For extras that cannot be stored.
        MismatchError
            When the layers do not fit the artifacts, each other or the number of tokens.
        """
        groups = self.artifacts.spec.groups
        shapes = [cache_shape(_of_group(layers, index), group) for index, group in enumerate(groups)]
        batch, length, dtype = shapes[0]
        layouts = self.layouts(batch, tokens or length)
        expected = [(batch, layout.length, dtype) for layout in layouts]
        if shapes != expected:
            raise MismatchError(f"[B, T] and types of the groups of layers should be {expected}, they are {shapes}")
        described, arrays = {}, {}
        for name, array in self._unquantized_arrays(layers, layouts, extras):
            kind, arrays[name] = unquantized.encode_array(array)
            described[name] = [kind, list(array.shape)]
        header = {
            "method": self.artifacts.method_name,
            "mlxkv": __version__,
            "artifacts": self.artifacts.fingerprint,
            **({"uncalibrated": recipe} if (recipe := self.artifacts.recipe) else {}),
            **layouts_json(layouts),
            **({} if self.quality is None else {"quality": self.quality}),
            **({} if self.window_quality is None else {"window_quality": self.window_quality}),
            "dtype": dtype,
            "raw": described,
            "meta": dict(meta),
        }
        return header, arrays, layouts

    def layouts(self, batch: int, tokens: int) -> list[Layout]:
        """Return the layouts of a cache that this encoder writes.

        Parameters
        ----------
        batch
            Number of sequences B.
        tokens
            Number of tokens of the text T.

        Returns
        -------
        list[Layout]
            One for each group of layers.
        """
        whole = Layout(batch, tokens, self.sinks, self.recent, block_tokens=max(1, BLOCK_ROWS // batch))
        return group_layouts(self.artifacts.spec, whole)

    def _unquantized_arrays(
        self, layers: Mapping[str, Layers], layouts: Sequence[Layout], extras: Mapping[str, np.ndarray]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yield sinks, recent tokens unless they are coded, and the extras, with their sections' names."""
        for index, layout in enumerate(layouts):
            yield from self.unquantized_tokens(layers, index, layout)
        clash = [name for name in extras if split_section(name)[1].startswith(("k.", "v."))]
        if clash:
            raise InputError(f"extras may not be called k.… or v.…, the codec's own names: {', '.join(clash)}")
        yield from extras.items()

    def unquantized_tokens(
        self, layers: Mapping[str, Layers], index: int, layout: Layout
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the sinks of a group of layers, and its recent tokens unless they are coded.

        Parameters
        ----------
        layers
            The cache.
        index
            Number of the group.
        layout
            Layout of its tokens.

        Yields
        ------
        tuple[str, np.ndarray]
            Name of the section, and an array `[layers, B, H, t, D]`.
        """
        for name in CACHE_SECTIONS if self.window_quality is None else SINK_SECTIONS:
            tokens = slice(0, layout.middle.start) if name.endswith("sink") else slice(layout.middle.stop, None)
            arrays = [unquantized.to_numpy(layer[:, :, tokens]) for layer in layers[stream_key(index, name[0])]]
            yield stream_key(index, name), np.stack(arrays)

    def coded_blocks(self, layouts: Sequence[Layout], first: int = 0) -> list[GroupBlock]:
        """Return all blocks to code, in the file's order.

        Parameters
        ----------
        layouts
            Layouts of the cache.
        first
            Blocks to leave out at the beginning of each group that keeps all tokens.

        Returns
        -------
        list[GroupBlock]
            Block by block those of the groups that keep all tokens, then those of each window.
        """
        whole: list[list[GroupBlock]] = []
        windows: list[GroupBlock] = []
        for index, (layout, group) in enumerate(zip(layouts, self.artifacts.spec.groups)):
            if not coded_streams(group):
                continue
            blocks = [GroupBlock(index, b) for b in layout.coded_blocks(self.quality, self.window_quality)]
            if group.window is None:
                whole.append(blocks[first:])
            else:
                windows += blocks
        return [*chain(*zip(*whole, strict=True)), *windows]

    def encode_sections(
        self,
        layers: Mapping[str, Layers],
        layouts: Sequence[Layout],
        arrays: Mapping[str, bytes],
        first: int,
        progress: Progress | None,
    ) -> list[tuple[Section, bytes]]:
        """Return sections in the file's order: sinks, blocks, and last the sections that change when a file grows.

        Parameters
        ----------
        layers
            The cache.
        layouts, arrays
            Layouts and unquantized arrays that `build_header` returned.
        first
            Number of blocks that are not coded, of each group that keeps all tokens; the file has them.
        progress
            Called with the number of tokens of each block of the main group that is quantized.

        Returns
        -------
        list[tuple[Section, bytes]]
            Table entries and stored bytes, as `mlxkv.io.container.encode_section` returns them.

        Raises
        ------
        InputError
            For values that cannot be coded.
        """
        stored = encode_arrays(arrays, self.lossless)
        groups = self.artifacts.spec.groups
        whole = [index for index, group in enumerate(groups) if group.window is None]
        first_names = [stream_key(index, name) for index in whole for name in SINK_SECTIONS]
        coded = self.encode_blocks(layers, layouts, self.coded_blocks(layouts, first), progress)
        return [*(stored.pop(name) for name in first_names), *coded, *stored.values()]

    def estimate(self, layers: Mapping[str, Layers], layouts: Sequence[Layout], blocks: Iterable[GroupBlock]) -> float:
        """Estimate how many bytes blocks take, from code lengths alone.

        Parameters
        ----------
        layers
            The cache.
        layouts
            Its layouts.
        blocks
            The blocks.

        Returns
        -------
        float
            Bytes, before the lossless stage of a method that uses one.
        """
        total = 0.0
        for index, block in blocks:
            coder = self.coders[index]
            codes = coder.encode(self._rows(layers, layouts[index], index, block), block.quality)
            total += sum(coder.estimate(name, each) for name, each in codes.items())
        return total

    def _rows(self, layers: Mapping[str, Layers], layout: Layout, index: int, block: CodedBlock) -> dict[str, mx.array]:
        """Return each stream's rows `[n, p]` of one block of a group."""
        rows = {}
        for stream in coded_streams(self.artifacts.spec.groups[index]):
            cached = layers[stream_key(index, stream.name)]
            if self.coders[index].undoes_rotation:
                rows[stream.name] = to_rows(stream, cached, block.start, block.stop, layout.start)
            else:
                rows[stream.name] = to_plain_rows(cached, block.start, block.stop)
        return rows

    def encode_blocks(
        self,
        layers: Mapping[str, Layers],
        layouts: Sequence[Layout] | Mapping[int, Layout],
        blocks: Iterable[GroupBlock],
        progress: Progress | None = None,
    ) -> list[tuple[Section, bytes]]:
        """Return the sections of coded blocks, in the order of blocks.

        Parameters
        ----------
        layers
            The cache.
        layouts
            Layouts of the groups of these blocks, by their number.
        blocks
            The blocks.
        progress
            Called with the number of tokens of each block of the main group that is quantized.

        Returns
        -------
        list[tuple[Section, bytes]]
            Table entries and stored bytes, as `mlxkv.io.container.encode_section` returns them.

        Raises
        ------
        InputError
            For values that cannot be coded.
        """
        needs_coding = self.coders[0].uses_lossless_stage
        coding = self.lossless if needs_coding else "raw"
        may_launch_kernels = metal.available() and not (needs_coding and coding != "rans")

        def section(coder: BlockCoder, name: str, key: str, codes: np.ndarray) -> tuple[Section, bytes]:
            return encode_section(key, coder.pack(name, codes), coding)

        with ThreadPoolExecutor(2) as pool:
            submit = _run_now if may_launch_kernels else pool.submit
            futures: list[Future[tuple[Section, bytes]]] = []
            for index, block in blocks:
                coder, rows = self.coders[index], self._rows(layers, layouts[index], index, block)
                for name, codes in coder.encode(rows, block.quality).items():
                    if len(futures) >= MAX_PENDING:  # wait for the coding rather than let codes pile up
                        futures[-MAX_PENDING].result()
                    futures.append(submit(section, coder, name, f"{stream_key(index, name)}.{block.name}", codes))
                if progress and not index:
                    progress(block.stop - block.start)
            return [future.result() for future in futures]


def layouts_json(layouts: Sequence[Layout]) -> dict[str, Any]:
    """Return the fields of a container's header that describe layouts.

    Parameters
    ----------
    layouts
        Those of all groups of layers.

    Returns
    -------
    dict
        `layout` of the main group, and `groups`, a list with those of the others, where there are any.
    """
    first, *others = (layout.to_json() for layout in layouts)
    return {"layout": first, **({"groups": others} if others else {})}


def _of_group(layers: Mapping[str, Layers], group: int) -> dict[str, Layers]:
    """Return the layers of one group by stream."""
    return {name: layers[stream_key(group, name)] for name in STREAMS}


def encode_arrays(arrays: Mapping[str, bytes], lossless: str) -> dict[str, tuple[Section, bytes]]:
    """Return sections of unquantized arrays.

    Parameters
    ----------
    arrays
        Bytes by name.
    lossless
        Coding of sinks and recent tokens. Other arrays are stored plain, as only the file's size bounds them on reading.

    Returns
    -------
    dict[str, tuple[Section, bytes]]
        Table entries and stored bytes by name, as `mlxkv.io.container.encode_section` returns them.
    """
    return {
        name: encode_section(name, data, lossless if split_section(name)[1] in CACHE_SECTIONS else "raw")
        for name, data in arrays.items()
    }


def _run_now(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Run a function in this thread: rANS may launch Metal kernels, which have to come from the thread of the others."""
    future: Future[Any] = Future()
    future.set_result(function(*arguments))
    return future

"""Writing a compressed cache: header and sections, block by block.

Entropy coding of one block runs in parallel with the arithmetic of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlxkv.codec import unquantized
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.layout import BLOCK_ROWS, CodedBlock, Layers, Layout, cache_shape
from mlxkv.codec.methods.base import BlockCoder
from mlxkv.codec.stages.rows import to_rows
from mlxkv.codec.unquantized import CACHE_SECTIONS, SINK_SECTIONS
from mlxkv.errors import InputError
from mlxkv.io.container import Section, encode_section
from mlxkv.kernels import metal
from mlxkv.version import __version__

Progress = Callable[[int], None]
MAX_PENDING = 8  # sections that wait to be entropy-coded, at most


@dataclass(frozen=True)
class CacheEncoder:
    """Encoder of caches to the header and the sections of a container.

    Parameters
    ----------
    artifacts
        The calibration.
    coder
        Its coder of blocks.
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
    coder: BlockCoder
    recent: int
    sinks: int
    lossless: str
    quality: float | None
    window_quality: float | None

    def build_header(
        self, layers: Mapping[str, Layers], extras: Mapping[str, np.ndarray], meta: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, bytes], Layout]:
        """Return the header of a cache and the arrays that are stored unquantized.

        Parameters
        ----------
        layers
            Cached tensors `[B, H, T, D]` of each stream, one for each caching layer.
        extras
            Arrays to store unquantized, by name.
        meta
            JSON values to store in the header.

        Returns
        -------
        tuple[dict, dict[str, bytes], Layout]
            The header's own fields, the bytes of unquantized arrays by section, and the layout.

        Raises
        ------
        InputError
            For extras that cannot be stored.
        MismatchError
            When the layers do not fit the artifacts.
        """
        batch, length, dtype = cache_shape(layers, self.artifacts.spec)
        layout = Layout(batch, length, self.sinks, self.recent, block_tokens=max(1, BLOCK_ROWS // batch))
        described, arrays = {}, {}
        for name, array in self._unquantized_arrays(layers, layout, extras):
            kind, arrays[name] = unquantized.encode_array(array)
            described[name] = [kind, list(array.shape)]
        header = {
            "method": self.artifacts.method_name,
            "mlxkv": __version__,
            "artifacts": self.artifacts.fingerprint,
            "layout": layout.to_json(),
            **({} if self.quality is None else {"quality": self.quality}),
            **({} if self.window_quality is None else {"window_quality": self.window_quality}),
            "dtype": dtype,
            "raw": described,
            "meta": dict(meta),
        }
        return header, arrays, layout

    def _unquantized_arrays(
        self, layers: Mapping[str, Layers], layout: Layout, extras: Mapping[str, np.ndarray]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yield sinks, recent tokens unless they are coded, and the extras, with their sections' names."""
        for name in CACHE_SECTIONS if self.window_quality is None else SINK_SECTIONS:
            tokens = slice(0, layout.middle.start) if name.endswith("sink") else slice(layout.middle.stop, None)
            yield name, np.stack([unquantized.to_numpy(layer[:, :, tokens]) for layer in layers[name[0]]])
        clash = [name for name in extras if name.startswith(("k.", "v."))]
        if clash:
            raise InputError(f"extras may not be called k.… or v.…, the codec's own names: {', '.join(clash)}")
        yield from extras.items()

    def coded_blocks(self, layout: Layout) -> list[CodedBlock]:
        """Return all blocks to code.

        Parameters
        ----------
        layout
            Layout of the cache.

        Returns
        -------
        list[CodedBlock]
            Blocks with their qualities, in the order of tokens.
        """
        return list(layout.coded_blocks(self.quality, self.window_quality))

    def encode_sections(
        self,
        layers: Mapping[str, Layers],
        layout: Layout,
        arrays: Mapping[str, bytes],
        first: int,
        progress: Progress | None,
    ) -> list[tuple[Section, bytes]]:
        """Return sections in the file's order: sinks, blocks, and last the sections that change when a file grows.

        Parameters
        ----------
        layers
            Cached tensors `[B, H, T, D]` of each stream, one for each caching layer.
        layout, arrays
            Layout and unquantized arrays that `build_header` returned.
        first
            Index of the first block to code; the file has those before it.
        progress
            Called with the number of tokens of each block that is quantized.

        Returns
        -------
        list[tuple[Section, bytes]]
            Table entries and stored bytes, as `mlxkv.io.container.encode_section` returns them.

        Raises
        ------
        InputError
            For values that cannot be coded.
        """
        stored, blocks = encode_arrays(arrays, self.lossless), self.coded_blocks(layout)[first:]
        coded = encode_blocks(self.coder, partial(self._rows, layers), blocks, self.lossless, progress)
        return [*(stored.pop(name) for name in SINK_SECTIONS), *coded, *stored.values()]

    def estimate(self, layers: Mapping[str, Layers], blocks: Iterable[CodedBlock]) -> float:
        """Estimate how many bytes blocks take, from code lengths alone.

        Parameters
        ----------
        layers
            Cached tensors `[B, H, T, D]` of each stream, one for each caching layer.
        blocks
            The blocks.

        Returns
        -------
        float
            Bytes, before the lossless stage of a method that uses one.
        """
        encoded = (self.coder.encode(self._rows(layers, block), block.quality) for block in blocks)
        return sum(self.coder.estimate(name, codes) for streams in encoded for name, codes in streams.items())

    def _rows(self, layers: Mapping[str, Layers], block: CodedBlock) -> dict[str, mx.array]:
        """Return each stream's rows `[n, p]` of one block."""
        streams = self.artifacts.coded_streams
        return {stream.name: to_rows(stream, layers[stream.name], block.start, block.stop) for stream in streams}


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
        name: encode_section(name, data, lossless if name in CACHE_SECTIONS else "raw") for name, data in arrays.items()
    }


def encode_blocks(
    coder: BlockCoder,
    rows: Callable[[CodedBlock], Mapping[str, mx.array]],
    blocks: Iterable[CodedBlock],
    lossless: str,
    progress: Progress | None,
) -> list[tuple[Section, bytes]]:
    """Return the sections of coded blocks.

    Parameters
    ----------
    coder
        The method's coder.
    rows
        Called with a block; returns each stream's rows `[n, p]` float32.
    blocks
        The blocks.
    lossless
        Lossless coding, for methods that use one.
    progress
        Called with the number of tokens of each block that is quantized.

    Returns
    -------
    list[tuple[Section, bytes]]
        Table entries and stored bytes in the order of blocks, as `mlxkv.io.container.encode_section` returns them.
    """
    coding = lossless if coder.uses_lossless_stage else "raw"
    may_launch_kernels = metal.available() and not (coder.uses_lossless_stage and coding != "rans")

    def section(name: str, codes: np.ndarray) -> tuple[Section, bytes]:
        return encode_section(name, coder.pack(name[0], codes), coding)

    with ThreadPoolExecutor(2) as pool:
        submit = _run_now if may_launch_kernels else pool.submit
        futures: list[Future[tuple[Section, bytes]]] = []
        for block in blocks:
            for name, codes in coder.encode(rows(block), block.quality).items():
                if len(futures) >= MAX_PENDING:  # wait for the coding rather than let codes pile up
                    futures[-MAX_PENDING].result()
                futures.append(submit(section, f"{name}.{block.name}", codes))
            if progress:
                progress(block.stop - block.start)
        return [future.result() for future in futures]


def _run_now(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Run a function in this thread: rANS may launch Metal kernels, which have to come from the thread of the others."""
    future: Future[Any] = Future()
    future.set_result(function(*arguments))
    return future

"""The codec: a cache to one container and back, block of tokens by block of tokens.

Sinks (the first s tokens) and the window (the last w) are stored as they are, or the window at a higher quality; the tokens
between are coded by the method of the artifacts. A block's streams are sections of their own, so memory stays at a few blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxkv.codec import raw, reading, writing
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.layout import BLOCK, Layers, Layout, Piece, cache_shape
from mlxkv.codec.stages.rows import from_rows, to_rows
from mlxkv.codec.writing import Progress
from mlxkv.config import is_int
from mlxkv.dump import KVDump
from mlxkv.errors import FormatError, InputError, MismatchError
from mlxkv.io import container
from mlxkv.io.atomic import replace_tail
from mlxkv.io.container import Reader, Section, Source, encode_section
from mlxkv.io.lossless import CODINGS
from mlxkv.spec import STREAMS, Rope, check_rope
from mlxkv.version import __version__

TABLE_ROW_BYTES = 70  # bytes of a section's row in the header, about


class CacheCodec:
    """Compress and decompress caches of one model with one calibration.

    artifacts: the calibration. w, s, lossless: raw window, raw sinks and lossless coding (one of lossless.CODINGS) for
    compressing; quality: for methods that have one, which also code the window, at a higher one, unless it is to be a
    raw_window. A blob decodes with those it was written with.
    rope_cfg, mode: optional statements about the model (a preset's), refused when the artifacts differ. Raises
    MismatchError for artifacts, geometry or model that do not belong together.
    """

    def __init__(self, artifacts: CalibrationArtifacts, recent: int = 128, sinks: int = 4,
                 rope_cfg: Rope | Mapping[str, Any] | None = None, mode: str | None = None,
                 lossless: str = "deflate", quality: float | None = None, raw_window: bool = False) -> None:  # fmt: skip
        if not is_int(recent) or not is_int(sinks):
            raise InputError(f"recent and sinks must be 0 or more, got {recent} and {sinks}")
        if lossless not in CODINGS:
            raise InputError(f"the lossless coding must be one of {', '.join(CODINGS)}, not {lossless!r}")
        if mode not in (None, artifacts.spec.mode):
            raise MismatchError(f"the artifacts are {artifacts.spec.mode}, not {mode}")
        if rope_cfg is not None:
            check_rope(artifacts.spec, rope_cfg)
        self.artifacts, self.recent, self.sinks, self.lossless = artifacts, recent, sinks, lossless
        self.streams = [artifacts.spec.stream(name) for name in STREAMS if artifacts.spec.stream(name).width]
        self.coder = artifacts.coder()
        self.quality = self.coder.default_quality if quality is None else quality
        self.coder.check_quality(self.quality)
        self.raw_window = raw_window

    @property
    def window_quality(self) -> float | None:
        """Of the last w tokens; None where they are stored as they are."""
        bonus = self.coder.window_quality_bonus
        return None if bonus is None or self.quality is None or self.raw_window else min(100.0, self.quality + bonus)

    def with_quality(self, quality: float) -> CacheCodec:
        """The same codec with another quality."""
        self.coder.check_quality(quality)
        other = copy.copy(self)
        other.quality = quality
        return other

    def compress(self, k_layers: Layers, v_layers: Layers, *, meta: Mapping[str, Any] | None = None,
                 extras: Mapping[str, np.ndarray] | None = None, progress: Progress | None = None) -> bytes:  # fmt: skip
        """One container from keys and values, each a list of `[B, H, T, D]` arrays (NumPy or MLX), one a layer.

        meta and extras (arrays) travel along unchanged. progress is told the tokens done.
        """
        layers = {"k": k_layers, "v": v_layers}
        header, arrays, layout = self._build_header(layers, extras or {}, meta or {})
        out = BytesIO()
        try:
            container.write(out, header, self._sections(layers, layout, arrays, 0, progress))
        except (TypeError, ValueError) as error:
            raise InputError(f"meta must be plain JSON values: {error}") from None
        return out.getvalue()

    def fixed_bytes(self, dump: KVDump) -> int:
        """About what a file holds besides coded tokens, whatever the quality."""
        extras, meta = self._dump_metadata(dump)
        header, arrays, layout = self._build_header({"k": list(dump.k), "v": list(dump.v)}, extras, meta)
        sections = self._encode_arrays(arrays)
        table = TABLE_ROW_BYTES * (len(sections) + len(self.streams) * len(self._pieces(layout)))
        return sum(section.stored for section, _ in sections.values()) + len(str(header)) + table

    def coded_bytes(self, dump: KVDump, blocks: int) -> float:
        """About what the coded tokens take, from the code lengths of so many blocks, spread evenly, and of the window."""
        layers = {"k": list(dump.k), "v": list(dump.v)}
        layout = self._build_header(layers, {}, {})[2]
        every = list(layout.pieces(self.quality, None))
        chosen = [every[i] for i in np.unique(np.linspace(0, len(every) - 1, blocks).astype(int))] if every else []

        def taken(pieces: list[Piece]) -> float:
            coded = (self.coder.encode(self._rows(layers, piece), piece.quality) for piece in pieces)
            return sum(self.coder.estimate(name, codes) for streams in coded for name, codes in streams.items())

        measured = sum(piece.stop - piece.start for piece in chosen)
        return taken(chosen) * len(layout.middle) / max(1, measured) + taken(self._pieces(layout)[len(every) :])

    def append_dump(self, path: str | Path, dump: KVDump, progress: Progress | None = None) -> None:
        """Bring a file of `compress_dump` up to a dump of the same conversation gone on: the file becomes what
        compressing the dump would make, but its whole blocks are neither coded nor written again.

        Raises MismatchError when the file was made with other artifacts, settings or tokens.
        """
        extras, meta = self._dump_metadata(dump)
        layers = {"k": list(dump.k), "v": list(dump.v)}
        header, arrays, layout = self._build_header(layers, extras, meta)
        with Reader(path) as reader:
            reading.check_origin(reader, self.artifacts)
            old = reading.read_layout(reader)
            if not np.array_equal(raw.read_extra(reader, "tokens"), dump.tokens[:, : old.length]):
                raise MismatchError(f"{path} is of other tokens than those that the dump begins with")
            expected = {**header, "layout": {**header["layout"], "length": old.length}, "raw": reader.header["raw"]}
            if changed := [key for key in {**expected, **reader.header} if reader.header.get(key) != expected.get(key)]:
                raise MismatchError(f"{path} was made with another {', '.join(changed)}: compress the dump anew")
            whole = sum(stop - start == layout.block for _, start, stop in old.blocks())
            names = [f"{name}.{index}" for index in range(whole) for name in (stream.name for stream in self.streams)]
            names = [*raw.SINKS, *names] if old.middle.start == layout.middle.start else []
            kept = list(reader.sections.values())[: len(names)]
            if [section.name for section in kept] != names:
                raise FormatError(f"{path} has its sections in another order than they are written in")
            keep = reader.end_of(kept)
        sections = self._sections(layers, layout, arrays, whole, progress)
        fresh = [(section, data) for section, data in sections if section.name not in names]
        replace_tail(path, keep, container.encode_tail(header, kept, fresh))

    def _build_header(
        self, layers: Mapping[str, Layers], extras: Mapping[str, np.ndarray], meta: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, bytes], Layout]:
        """The header's own fields, and the bytes of all that is stored as it is."""
        batch, length, dtype = cache_shape(layers, self.artifacts.spec)
        layout = Layout(batch, length, self.sinks, self.recent, block=max(1, BLOCK // batch))
        described, arrays = {}, {}
        for name, array in self._raw_arrays(layers, layout, extras):
            kind, arrays[name] = raw.encode(array)
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

    def _sections(self, layers: Mapping[str, Layers], layout: Layout, arrays: Mapping[str, bytes], first: int,
                  progress: Progress | None) -> list[tuple[Section, bytes]]:  # fmt: skip
        """In the file's order: sinks, blocks from the `first` on, and last what changes when a file grows."""
        stored, pieces = self._encode_arrays(arrays), self._pieces(layout)[first:]
        coded = writing.encode_sections(self.coder, partial(self._rows, layers), pieces, self.lossless, progress)
        return [*(stored.pop(name) for name in raw.SINKS), *coded, *stored.values()]

    def _pieces(self, layout: Layout) -> list[Piece]:
        return list(layout.pieces(self.quality, self.window_quality))

    def _encode_arrays(self, arrays: Mapping[str, bytes]) -> dict[str, tuple[Section, bytes]]:
        """Extras are stored plain: on reading, nothing but the file's own size bounds them."""
        return {
            name: encode_section(name, data, self.lossless if name in raw.ENDS else "raw")
            for name, data in arrays.items()
        }

    def _rows(self, layers: Mapping[str, Layers], piece: Piece) -> dict[str, mx.array]:
        return {stream.name: to_rows(stream, layers[stream.name], piece.start, piece.stop) for stream in self.streams}

    def decompress(
        self, blob: Source, *, tokens: tuple[int, int] | None = None, progress: Progress | None = None
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Keys and values of a container (bytes, or a file's path) as lists of `[B, H, T, D]` NumPy arrays.

        tokens: only those from the first number up to the second, whose blocks alone are read. The dtype is the one
        compressed, except that bfloat16, which NumPy lacks, comes back as float32.
        """
        with Reader(blob) as reader:
            arrays, _ = self._decode(reader, tokens, progress)
        return list(arrays["k"]), list(arrays["v"])

    def compress_dump(self, dump: KVDump, progress: Progress | None = None) -> bytes:
        """A whole dump: also its tokens, other layers' states and origin, but not its sensitivity."""
        extras, meta = self._dump_metadata(dump)
        return self.compress(list(dump.k), list(dump.v), meta=meta, extras=extras, progress=progress)

    def _dump_metadata(self, dump: KVDump) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """What goes along with keys and values, once the dump is known to fit the artifacts."""
        expected = self.artifacts.meta.get("model_fingerprint", "")
        if dump.fingerprint != expected:
            raise MismatchError(
                f"the cache is of {dump.model} ({dump.fingerprint}), the artifacts of {self.artifacts.meta.get('model')} ({expected})"
            )
        if dump.spec != self.artifacts.spec:
            raise MismatchError("the cache's layers, heads or rotation differ from the artifacts'")
        if dump.start:
            raise InputError(f"the dump starts at token {dump.start}: compress a whole one")
        meta = {"model": dump.model, "fingerprint": dump.fingerprint, "dtype": dump.dtype}
        return {"tokens": dump.tokens, **{f"state.{key}": value for key, value in dump.states.items()}}, meta

    def decompress_dump(
        self, blob: Source, progress: Progress | None = None, *, tokens: tuple[int, int] | None = None
    ) -> KVDump:
        """The inverse of `compress_dump`; of a part of the tokens as `decompress` says, with other layers' states, which
        are those behind the last token, only where that is in it. Raises FormatError for a container without tokens."""
        with Reader(blob) as reader:
            arrays, (start, stop) = self._decode(reader, tokens, progress)
            described = reading.header_object(reader, "raw")
            extras = {name: raw.read_extra(reader, name) for name in described if name not in raw.ENDS}
            meta, length = reading.header_object(reader, "meta"), reading.read_layout(reader).length
        held = extras.pop("tokens", None)
        if held is None or held.dtype != np.int32 or held.shape[1:] != (length,):
            raise FormatError(f"{reader.name} holds no tokens: it was made by compress(), open it with decompress()")
        states = {name.removeprefix("state."): array for name, array in extras.items() if name.startswith("state.")}
        model, mark, dtype = (str(meta.get(key, "")) for key in ("model", "fingerprint", "dtype"))
        return KVDump(
            arrays["k"], arrays["v"], self.artifacts.spec, held[:, start:stop], model, mark, dtype,
            states if stop == length else {}, start=start,
        )  # fmt: skip

    def _decode(
        self, reader: Reader, tokens: tuple[int, int] | None, progress: Progress | None
    ) -> tuple[dict[str, np.ndarray], tuple[int, int]]:
        """The k and v streams, `[layers, B, H, T, D]` each, and which tokens they are."""
        reading.check_origin(reader, self.artifacts)
        layout, dtype = reading.read_layout(reader), reading.read_dtype(reader)
        every = reading.read_pieces(reader, layout, self.artifacts.spec, self.coder)
        first, last = tokens or (0, layout.length)
        if not 0 <= first < last <= layout.length:
            raise InputError(f"{reader.name} holds tokens 0 to {layout.length}; {first} to {last} is no part of them")
        ends = reading.read_ends(reader, layout, self.artifacts.spec)
        outputs: dict[str, np.ndarray] = {}

        def place(name: str, start: int, array: np.ndarray) -> None:
            a, b = max(start, first), min(start + array.shape[3], last)
            if a < b:
                outputs[name][..., a - first : b - first, :] = array[..., a - start : b - start, :]

        for name in STREAMS:
            stream = self.artifacts.spec.stream(name)
            outputs[name] = np.empty((stream.layers, layout.batch, stream.heads, last - first, stream.dim), dtype)
            place(name, 0, ends[f"{name}.sink"])
            if f"{name}.window" in ends:
                place(name, layout.middle.stop, ends[f"{name}.window"])
        target = mx.float16 if dtype == np.float16 else mx.float32
        for pieces in layout.groups(every, first, last):
            payloads = [{s.name: reader.read(f"{s.name}.{piece.name}") for s in self.streams} for piece in pieces]
            counts = [layout.batch * (piece.stop - piece.start) for piece in pieces]
            for codes, count, piece in zip(self.coder.unpack(payloads, counts), counts, pieces):
                rows = self.coder.decode(codes, count, piece.quality)
                for stream in self.streams:
                    restored = from_rows(stream, rows[stream.name], layout.batch, piece.start, target)
                    place(stream.name, piece.start, np.array(restored))
                if progress:
                    progress(piece.stop - piece.start)
        return outputs, (first, last)

    def _raw_arrays(
        self, layers: Mapping[str, Layers], layout: Layout, extras: Mapping[str, np.ndarray]
    ) -> Iterator[tuple[str, np.ndarray]]:
        for name in raw.ENDS if self.window_quality is None else raw.SINKS:
            tokens = slice(0, layout.middle.start) if name.endswith("sink") else slice(layout.middle.stop, None)
            yield name, np.stack([raw.to_numpy(layer[:, :, tokens]) for layer in layers[name[0]]])
        clash = [name for name in extras if name.startswith(("k.", "v."))]
        if clash:
            raise InputError(f"extras may not be called k.… or v.…, the codec's own names: {', '.join(clash)}")
        yield from extras.items()

"""The codec: a cache to one container and back, one block of tokens after another.

Each group of layers of one shape is coded like a cache of its own. Sinks (the first tokens) are stored unquantized. Recent tokens (the newest) are stored unquantized or coded at a higher
quality. The tokens between are coded by the method of the artifacts. Each stream of a block is a section of its own, so
memory holds only a few blocks at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Self

import numpy as np

from mlxkv.codec import continuing, reading, unquantized, writing
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.layout import Layers, coded_streams
from mlxkv.codec.unquantized import CACHE_SECTIONS
from mlxkv.codec.writing import CacheEncoder, GroupBlock, Progress
from mlxkv.dump import KVDump, read_rings, read_state_types, stream_key
from mlxkv.errors import FormatError, InputError, MismatchError, suggest
from mlxkv.io import container
from mlxkv.io.container import Reader, Source
from mlxkv.io.growing import appending
from mlxkv.io.lossless import CODINGS
from mlxkv.spec import Rope, check_rope, is_int

TABLE_ROW_BYTES = 70  # of a section's entry in the header, approximately


class CacheCodec:
    """Compress and decompress caches of one model with one calibration.

    These settings apply to compression. Decompression uses the layout, coding and quality that the file names.

    Parameters
    ----------
    artifacts
        The calibration.
    recent
        Newest tokens, stored unquantized or coded at a higher quality; 0 or more.
    sinks
        First tokens to store unquantized; 0 or more.
    rope_cfg, mode
        Expected rotation and mode ("dual_stream" or "single_stream"), such as those of a model preset, checked against the
        artifacts; None skips the check.
    lossless
        Lossless coding, one of `mlxkv.io.lossless.CODINGS`.
    quality
        0 to 100, for methods that have a quality; None for the method's default.
    raw_window
        Store recent tokens unquantized even if the method can code them at a higher quality.

    Attributes
    ----------
    coder
        The method's coder of blocks of the main group of layers.

    Raises
    ------
    InputError
        For arguments out of range.
    MismatchError
        When the artifacts have another rotation or mode than expected.
    """

    def __init__(
        self,
        artifacts: CalibrationArtifacts,
        recent: int = 128,
        sinks: int = 4,
        rope_cfg: Rope | Mapping[str, Any] | None = None,
        mode: str | None = None,
        lossless: str = "deflate",
        quality: float | None = None,
        raw_window: bool = False,
    ) -> None:
        if not is_int(recent) or not is_int(sinks):
            raise InputError(f"recent and sinks must be 0 or more, got {recent} and {sinks}")
        if lossless not in CODINGS:
            raise InputError(f"there is no lossless coding {str(lossless)[:80]!r}", suggest(lossless, CODINGS))
        if mode not in (None, artifacts.spec.mode):
            raise MismatchError(f"the artifacts are {artifacts.spec.mode}, not {mode}")
        if rope_cfg is not None:
            check_rope(artifacts.spec, rope_cfg)
        self.artifacts, self.recent, self.sinks, self.lossless = artifacts, recent, sinks, lossless
        self._coders = tuple(artifacts.coder(group) for group in range(len(artifacts.spec.groups)))
        self.coder = self._coders[0]
        self.quality = self.coder.default_quality if quality is None else quality
        self.coder.check_quality(self.quality)
        self.raw_window = raw_window

    @property
    def window_quality(self) -> float | None:
        """Quality of the recent tokens; None where they are stored unquantized."""
        bonus = self.coder.window_quality_bonus
        return None if bonus is None or self.quality is None or self.raw_window else min(100.0, self.quality + bonus)

    def with_quality(self, quality: float) -> Self:
        """Return a copy of the codec with another quality.

        Parameters
        ----------
        quality
            0 to 100.

        Returns
        -------
        CacheCodec
            A copy that shares the artifacts.

        Raises
        ------
        InputError
            When the method does not have this quality.
        """
        self.coder.check_quality(quality)
        other = copy.copy(self)
        other.quality = quality
        return other

    def compress(
        self,
        k_layers: Layers,
        v_layers: Layers,
        *,
        meta: Mapping[str, Any] | None = None,
        extras: Mapping[str, np.ndarray] | None = None,
        progress: Progress | None = None,
    ) -> bytes:
        """Compress keys and values to one container.

        Parameters
        ----------
        k_layers, v_layers
            Keys and values, a list of `[B, H, T, D]` arrays (NumPy or MLX) each, one for each caching layer. Layers of
            several shapes, and those with a window, need `compress_dump`.
        meta
            JSON values to store in the header, unchanged.
        extras
            Arrays of float16, float32, integers or bool to store by name, unchanged. Names beginning with "k." or "v." are
            reserved.
        progress
            Called with the number of tokens of each block that is done.

        Returns
        -------
        bytes
            The container.

        Raises
        ------
        InputError
            For values that cannot be coded, and for meta or extras that cannot be stored.
        MismatchError
            When the layers do not fit the artifacts.
        """
        groups = self.artifacts.spec.groups
        if len(groups) > 1 or groups[0].window is not None:
            raise InputError("layers of several shapes or with a window are compressed as a dump: use compress_dump()")
        return self._compress({"k": k_layers, "v": v_layers}, None, extras or {}, meta or {}, progress)

    def _compress(
        self,
        layers: Mapping[str, Layers],
        tokens: int | None,
        extras: Mapping[str, np.ndarray],
        meta: Mapping[str, Any],
        progress: Progress | None,
    ) -> bytes:
        """Compress the layers of all groups, of a text of so many tokens, to one container."""
        encoder = self._encoder
        header, arrays, layouts = encoder.build_header(layers, tokens, extras, meta)
        out = BytesIO()
        try:
            container.write(out, header, encoder.encode_sections(layers, layouts, arrays, 0, progress))
        except (TypeError, ValueError) as error:
            raise InputError(f"meta must be plain JSON values: {error}") from None
        return out.getvalue()

    def compress_dump(
        self, dump: KVDump, progress: Progress | None = None, *, notes: Mapping[str, Any] | None = None
    ) -> bytes:
        """Compress a dump with its tokens, other layers' states and origin, but without its sensitivity.

        Parameters
        ----------
        dump
            A cache from position 0 on.
        progress
            Called with the number of tokens of each block that is done.
        notes
            JSON values to store in the header as they are, such as the messages of a conversation.

        Returns
        -------
        bytes
            The container.

        Raises
        ------
        InputError
            For values that cannot be coded, notes that cannot be stored, and a dump that does not start at position 0.
        MismatchError
            When the dump is of another model than the artifacts.
        """
        if dump.start:
            raise InputError(f"the dump starts at token {dump.start}: compress a complete one")
        extras, meta = self._dump_metadata(dump, notes)
        return self._compress(continuing.dump_layers(dump), dump.length, extras, meta, progress)

    def append_dump(self, path: str | Path, dump: KVDump, progress: Progress | None = None, *,
                    notes: Mapping[str, Any] | None = None, rewind: bool = False) -> int:  # fmt: skip
        """Extend a file by the new tokens of a longer dump.

        The result equals compressing the longer dump, but complete blocks of the file are neither coded nor written
        again, except those of layers with a window. If the process is killed at any time, the file is the old one or the new one.

        Parameters
        ----------
        path
            File that `compress_dump` or `append_dump` wrote with the settings of this codec.
        dump
            The longer dump, which begins with the tokens of the file; or the last part of it, from `append_start` on.
        progress
            Called with the number of tokens of each block that is done.
        notes
            JSON values to store in the header; None for those that are there.
        rewind
            Let the dump differ from the file's last tokens, or end before them: what both begin with stays.

        Returns
        -------
        int
            Bytes of the file's new end. They are written twice, to a journal and to the file.

        Raises
        ------
        MismatchError
            When the file was made with other artifacts, settings or tokens.
        FormatError
            When it is damaged.
        InputError
            When it cannot be read or written, and for values that cannot be coded.
        """
        extras, meta = self._dump_metadata(dump, notes)
        with appending(path) as append:
            with Reader(path) as reader:
                keep, tail = continuing.append_tail(
                    reader, self._encoder, dump, extras, meta, rewind=rewind, progress=progress
                )
            append.replace_tail(keep, tail)
        return len(tail)

    def append_start(self, path: str | Path, tokens: Sequence[int]) -> int:
        """Return where a part of a longer dump may begin that `append_dump` takes.

        Parameters
        ----------
        path
            File that `append_dump` is to extend.
        tokens
            Token ids of the whole conversation, for which a rewind is allowed.

        Returns
        -------
        int
            Position of the first token that is not in a complete block of the file; 0 where nothing of it stays.

        Raises
        ------
        MismatchError
            When the file was made with other artifacts.
        FormatError
            When it is damaged.
        InputError
            When it cannot be read.
        """
        with Reader(path) as reader:
            return continuing.find_continued(reader, self._encoder, 0, np.array([tokens], np.int32), True).start

    def decompress(
        self,
        blob: Source,
        *,
        tokens: tuple[int, int] | None = None,
        progress: Progress | None = None,
        limit: int | None = None,
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Decompress keys and values.

        Parameters
        ----------
        blob
            A container's bytes, or the path of its file.
        tokens
            First token and the token after the last one; only their blocks are read. None for all.
        progress
            Called with the number of tokens of each block that is done.
        limit
            Bytes that the arrays may have; None for 256 MiB or 200 times the container's own, whichever is more.

        Returns
        -------
        tuple[list[np.ndarray], list[np.ndarray]]
            Keys and values, `[B, H, T, D]` of each layer of the main group, of the type that was compressed; bfloat16, which
            NumPy lacks, comes back as float32.

        Raises
        ------
        InputError
            For a file that cannot be opened, tokens that it does not have, or more bytes than the limit.
        FormatError
            When the container is damaged or of another kind.
        MismatchError
            When it was made with other artifacts.
        """
        with Reader(blob) as reader:
            decoded = reading.decode_tokens(
                reader, self.artifacts, self._coders, tokens, progress, limit, main_only=True
            )
        return list(decoded.arrays["k"]), list(decoded.arrays["v"])

    def decompress_dump(
        self,
        blob: Source,
        progress: Progress | None = None,
        *,
        tokens: tuple[int, int] | None = None,
        limit: int | None = None,
    ) -> KVDump:
        """Decompress a file of `compress_dump` to a dump.

        Parameters
        ----------
        blob
            A container's bytes, or the path of its file.
        progress
            Called with the number of tokens of each block that is done.
        tokens
            First token and the token after the last one; only their blocks are read. None for all.
        limit
            Bytes that keys and values may have; None for 256 MiB or 200 times the container's own, whichever is more.

        Returns
        -------
        KVDump
            The cache of these tokens. Other layers' states, and windows, belong to the last token of the file: a part that
            does not include it has none.

        Raises
        ------
        InputError
            For a file that cannot be opened, tokens that it does not have, or more bytes than the limit.
        FormatError
            When the container is damaged, of another kind, or was made by `compress`, without tokens.
        MismatchError
            When it was made with other artifacts.
        """
        with Reader(blob) as reader:
            decoded = reading.decode_tokens(reader, self.artifacts, self._coders, tokens, progress, limit)
            described = reading.header_object(reader, "raw")
            groups = range(len(self.artifacts.spec.groups))
            own = {stream_key(group, name) for group in groups for name in CACHE_SECTIONS}
            extras = {name: unquantized.read_plain_array(reader, name) for name in described if name not in own}
            meta = reading.header_object(reader, "meta")
        arrays, start, stop, length = decoded
        ids = extras.pop("tokens", None)
        if ids is None or ids.dtype != np.int32 or ids.shape[1:] != (length,):
            raise FormatError(f"{reader.name} holds no tokens: it was made by compress(), open it with decompress()")
        types, rings = read_state_types(meta, reader.name), read_rings(meta, reader.name)
        states = {name.removeprefix("state."): array for name, array in extras.items() if name.startswith("state.")}
        states = {key: unquantized.to_type(array, types.get(key), reader.name) for key, array in states.items()}
        at_end = stop == length
        return KVDump(
            arrays.pop("k"),
            arrays.pop("v"),
            self.artifacts.spec,
            ids[:, start:stop],
            model=str(meta.get("model", "")),
            fingerprint=str(meta.get("fingerprint", "")),
            dtype=str(meta.get("dtype", "")),
            states=states if at_end else {},
            start=start,
            state_types=types if at_end else {},
            others=arrays,
            rings=rings if at_end else {},
        )

    def fixed_bytes(self, dump: KVDump) -> int:
        """Estimate the bytes of a file apart from coded tokens; they do not depend on the quality.

        Parameters
        ----------
        dump
            The cache to compress.

        Returns
        -------
        int
            Bytes of header and unquantized sections.
        """
        extras, meta = self._dump_metadata(dump)
        encoder = self._encoder
        header, arrays, layouts = encoder.build_header(continuing.dump_layers(dump), dump.length, extras, meta)
        sections = writing.encode_arrays(arrays, self.lossless)
        groups = self.artifacts.spec.groups
        coded_sections = sum(len(coded_streams(groups[index])) for index, _ in encoder.coded_blocks(layouts))
        table = TABLE_ROW_BYTES * (len(sections) + coded_sections)
        return sum(section.stored for section, _ in sections.values()) + len(str(header)) + table

    def coded_bytes(self, dump: KVDump, blocks: int) -> float:
        """Estimate the bytes of the coded tokens from code lengths alone.

        Parameters
        ----------
        dump
            The cache to compress.
        blocks
            Number of evenly spaced blocks of each group's middle to measure; the blocks of recent tokens are always measured.

        Returns
        -------
        float
            Bytes, before the lossless stage of a method that uses one.
        """
        layers, encoder = continuing.dump_layers(dump), self._encoder
        layouts = encoder.build_header(layers, dump.length, {}, {})[2]
        total = 0.0
        for index, layout in enumerate(layouts):
            if not coded_streams(self.artifacts.spec.groups[index]):
                continue
            middle = list(layout.coded_blocks(self.quality, None))
            chosen = np.linspace(0, len(middle) - 1, blocks if middle else 0).astype(int)
            sample = [GroupBlock(index, middle[i]) for i in np.unique(chosen)]
            recent = list(layout.coded_blocks(self.quality, self.window_quality))[len(middle) :]
            scale = len(layout.middle) / max(1, sum(block.stop - block.start for _, block in sample))
            total += encoder.estimate(layers, layouts, sample) * scale
            total += encoder.estimate(layers, layouts, [GroupBlock(index, block) for block in recent])
        return total

    @property
    def _encoder(self) -> CacheEncoder:
        """The encoder of these settings."""
        return CacheEncoder(
            self.artifacts, self._coders, self.recent, self.sinks, self.lossless, self.quality, self.window_quality
        )

    def _dump_metadata(
        self, dump: KVDump, notes: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Check that a dump fits the artifacts and return the arrays and facts stored with it."""
        self.artifacts.check_model(dump.spec, dump.fingerprint, dump.model)
        if len(dump.held_groups) < len(dump.spec.groups):
            raise InputError("the dump is a part of a cache, without its windows: compress a complete one")
        meta: dict[str, Any] = {"model": dump.model, "fingerprint": dump.fingerprint, "dtype": dump.dtype}
        if dump.state_types:
            meta["state_types"] = dump.state_types
        if dump.rings:
            meta["rings"] = {str(group): ring for group, ring in dump.rings.items()}
        if notes is not None:
            meta["notes"] = dict(notes)
        return {"tokens": dump.tokens, **{f"state.{key}": value for key, value in dump.states.items()}}, meta

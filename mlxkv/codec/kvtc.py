"""The codec: a cache to one container and back, block of tokens by block of tokens.

Sinks (the first s tokens) and the window (the last w) are stored as they are; the tokens between are coded. A
block's streams are sections of their own, so memory stays at one block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import Any

import mlx.core as mx
import numpy as np

import mlxkv
from mlxkv import container
from mlxkv.cache import STREAMS, KVDump, Rope, is_whole
from mlxkv.codec import raw
from mlxkv.codec.artifacts import CalibrationArtifacts, check_rope
from mlxkv.codec.layout import BLOCK, Layout
from mlxkv.codec.payload import decode_block, encode_block, payload_size
from mlxkv.codec.rows import from_rows, to_rows
from mlxkv.container import Reader, Section, Source, encode_section
from mlxkv.errors import FormatError, InputError, MismatchError
from mlxkv.lossless import CODINGS

METHOD = "kvtc"
MAX_DEFAULT_RANK = 4096
MIN_RATIO = 0.01  # far more bits than any cache has
Layers = Sequence[np.ndarray] | Sequence[mx.array]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Settings:
    """How the `kvtc` method is calibrated.

    compression_ratio: sets the bit budget, 16 * p / ratio bits a token for a stream of width p, and max_bit_budget
    bounds it. rank: components considered; None stands for one in every two bits of the budget, at most
    MAX_DEFAULT_RANK.
    s: sink tokens of each file to leave out. samples_per_file: at most so many tokens of a file, spread evenly.
    """

    compression_ratio: float
    rank: int | None = None
    max_bit_budget: int | None = None
    samples_per_file: int | None = None
    s: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        ratio = self.compression_ratio
        if type(ratio) not in (int, float) or not MIN_RATIO <= ratio < math.inf:
            raise InputError(f"the compression ratio must be a number above 0, not {ratio!r}")
        for name in ("rank", "max_bit_budget", "samples_per_file"):
            value = getattr(self, name)
            if value is not None and not is_whole(value, least=1):
                raise InputError(f"{name} must be 1 or more, not {value!r}")
        if not is_whole(self.s) or not is_whole(self.seed):
            raise InputError(f"s and seed must be 0 or more, not {self.s!r} and {self.seed!r}")

    def budget(self, width: int) -> int:
        """Bits a token for a stream of this width."""
        bits = int(16 * width / self.compression_ratio)
        return min(bits, self.max_bit_budget or bits)

    def components(self, width: int) -> int:
        """Principal components to consider for a stream of this width, if there are so many."""
        return self.rank or max(1, min(self.budget(width) // 2, MAX_DEFAULT_RANK))


class KVTCCacheCodec:
    """Compress and decompress caches of one model with one calibration.

    artifacts: the calibration. w, s, lossless: raw window, raw sinks and lossless coding (one of lossless.CODINGS) for
    compressing; a blob decodes with those it was written with. rope_cfg, mode: optional statements about the model (a preset's), refused when the artifacts
    differ. Raises MismatchError for artifacts, geometry or model that do not belong together.
    """

    def __init__(self, artifacts: CalibrationArtifacts, w: int = 128, s: int = 4,
                 rope_cfg: Rope | Mapping[str, Any] | None = None, mode: str | None = None,
                 lossless: str = "deflate") -> None:  # fmt: skip
        if not is_whole(w) or not is_whole(s):
            raise InputError(f"window and sinks must be 0 or more, got w={w} and s={s}")
        if lossless not in CODINGS:
            raise InputError(f"the lossless coding must be one of {', '.join(CODINGS)}, not {lossless!r}")
        if mode not in (None, artifacts.spec.mode):
            raise MismatchError(f"the artifacts are {artifacts.spec.mode}, not {mode}")
        if rope_cfg is not None:
            check_rope(artifacts.spec, rope_cfg)
        self.artifacts, self.w, self.s, self.lossless = artifacts, w, s, lossless
        self.streams = [artifacts.spec.stream(name) for name in STREAMS if artifacts.spec.stream(name).width]
        # A codec's own cache: the float32 basis is made on first use and dies with the codec.
        self._basis = cache(lambda name: mx.array(artifacts.stream(name).V).astype(mx.float32))

    def compress(self, k_layers: Layers, v_layers: Layers, *, meta: Mapping[str, Any] | None = None,
                 extras: Mapping[str, np.ndarray] | None = None, progress: Progress | None = None) -> bytes:  # fmt: skip
        """One container from keys and values, each a list of `[B, H, T, D]` arrays (NumPy or MLX), one a layer.

        meta and extras (arrays) travel along unchanged. progress is told the tokens done.
        """
        layers = {"k": k_layers, "v": v_layers}
        batch, length, dtype = self._check_shapes(layers)
        layout = Layout(batch, length, self.s, self.w, block=max(1, BLOCK // batch))
        sections: list[tuple[Section, bytes]] = []
        described = {}
        for name, array in self._raw_arrays(layers, layout, extras or {}):
            kind, data = raw.encode(array)
            described[name] = [kind, list(array.shape)]
            # Extras are stored as they are: on reading, nothing but the file's own size bounds them.
            sections.append(encode_section(name, data, self.lossless if name in raw.ENDS else "raw"))
        with ThreadPoolExecutor(2) as pool:
            submit = _at_once if self.lossless == "rans" else pool.submit
            futures: list[Future[tuple[Section, bytes]]] = []
            for index, start, stop in layout.blocks():
                for stream in self.streams:
                    part = self.artifacts.stream(stream.name)
                    rows = to_rows(stream, layers[stream.name], start, stop)
                    payload = encode_block(part.plan, self._basis(stream.name).T @ (rows - mx.array(part.mu)).T)
                    if len(futures) >= 8:  # wait for the coding rather than let payloads pile up
                        futures[-8].result()
                    futures.append(submit(encode_section, f"{stream.name}.{index}", payload, self.lossless))
                if progress:
                    progress(stop - start)
            sections += [future.result() for future in futures]
        header = {
            "method": METHOD,
            "mlxkv": mlxkv.__version__,
            "artifacts": self.artifacts.fingerprint,
            "layout": {"batch": batch, "length": length, "s": self.s, "w": self.w, "block": layout.block},
            "dtype": dtype,
            "raw": described,
            "meta": dict(meta or {}),
        }
        out = BytesIO()
        try:
            container.write(out, header, sections)
        except (TypeError, ValueError) as error:
            raise InputError(f"meta must be plain JSON values: {error}") from None
        return out.getvalue()

    def decompress(
        self, blob: Source, *, progress: Progress | None = None
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Keys and values of a container (bytes, or a file's path) as lists of `[B, H, T, D]` NumPy arrays.

        The dtype is the one compressed, except that bfloat16, which NumPy lacks, comes back as float32.
        """
        with Reader(blob) as reader:
            arrays = self._decode(reader, progress)
        return list(arrays["k"]), list(arrays["v"])

    def compress_dump(self, dump: KVDump, progress: Progress | None = None) -> bytes:
        """A whole dump: also its tokens, other layers' states and origin, but not its sensitivity."""
        expected = self.artifacts.meta.get("model_fingerprint", "")
        if dump.fingerprint != expected:
            raise MismatchError(
                f"the cache is of {dump.model} ({dump.fingerprint}), the artifacts of {self.artifacts.meta.get('model')} ({expected})"
            )
        if dump.spec != self.artifacts.spec:
            raise MismatchError("the cache's layers, heads or rotation differ from the artifacts'")
        meta = {"model": dump.model, "fingerprint": dump.fingerprint, "dtype": dump.dtype}
        extras = {"tokens": dump.tokens, **{f"state.{key}": value for key, value in dump.states.items()}}
        return self.compress(list(dump.k), list(dump.v), meta=meta, extras=extras, progress=progress)

    def decompress_dump(self, blob: Source, progress: Progress | None = None) -> KVDump:
        """The inverse of `compress_dump`. Raises FormatError for a container without tokens."""
        with Reader(blob) as reader:
            arrays = self._decode(reader, progress)
            extras = {name: raw.read_extra(reader, name) for name in _object(reader, "raw") if name not in raw.ENDS}
            meta = _object(reader, "meta")
        if "tokens" not in extras or extras["tokens"].dtype != np.int32:
            raise FormatError(f"{reader.name} holds no tokens: it was made by compress(), open it with decompress()")
        states = {name.removeprefix("state."): array for name, array in extras.items() if name.startswith("state.")}
        model, mark, dtype = (str(meta.get(key, "")) for key in ("model", "fingerprint", "dtype"))
        return KVDump(arrays["k"], arrays["v"], self.artifacts.spec, extras["tokens"], model, mark, dtype, states)

    def _decode(self, reader: Reader, progress: Progress | None) -> dict[str, np.ndarray]:
        """The k and v streams, `[layers, B, H, T, D]` each."""
        layout, dtype = self._check_header(reader)
        self._check_lengths(reader, layout)
        ends = self._read_ends(reader, layout)
        outputs = {}
        for name in STREAMS:
            stream = self.artifacts.spec.stream(name)
            outputs[name] = np.empty((stream.layers, layout.batch, stream.heads, layout.length, stream.dim), dtype)
            outputs[name][..., : layout.middle.start, :] = ends[f"{name}.sink"]
            outputs[name][..., layout.middle.stop :, :] = ends[f"{name}.window"]
        target = mx.float16 if dtype == np.float16 else mx.float32
        for index, start, stop in layout.blocks():
            for stream in self.streams:
                rows = self._decode_rows(reader, stream.name, index, layout.batch * (stop - start))
                restored = from_rows(stream, rows, layout.batch, start, target)
                outputs[stream.name][..., start:stop, :] = np.array(restored)
            if progress:
                progress(stop - start)
        return outputs

    def _decode_rows(self, reader: Reader, name: str, index: int, tokens: int) -> mx.array:
        part = self.artifacts.stream(name)
        payload = reader.read(f"{name}.{index}", payload_size(part.plan, tokens))
        return decode_block(part.plan, payload, tokens).T @ self._basis(name).T + mx.array(part.mu)

    def _check_header(self, reader: Reader) -> tuple[Layout, np.dtype]:
        header = reader.header
        if header.get("method") != METHOD:
            raise FormatError(
                f"{reader.name} was coded by method {header.get('method')!r}; this codec decodes {METHOD!r}"
            )
        if header.get("artifacts") != self.artifacts.fingerprint:
            raise MismatchError(
                f"{reader.name} needs artifacts {header.get('artifacts')}, these are {self.artifacts.fingerprint}"
            )
        try:
            layout = Layout(**_object(reader, "layout"))
        except TypeError:
            raise FormatError(f"{reader.name} describes no layout of tokens") from None
        dtype = {"float16": np.float16, "float32": np.float32, "bfloat16": np.float32}.get(str(header.get("dtype")))
        if dtype is None:
            raise FormatError(f"{reader.name} has unknown dtype {header.get('dtype')!r}")
        return layout, np.dtype(dtype)

    def _check_lengths(self, reader: Reader, layout: Layout) -> None:
        """Every coded section must be there with its exact size before anything of the cache's size is allocated."""
        unknown = set(reader.sections) - set(_object(reader, "raw"))
        for index, start, stop in layout.blocks():
            for stream in self.streams:
                section = reader.sections.get(f"{stream.name}.{index}")
                size = payload_size(self.artifacts.stream(stream.name).plan, layout.batch * (stop - start))
                if section is None or section.size != size:
                    raise FormatError(f"{reader.name}: section {stream.name}.{index} is missing or not {size} bytes")
                unknown.discard(section.name)
        if unknown:
            raise FormatError(
                f"{reader.name} has sections that its header does not describe: {', '.join(sorted(unknown)[:5])}"
            )

    def _read_ends(self, reader: Reader, layout: Layout) -> dict[str, np.ndarray]:
        """Sinks and windows. Their shapes, too, must fit the layout before anything of the cache's size is allocated."""
        ends: dict[str, np.ndarray] = {}
        for name in raw.ENDS:
            stream = self.artifacts.spec.stream(name[0])
            tokens = layout.middle.start if name.endswith("sink") else layout.length - layout.middle.stop
            needed = (stream.layers, layout.batch, stream.heads, tokens, stream.dim)
            shape = tuple(raw.described(reader, name)[1])
            if shape != needed:
                raise FormatError(f"{reader.name}: {name} has shape {shape}, its layout needs {needed}")
            ends[name] = raw.read(reader, name)
        return ends

    def _check_shapes(self, layers: Mapping[str, Layers]) -> tuple[int, int, str]:
        shapes, dtypes = set(), set()
        for name in STREAMS:
            stream = self.artifacts.spec.stream(name)
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
            raise MismatchError(
                f"all layers need the same batch and length of at least 1, found [B, T] = {sorted(shapes)}"
            )
        if len(dtypes) != 1 or not dtypes <= {"float16", "float32", "bfloat16"}:
            raise MismatchError(f"all layers need one dtype of float16, bfloat16 or float32, found {sorted(dtypes)}")
        return *shapes.pop(), dtypes.pop()

    def _raw_arrays(
        self, layers: Mapping[str, Layers], layout: Layout, extras: Mapping[str, np.ndarray]
    ) -> Iterator[tuple[str, np.ndarray]]:
        for name in raw.ENDS:
            tokens = slice(0, layout.middle.start) if name.endswith("sink") else slice(layout.middle.stop, None)
            yield name, np.stack([raw.widened(layer[:, :, tokens]) for layer in layers[name[0]]])
        clash = [name for name in extras if name.startswith(("k.", "v."))]
        if clash:
            raise InputError(f"extras may not be called k.… or v.…, the codec's own names: {', '.join(clash)}")
        yield from extras.items()


def _at_once(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """An executor's `submit` in this thread: rANS may launch kernels, which belong where the others are launched."""
    future: Future[Any] = Future()
    future.set_result(function(*arguments))
    return future


def _object(reader: Reader, key: str) -> dict[str, Any]:
    value = reader.header.get(key)
    if not isinstance(value, dict):
        raise FormatError(f"{reader.name} has no {key} in its header")
    return value

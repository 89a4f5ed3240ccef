"""How blocks of one model are coded: what new ones are written with, and what old ones are read with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import mlx.core as mx
import numpy as np

from mlxkv.codec import calibrate, library
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.parts import CachePart, PartCodec, StoredPart, decode_parts
from mlxkv.dump import stream_key
from mlxkv.errors import InputError, MlxkvError
from mlxkv.io.container import Reader
from mlxkv.io.entries import folder_for
from mlxkv.spec import STREAMS, CacheSpec

DEFAULT_QUALITY = 39.5
AGAIN_TOKENS = 48  # newest tokens of a prompt that are computed, even if they are stored
FINE_TOKENS = 32  # newest tokens that are coded finer, where a cache cannot be cut to compute them again
_FEW = 16  # tokens to warm up with, more than sinks
SINKS = 4  # first tokens of a text, which are not quantized
_CALIBRATED, _FREE, _EXACT = "kvtc-rd", "direct", "exact"
_BONUS, _FINEST = 10.0, 70.0  # points of quality that `direct` needs more for the same loss, and the most it gets


@dataclass(frozen=True)
class Coding:
    """Coding of new blocks.

    Parameters
    ----------
    artifacts
        The artifacts.
    quality
        Quality of the method; None for bit-exact blocks.
    plain, fine
        Codec of all blocks, and that of blocks whose newest tokens are coded finer.
    """

    artifacts: CalibrationArtifacts
    quality: float | None
    plain: PartCodec
    fine: PartCodec

    @property
    def name(self) -> str:
        """Method and quality, such as "kvtc-rd 38"."""
        return self.artifacts.method_name + ("" if self.quality is None else f" {self.quality:g}")


class Codings:
    """Codings of the blocks of one model.

    Parameters
    ----------
    spec
        Description of the model's cache.
    fingerprint
        Fingerprint of the model.
    quality
        0 to 100; None for bit-exact blocks.
    model
        Name of the model.

    Attributes
    ----------
    current
        Coding of new blocks.

    Raises
    ------
    InputError
        For another quality.
    """

    def __init__(self, spec: CacheSpec, fingerprint: str, quality: float | None, model: str = "") -> None:
        if quality is not None and not (type(quality) in (int, float) and 0 <= quality <= 100):
            raise InputError(f"the quality of a store is a number from 0 to 100, not {quality!r}")
        self._spec, self._fingerprint, self._quality, self._model = spec, fingerprint, quality, model
        self._lock = Lock()
        free = [
            calibrate.uncalibrated(spec, model=model, fingerprint=fingerprint, method=each) for each in (_FREE, _EXACT)
        ]
        self._known: dict[str, CalibrationArtifacts | None] = {each.fingerprint: each for each in free}
        if quality is None:
            self.current = _coding(free[1], None)
        else:
            self.current = _coding(free[0], min(max(_FINEST, quality), quality + _BONUS))
            self.refresh()

    def refresh(self) -> bool:
        """Write new blocks with the newest artifacts of the library.

        Returns
        -------
        bool
            Whether they are others than before.
        """
        with self._lock:  # what could not be read may have been replaced
            self._known = {key: found for key, found in self._known.items() if found is not None}
        if self._quality is None:
            return False
        found = library.find(self._fingerprint, _CALIBRATED, self._spec)
        if found is None or found.fingerprint == self.current.artifacts.fingerprint:
            return False
        with self._lock:
            self._known[found.fingerprint] = found
        self.current = _coding(found, self._quality)
        return True

    def warm(self, dtype: str) -> None:
        """Code and decode a few tokens, so that no prompt waits for what artifacts read and derive when they are first used.

        Parameters
        ----------
        dtype
            Type of the live cache, as `CachePart.dtype`.
        """
        coding = self.current
        streams: dict[str, list[np.ndarray]] = {}
        for number, group in enumerate(self._spec.groups):
            for stream in map(group.stream, STREAMS):
                rows = np.zeros((1, stream.heads, _FEW, stream.dim), np.float32)
                streams[stream_key(number, stream.name)] = [rows] * stream.layers
        part = CachePart(0, _FEW, np.zeros(_FEW, np.int32), streams, {}, dtype)
        names = {"model": self._model, "fingerprint": self._fingerprint}
        stored = StoredPart(Reader(coding.plain.encode(part, names)), coding.artifacts)
        for piece in decode_parts([stored], _FEW, dtype):
            mx.eval(piece.array)

    def artifacts(self, fingerprint: str) -> CalibrationArtifacts | None:
        """Return the artifacts that a block names.

        Parameters
        ----------
        fingerprint
            Their fingerprint, from any source.

        Returns
        -------
        CalibrationArtifacts or None
            None where the library has none such of this model's cache.
        """
        with self._lock:
            if fingerprint not in self._known and (folder := folder_for({"artifacts": fingerprint})) is not None:
                self._known[fingerprint] = _read(folder, fingerprint, self._spec)
            return self._known.get(fingerprint)


def _coding(artifacts: CalibrationArtifacts, quality: float | None) -> Coding:
    fine = 0 if quality is None else FINE_TOKENS
    plain, finer = (PartCodec(artifacts, quality=quality, recent=recent, sinks=SINKS) for recent in (0, fine))
    return Coding(artifacts, quality, plain, finer)


def _read(folder: Path, fingerprint: str, spec: CacheSpec) -> CalibrationArtifacts | None:
    """Return artifacts of the library; None where they are damaged, or of another cache."""
    try:
        found = CalibrationArtifacts.from_dir(folder)
    except MlxkvError:
        return None
    return found if found.fingerprint == fingerprint and found.spec == spec else None

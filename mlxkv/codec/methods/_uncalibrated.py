"""Base of codec methods that need no calibration: artifacts that follow from the model's description alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mlxkv.codec.methods.base import CodecConfig, CodecMethod, StreamArtifacts, checked_streams
from mlxkv.codec.samples import Samples
from mlxkv.errors import FormatError, InputError
from mlxkv.spec import STREAMS, Group


@dataclass(frozen=True)
class UncalibratedStream(StreamArtifacts):
    """Artifacts of one stream: how it is coded, and its shape.

    Parameters
    ----------
    kind
        The method's `kind` as bytes, uint8: a file of another version of it needs other artifacts.
    shape
        Layers, heads and dims of a head, int32 `[3]`.

    Raises
    ------
    FormatError
        When they are anything else.
    """

    kind: np.ndarray
    shape: np.ndarray

    def __post_init__(self) -> None:
        of_types = self.kind.dtype == np.uint8 and self.shape.dtype == np.int32
        if not of_types or self.kind.ndim != 1 or self.shape.shape != (3,) or self.shape.min() < 0:
            raise FormatError("artifacts of a method without calibration are its kind and three numbers")

    @property
    def width(self) -> int:
        """Width p of the rows."""
        return self.heads * self.dim

    @property
    def heads(self) -> int:
        """Number of heads of all layers together."""
        return int(self.shape[0]) * int(self.shape[1])

    @property
    def dim(self) -> int:
        """Width of a head."""
        return int(self.shape[2])


class UncalibratedMethod(CodecMethod):
    """Base class of codec methods that need no calibration.

    Attributes
    ----------
    kind
        Name and version of how it codes; files made with one are not read with another.
    """

    needs_calibration = False
    artifacts_class = UncalibratedStream
    kind: ClassVar[str]

    def without_calibration(self, group: Group) -> dict[str, UncalibratedStream]:
        """Return the artifacts of a group of layers, which say what it is."""
        kind, parts = np.frombuffer(self.kind.encode(), np.uint8), {}
        for name in STREAMS:
            stream = group.stream(name)
            parts[name] = UncalibratedStream(kind, np.array([stream.layers, stream.heads, stream.dim], np.int32))
        return parts

    def checked(self, streams: Mapping[str, StreamArtifacts]) -> dict[str, UncalibratedStream]:
        """Check that artifacts are this method's, and return them.

        Parameters
        ----------
        streams
            Artifacts of "k" and "v", of any method.

        Returns
        -------
        dict[str, UncalibratedStream]
            The same artifacts.

        Raises
        ------
        MismatchError
            When they are another method's.
        FormatError
            When they are of another version of this method.
        """
        parts = checked_streams(UncalibratedStream, streams)
        for part in parts.values():
            if part.kind.tobytes() != self.kind.encode():
                raise FormatError(
                    f"these artifacts are of {part.kind.tobytes()[:40]!r}, and this mlxkv has {self.kind!r}"
                )
        return parts

    def train(self, samples: Samples, config: CodecConfig) -> Mapping[str, StreamArtifacts]:
        """Refuse: there is nothing to learn."""
        raise InputError(f"{self.kind} needs no calibration", "mlxkv compress uses it where there are no artifacts")

    def facts(self, streams: Mapping[str, StreamArtifacts]) -> dict[str, Any]:
        """Return nothing: all facts are in the description."""
        return {}

    def explain(self, streams: Mapping[str, StreamArtifacts], meta: Mapping[str, Any]) -> dict[str, Any]:
        """Describe the rows."""
        return {f"{name}_width": part.width for name, part in self.checked(streams).items()}

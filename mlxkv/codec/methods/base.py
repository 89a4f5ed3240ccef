"""A codec method: what it learns in calibration, and how it takes a block of token rows to bytes and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import mlx.core as mx
import numpy as np

from mlxkv.codec.samples import Samples
from mlxkv.config import Config, integer
from mlxkv.errors import MismatchError
from mlxkv.registry import METHOD_GROUP, Registry

S = TypeVar("S", bound="StreamArtifacts")


@dataclass(frozen=True, kw_only=True)
class CodecConfig(Config):
    """Settings that every codec method has.

    Parameters
    ----------
    samples_per_file
        Tokens to use of each dump, at most, spread evenly; None for all.
    sinks
        First tokens of each dump to leave out.
    seed
        Of everything that is drawn.
    """

    samples_per_file: int | None = integer(None, least=1)
    sinks: int = integer(4, key="s")
    seed: int = integer(0)


class StreamArtifacts(ABC):
    """What a method learns of one stream: a frozen dataclass of NumPy arrays and `Plan`s that checks itself.

    Each field is a file of the artifacts folder.
    """

    @property
    @abstractmethod
    def width(self) -> int:
        """Width p of the rows that it codes."""


class BlockCoder(ABC):
    """Codes blocks of token rows by a method's artifacts.

    Attributes
    ----------
    uses_lossless_stage
        Whether packed bytes still go through one of `mlxkv.io.lossless.CODINGS`.
    default_quality
        Quality, 0 to 100, where none is given; None for a method with one ratio.
    window_quality_bonus
        Points of quality that the newest tokens get on top; None where they are stored unquantized.
    """

    uses_lossless_stage: ClassVar[bool]
    default_quality: ClassVar[float | None]
    window_quality_bonus: ClassVar[float | None]

    @abstractmethod
    def check_quality(self, quality: object) -> None:
        """Raise InputError for a quality that the method does not have."""

    @abstractmethod
    def encode(self, rows: Mapping[str, mx.array], quality: float | None) -> dict[str, np.ndarray]:
        """Return each stream's rows `[n, p]` as codes."""

    @abstractmethod
    def pack(self, name: str, codes: np.ndarray) -> bytes:
        """Return the bytes of one stream's codes."""

    @abstractmethod
    def estimate(self, name: str, codes: np.ndarray) -> float:
        """Return about how many bytes `pack` makes."""

    @abstractmethod
    def is_size(self, name: str, tokens: int, size: int, coding: str) -> bool:
        """Return whether a section of `size` bytes, before its lossless coding, may hold so many rows."""

    @abstractmethod
    def unpack(
        self, blocks: Sequence[Mapping[str, bytes]], tokens: Sequence[int]
    ) -> Sequence[Mapping[str, np.ndarray]]:
        """Return the codes of each block of so many tokens.

        Raises
        ------
        FormatError
            For damaged bytes.
        """

    @abstractmethod
    def decode(self, codes: Mapping[str, np.ndarray], tokens: int, quality: float | None) -> dict[str, mx.array]:
        """Return each stream's rows `[tokens, p]` float32."""


class CodecMethod(ABC):
    """One way to code a cache. Register the class with `codec_methods`.

    Attributes
    ----------
    config_class
        The settings of calibration.
    artifacts_class
        What is learnt of each stream.
    """

    config_class: ClassVar[type[CodecConfig]]
    artifacts_class: ClassVar[type[StreamArtifacts]]

    @abstractmethod
    def train(self, samples: Samples, config: CodecConfig) -> Mapping[str, StreamArtifacts]:
        """Return the artifacts of the streams k and v.

        Raises
        ------
        InputError
            When there is too little to learn from.
        """

    @abstractmethod
    def coder(self, streams: Mapping[str, StreamArtifacts]) -> BlockCoder:
        """Return the coder that these artifacts make."""

    @abstractmethod
    def facts(self, streams: Mapping[str, StreamArtifacts]) -> dict[str, Any]:
        """Return what artifacts say of themselves in meta.json beside the settings."""

    @abstractmethod
    def explain(self, streams: Mapping[str, StreamArtifacts], meta: Mapping[str, Any]) -> dict[str, Any]:
        """Return what each stream is coded with, for people."""


codec_methods: Registry[type[CodecMethod]] = Registry("codec method", "mlxkv.codec.methods", METHOD_GROUP)


def streams_of(kind: type[S], streams: Mapping[str, StreamArtifacts]) -> dict[str, S]:
    """Return the streams as artifacts of one method.

    Raises
    ------
    MismatchError
        When they are another method's.
    """
    found = {name: stream for name, stream in streams.items() if isinstance(stream, kind)}
    if len(found) < len(streams):
        raise MismatchError(f"these artifacts are no {kind.__name__}: {[type(s).__name__ for s in streams.values()]}")
    return found

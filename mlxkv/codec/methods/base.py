"""The interface of a codec method: the artifacts that it learns in calibration, and the coder of a block of token rows.

A method is four classes in one file: a `CodecConfig`, a `StreamArtifacts`, a `BlockCoder`, and the `CodecMethod` that
names them and registers itself. Blocks, container, sinks, recent tokens, partial reads, appending and commands
work for every method.

    calibration   dumps --Samples.rows--> [N, p] --CodecMethod.train--> StreamArtifacts of k and v
    compression   rows [n, p] --encode--> codes --pack--> bytes --lossless stage, if it has one--> section
    decompression section --> bytes --unpack--> codes --decode--> rows [n, p]
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import mlx.core as mx

from mlxkv.codec.samples import Samples
from mlxkv.config import Config, integer
from mlxkv.errors import InputError, MismatchError
from mlxkv.registry import METHOD_GROUP, Registry
from mlxkv.spec import Group

C = TypeVar("C", bound="CodecConfig")
S = TypeVar("S", bound="StreamArtifacts")


@dataclass(frozen=True, kw_only=True)
class CodecConfig(Config):
    """Settings that all codec methods share.

    Parameters
    ----------
    samples_per_file
        Most tokens to use per dump, evenly spaced; None for all.
    sinks
        First tokens of each dump excluded from training; 0 or more.
    seed
        Seed of all random numbers in calibration.
    """

    samples_per_file: int | None = integer(None, least=1)
    sinks: int = integer(4, key="s")
    seed: int = integer(0, most=2**63 - 1)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings by the keys that files have, a method's own before those of all methods.

        Returns
        -------
        dict
            In the order that artifacts have always had.
        """
        values, shared = super().to_dict(), CodecConfig.stored_keys().values()
        return {key: value for key, value in values.items() if key not in shared} | {key: values[key] for key in shared}


class StreamArtifacts(ABC):
    """Base class of the artifacts of one stream: a frozen dataclass that checks its fields.

    Each field is one file of the artifacts folder, named by the field: `np.ndarray` fields are `.npy` files, others are
    `.json` files of a class with `to_json()` and `from_json(data)`, such as `Plan`.
    """

    @property
    @abstractmethod
    def width(self) -> int:
        """Width p of the rows; 0 for an unused stream."""


class BlockCoder(ABC):
    """Base class of coders of blocks of token rows, which use a method's artifacts.

    Attributes
    ----------
    uses_lossless_stage
        True when packed bytes still go through one of `mlxkv.io.lossless.CODINGS`.
    default_quality
        Default quality, 0 to 100; None for a method with one ratio.
    window_quality_bonus
        Points of quality added for recent tokens (the window); None where they are stored unquantized.
    undoes_rotation
        Whether it codes keys with their rotation undone, as float32 rows. Otherwise rows are the cached numbers themselves,
        in their own type.
    """

    uses_lossless_stage: ClassVar[bool] = False
    undoes_rotation: ClassVar[bool] = True
    default_quality: ClassVar[float | None] = None
    window_quality_bonus: ClassVar[float | None] = None

    @abstractmethod
    def check_quality(self, quality: object) -> None:
        """Check a quality that a user or a file asks for.

        Parameters
        ----------
        quality
            Any object.

        Raises
        ------
        InputError
            When the method does not have this quality.
        """

    @abstractmethod
    def encode(self, rows: Mapping[str, mx.array], quality: float | None) -> Mapping[str, Any]:
        """Quantize one block.

        Parameters
        ----------
        rows
            Each stream's rows `[n, p]`, float32 if `undoes_rotation`.
        quality
            A quality that `check_quality` accepts.

        Returns
        -------
        Mapping[str, Any]
            Each stream's codes, in a representation that the method chooses, such as an array of integers.

        Raises
        ------
        InputError
            For values that are not finite or too large.
        """

    @abstractmethod
    def pack(self, name: str, codes: Any) -> bytes:
        """Pack the codes of one stream into bytes. It may run in another thread.

        Parameters
        ----------
        name
            "k" or "v".
        codes
            Codes of this stream, as `encode` returned them.

        Returns
        -------
        bytes
            The section, before its lossless stage.
        """

    @abstractmethod
    def estimate(self, name: str, codes: Any) -> float:
        """Estimate how many bytes `pack` makes, without making them.

        Parameters
        ----------
        name
            "k" or "v".
        codes
            Codes of this stream, as `encode` returned them.

        Returns
        -------
        float
            Bytes.
        """

    @abstractmethod
    def is_size(self, name: str, tokens: int, size: int, coding: str) -> bool:
        """Check whether a section of this size can hold n rows. Readers call it before they allocate memory.

        Parameters
        ----------
        name
            "k" or "v".
        tokens
            Number of rows n.
        size
            Bytes of the section, before its lossless stage.
        coding
            The section's lossless coding, by name.

        Returns
        -------
        bool
            False when no block of n rows has such a section.
        """

    @abstractmethod
    def unpack(self, blocks: Sequence[Mapping[str, bytes]], tokens: Sequence[int]) -> Iterable[Mapping[str, Any]]:
        """Return the inverse of `pack` for several blocks together.

        Parameters
        ----------
        blocks
            Each block's bytes by stream.
        tokens
            Number of rows of each block.

        Returns
        -------
        Iterable[Mapping[str, Any]]
            Each block's codes by stream.

        Raises
        ------
        FormatError
            For damaged bytes.
        """

    @abstractmethod
    def decode(self, codes: Mapping[str, Any], tokens: int, quality: float | None) -> dict[str, mx.array]:
        """Return the inverse of `encode`.

        Parameters
        ----------
        codes
            Each stream's codes.
        tokens
            Number of rows n.
        quality
            The quality that they were encoded with.

        Returns
        -------
        dict[str, mx.array]
            Each stream's rows `[n, p]` float32.
        """


class CodecMethod(ABC):
    """Base class of codec methods.

    Register the class with `codec_methods`; another package does so through the entry point group `mlxkv.methods`.

    Attributes
    ----------
    config_class
        Class of the settings of its calibration.
    artifacts_class
        Class of the artifacts that it learns for each stream.
    needs_calibration
        Whether artifacts are learnt from dumps; otherwise they follow from the description of the cache alone.
    """

    config_class: ClassVar[type[CodecConfig]]
    artifacts_class: ClassVar[type[StreamArtifacts]]
    needs_calibration: ClassVar[bool] = True

    @abstractmethod
    def train(self, samples: Samples, config: CodecConfig) -> Mapping[str, StreamArtifacts]:
        """Learn the artifacts of both streams.

        Parameters
        ----------
        samples
            Token rows of the dumps.
        config
            Settings, of `config_class`; `checked_config` checks that.

        Returns
        -------
        Mapping[str, StreamArtifacts]
            Artifacts of "k" and "v"; empty ones for a stream of width 0.

        Raises
        ------
        InputError
            When there are too few tokens to learn from.
        MismatchError
            For another method's settings.
        """

    def without_calibration(self, group: Group) -> Mapping[str, StreamArtifacts]:
        """Return the artifacts of both streams of a method that needs no calibration.

        Parameters
        ----------
        group
            Layers that are coded together.

        Returns
        -------
        Mapping[str, StreamArtifacts]
            Artifacts of "k" and "v", small ones.

        Raises
        ------
        InputError
            When the method needs a calibration.
        """
        raise InputError("this method is calibrated first", "mlxkv calibrate does that")

    @abstractmethod
    def coder(self, streams: Mapping[str, StreamArtifacts]) -> BlockCoder:
        """Return a coder that uses artifacts.

        Parameters
        ----------
        streams
            Artifacts of "k" and "v", of `artifacts_class`; `checked_streams` checks that.

        Returns
        -------
        BlockCoder
            The coder.

        Raises
        ------
        MismatchError
            For another method's artifacts.
        FormatError
            For artifacts that do not belong together.
        """

    def tokens_needed(self, streams: Mapping[str, StreamArtifacts], config: CodecConfig) -> int:
        """Return how many tokens a calibration should have at least: one for each direction of rows that it learns.

        Parameters
        ----------
        streams
            Artifacts of "k" and "v".
        config
            Settings, of `config_class`.

        Returns
        -------
        int
            Tokens; the width of the wider stream for a method that does not know better.
        """
        return max(part.width for part in streams.values())

    @abstractmethod
    def facts(self, streams: Mapping[str, StreamArtifacts]) -> dict[str, Any]:
        """Return facts about artifacts to be stored in meta.json, in addition to the settings.

        Parameters
        ----------
        streams
            Artifacts of "k" and "v".

        Returns
        -------
        dict
            JSON values by key.

        Raises
        ------
        MismatchError
            For another method's artifacts.
        """

    @abstractmethod
    def explain(self, streams: Mapping[str, StreamArtifacts], meta: Mapping[str, Any]) -> dict[str, Any]:
        """Describe artifacts in readable form, as `mlxkv inspect` prints them.

        Parameters
        ----------
        streams
            Artifacts of "k" and "v".
        meta
            The contents of meta.json.

        Returns
        -------
        dict
            Values by label.

        Raises
        ------
        MismatchError
            For another method's artifacts.
        """


def _check_method(method: type[CodecMethod]) -> None:
    if not (isinstance(method, type) and issubclass(method, CodecMethod)):
        raise InputError(f"{method!r} is no CodecMethod")


codec_methods: Registry[type[CodecMethod]] = Registry(
    "codec method", "mlxkv.codec.methods", METHOD_GROUP, _check_method
)


def checked_config(kind: type[C], config: CodecConfig) -> C:
    """Check that settings belong to this method.

    Parameters
    ----------
    kind
        The method's settings class.
    config
        Settings of any method.

    Returns
    -------
    CodecConfig
        The same object, of type `kind`.

    Raises
    ------
    MismatchError
        When they are another method's.
    """
    if not isinstance(config, kind):
        raise MismatchError(f"expected settings of {kind.__name__}, not {config!r}")
    return config


def checked_streams(kind: type[S], streams: Mapping[str, StreamArtifacts]) -> dict[str, S]:
    """Check that artifacts belong to this method.

    Parameters
    ----------
    kind
        The method's artifacts class.
    streams
        Artifacts of k and v, of any method.

    Returns
    -------
    dict[str, StreamArtifacts]
        The same artifacts, each of type `kind`.

    Raises
    ------
    MismatchError
        When they are another method's.
    """
    checked = {name: stream for name, stream in streams.items() if isinstance(stream, kind)}
    if len(checked) < len(streams):
        raise MismatchError(f"these artifacts are no {kind.__name__}: {[type(s).__name__ for s in streams.values()]}")
    return checked

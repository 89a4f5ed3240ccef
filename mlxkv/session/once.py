"""A prompt cache as bytes, and back: for loops of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlxkv import lm
from mlxkv.codec import library
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.session import CacheCodec
from mlxkv.errors import InputError
from mlxkv.identity import fingerprint
from mlxkv.io.container import Source
from mlxkv.models import cache_spec


def compress(model: Any, cache: Sequence[Any], tokens: Sequence[int], *, artifacts: CalibrationArtifacts | None = None,
             quality: float | None = None, name: str = "") -> bytes:  # fmt: skip
    """Compress a prompt cache of mlx-lm.

    Parameters
    ----------
    model
        The model that filled it.
    cache
        mlx-lm's own prompt cache, as `make_prompt_cache` made it.
    tokens
        Token ids that are in it.
    artifacts
        Artifacts of the model; None for the newest in the library, or for some that need no calibration.
    quality
        0 to 100, for methods that have a quality; None for the method's default.
    name
        Name of the model, for the file.

    Returns
    -------
    bytes
        A compressed file, for `decompress`, `mlxkv generate` and `CacheCodec.append_dump`.

    Raises
    ------
    MismatchError
        When the cache holds another number of tokens, or the artifacts are of another model.
    UnsupportedError
        For a cache that is not mlx-lm's own.
    InputError
        For values that cannot be coded, and a quality that the method does not have.

    Examples
    --------
    In a loop of one's own::

        data = mlxkv.compress(model, cache, tokens)
        cache = mlxkv.decompress(model, data)
    """
    spec, found = cache_spec(model), fingerprint(model)
    dump = lm.extract_cache(list(cache), spec, [list(tokens)], model=name, fingerprint=found)
    codec = CacheCodec(artifacts or library.for_model(spec, found, name), quality=quality)
    return codec.compress_dump(dump)


def decompress(
    model: Any, source: Source, *, artifacts: CalibrationArtifacts | None = None, limit: int | None = None
) -> list[Any]:
    """Decompress a file to a prompt cache of mlx-lm.

    Parameters
    ----------
    model
        The model that it is of.
    source
        A compressed file's bytes, or its path.
    artifacts
        Those that it was made with; None to find them.
    limit
        Bytes that keys and values may have; None for 256 MiB or 200 times the file's own, whichever is more.

    Returns
    -------
    list
        A prompt cache for mlx-lm's `prompt_cache=`.

    Raises
    ------
    InputError
        For a file that cannot be opened, or more bytes than the limit.
    FormatError
        When it is damaged or of another kind.
    MismatchError
        When it is of another model, or its artifacts are not here.
    """
    if not isinstance(source, bytes | bytearray | memoryview | str | Path):
        raise InputError(f"bytes or a path are decompressed, not {type(source).__name__}")
    codec = CacheCodec(artifacts or library.for_file(source))
    return lm.restore(model, codec.decompress_dump(source, limit=limit))

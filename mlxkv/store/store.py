"""The store of prompts: a folder, the index of what is in it, and a thread that writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from mlxkv.config import Config
from mlxkv.errors import InputError
from mlxkv.identity import fingerprint as model_fingerprint
from mlxkv.store.codings import DEFAULT_QUALITY
from mlxkv.store.form import form_of
from mlxkv.store.index import BlockStore
from mlxkv.store.prompts import PromptStore
from mlxkv.store.writer import Writer

CLOSE_SECONDS = 10.0


class Store:
    """A folder of compressed prompts of any number of models.

    Prompts are written in a thread of its own. Whatever cannot be written or read is counted and logged, and is no error: a
    prompt that is not found is computed.

    Parameters
    ----------
    folder
        Its folder; None for `$MLXKV_STORE`, else `store` in `$MLXKV_HOME` or in mlxkv's folder of the user's data.
    limit
        Bytes that everything in it may take, at any time; None for those of last time, at first 20 GB.
    busy
        Asked before each block is written, on the writing thread: while it is true, writing waits, some seconds at most.

    Attributes
    ----------
    blocks
        Its index and files.

    Raises
    ------
    InputError
        When the folder cannot be used, or the limit is too small for anything.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, Store(folder, limit=10**8) as store:
    ...     store.blocks.statistics().blocks
    0
    """

    def __init__(
        self, folder: str | Path | None = None, limit: int | None = None, *, busy: Callable[[], bool] | None = None
    ) -> None:
        self.blocks = BlockStore(None if folder is None else Path(folder), limit)
        self._writer = Writer(busy)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def for_model(
        self,
        model: Any,
        *,
        name: str = "",
        fingerprint: str | None = None,
        quality: float | None = None,
        exact: bool = False,
        method: str | Config | None = None,
    ) -> PromptStore:
        """Return the prompts of one model.

        Parameters
        ----------
        model
            A model that mlx-lm loaded. Only a weak reference is kept.
        name
            Name that it was loaded by, for people.
        fingerprint
            `mlxkv.lm.fingerprint` of it, where it is known: to compute it reads all weights.
        quality
            0 to 100: how finely keys and values are coded; None for 39. Prompts of one quality are not found at another.
        exact
            Code bit-exact instead, at many times the bytes.
        method
            Preset or settings of the live caches that the model runs with: `full`, `int8`, `int4` or `kivi`; None for mlx-lm's
            own caches.

        Returns
        -------
        PromptStore
            The prompts.

        Raises
        ------
        UnsupportedError
            For a model whose caches cannot be copied, and live caches that give tokens up.
        InputError
            For another quality, or one of exact prompts.
        PresetError
            For an unknown method.
        """
        if exact and quality is not None:
            raise InputError(f"exact prompts have no quality, got {quality!r}")
        form = form_of(model, method)
        known = model_fingerprint(model) if fingerprint is None else fingerprint
        chosen = None if exact else DEFAULT_QUALITY if quality is None else quality
        return PromptStore(
            self.blocks, self._writer, model, form, name=name, fingerprint=known, quality=chosen, method=method
        )

    def close(self, timeout: float | None = CLOSE_SECONDS) -> bool:
        """Write what waits, as far as the time allows, and close the store.

        Parameters
        ----------
        timeout
            Seconds; None for no bound. A block that is being written is finished in any case.

        Returns
        -------
        bool
            Whether all was written.
        """
        done = self._writer.close(timeout)
        self.blocks.close()
        return done

"""A stored text read back: its files opened, checked against the prompt, and decoded. Whatever lies in them is hostile."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
import numpy as np

from mlxkv.codec.parts import StoredPart, decode_parts, read_positions, read_tokens
from mlxkv.dump import read_rings
from mlxkv.errors import FormatError, MismatchError, MlxkvError
from mlxkv.io.container import Reader
from mlxkv.store.chain import Block, block_of
from mlxkv.store.codings import Codings
from mlxkv.store.form import CacheForm
from mlxkv.store.index import BlockStore
from mlxkv.store.loading import Filling
from mlxkv.store.states import read_states

OPEN_FILES = 32  # at once
T = TypeVar("T")


class Plan(NamedTuple):
    """Blocks to read, from the first token on, and how many tokens of them to use."""

    path: list[Block]
    stop: int


class Unusable(Exception):  # noqa: N818  # never beyond the store: the prompt is computed instead
    """A block, or the states at its end, cannot be used.

    Attributes
    ----------
    block
        The block.
    state
        Whether it is the states.
    damaged
        Whether the file is to blame, and not artifacts that are gone.
    """

    def __init__(self, reason: object, block: Block, *, state: bool = False, damaged: bool = True) -> None:
        super().__init__(str(reason)[:400])
        self.block, self.state, self.damaged = block, state, damaged


class Reading:
    """Work of reading a stored text.

    Parameters
    ----------
    blocks
        The store.
    codings
        Codings of the model's blocks.
    form
        Form of its cache.
    tokens
        Token ids of the prompt.
    plan
        What to read.
    seconds
        Gets the seconds of "reading", "decoding" and "filling" added.

    Attributes
    ----------
    bytes
        Bytes that were read.
    """

    def __init__(
        self, blocks: BlockStore, codings: Codings, form: CacheForm, tokens: np.ndarray, plan: Plan, seconds: dict[str, float]
    ) -> None:  # fmt: skip
        self._blocks, self._codings, self._form = blocks, codings, form
        self._tokens, self._plan, self._seconds = tokens, plan, seconds
        self._rings: dict[int, int] = {}
        self.bytes = 0

    def cache(self, model: Any) -> list[Any]:
        """Return mlx-lm's own prompt cache of the text.

        Parameters
        ----------
        model
            The model.

        Returns
        -------
        list
            A fresh prompt cache, all computed.

        Raises
        ------
        Unusable
            When a file cannot be used.
        """
        path, stop = self._plan
        filling = Filling(model, self._form, stop, len(self._tokens) + 1, self._seconds)
        for at in range(0, len(path), OPEN_FILES):
            some = path[at : at + OPEN_FILES]
            with ExitStack() as files:
                parts = [timed(self._seconds, "reading", partial(self._open, block, files)) for block in some]
                try:
                    filling.add(parts, min(stop, some[-1].stop))
                except MlxkvError as error:
                    raise self._culprit(some, parts, error) from error
        last = path[-1]
        try:
            states, types = timed(self._seconds, "reading", partial(self._states, last))
        except (OSError, MlxkvError) as error:
            raise Unusable(error, last, state=True) from error
        try:
            return timed(self._seconds, "filling", partial(filling.finish, self._rings, states, types))
        except MlxkvError as error:
            raise Unusable(error, last, state=self._form.states) from error

    def _open(self, block: Block, files: ExitStack) -> StoredPart:
        """Open a block and compare its tokens with the prompt's."""
        artifacts = self._codings.artifacts(block.artifacts)
        if artifacts is None:
            raise Unusable(f"artifacts {block.artifacts[:8]} are not in the library", block, damaged=False)
        try:
            reader = Reader(files.enter_context(self._blocks.open_block(block.name)))
            if read_positions(reader) != (block.start, block.stop):
                raise FormatError("it is of other positions")
            if not np.array_equal(read_tokens(reader), self._tokens[block.start : block.stop]):
                raise FormatError("it is of other tokens")
            described = block_of(reader.header, reader.size)
            # Equal tokens may stand after another beginning, or be of another model.
            if described is None or described.name != block.name:
                raise MismatchError("it is of another text, model or quality than its name says")
            meta = reader.header.get("meta")
            if block.stop == self._plan.stop and isinstance(meta, dict):
                self._rings = read_rings(meta, reader.name)
        except (OSError, MlxkvError) as error:
            raise Unusable(error, block) from error
        self.bytes += reader.size
        return StoredPart(reader, artifacts)

    def _culprit(self, some: list[Block], parts: list[StoredPart], error: Exception) -> Unusable:
        """Return which of some blocks cannot be decoded."""
        for block, part in zip(some, parts):
            try:
                for piece in decode_parts([part], block.stop, self._form.dtype):
                    mx.eval(piece.array)
            except MlxkvError as own:
                return Unusable(own, block)
        return Unusable(error, some[-1])

    def _states(self, last: Block) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Read the states at the end of a block; nothing where the model has none."""
        if not self._form.states:
            return {}, {}
        with self._blocks.open_state(last.name) as file:
            reader = Reader(file)
            meta = reader.header.get("meta")
            if not isinstance(meta, dict) or meta.get("store") != {"name": last.name.hex()}:
                raise MismatchError("it is of another text")
            self.bytes += reader.size
            return read_states(reader)


def timed(seconds: dict[str, float], key: str, work: Callable[[], T]) -> T:
    """Do some work, and add the seconds that it takes.

    Parameters
    ----------
    seconds
        Seconds by key.
    key
        The key to add to.
    work
        The work.

    Returns
    -------
    object
        What it returns.
    """
    began = time.perf_counter()
    try:
        return work()
    finally:
        seconds[key] += time.perf_counter() - began

"""Blocks of the store made a prompt cache of mlx-lm again, part by part into arrays that are made once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from mlxkv import stock
from mlxkv.codec.layout import coded_streams
from mlxkv.codec.parts import Decoded, StoredPart, decode_parts
from mlxkv.errors import FormatError
from mlxkv.lm.restoration import restore_states
from mlxkv.spec import Group, is_int
from mlxkv.store.form import CacheForm

_STEP = 256  # tokens that mlx-lm allocates at a time


class Filling:
    """A fresh prompt cache that is filled with the tokens from 0 up to `stop`.

    Parameters
    ----------
    model
        The model.
    form
        Form of its cache.
    stop
        Number of tokens.
    room
        Tokens to allocate memory for, at least `stop`: those of the whole prompt need no second copy then.
    seconds
        Gets the seconds of "decoding" and "filling" added.
    """

    def __init__(self, model: Any, form: CacheForm, stop: int, room: int, seconds: dict[str, float]) -> None:
        self._model, self._form, self._stop = model, form, stop
        self._cache: list[Any] = make_prompt_cache(model)
        self._buffers: dict[int, list[mx.array]] = {}
        self._first: dict[int, int] = {}
        self._filled: dict[tuple[int, str], int] = {}
        self._seconds = seconds
        for number, group in enumerate(form.spec.groups):
            first = 0 if group.window is None else max(0, stop - group.window)
            rows = -(-max(room, stop) // _STEP) * _STEP if group.window is None else stop - first
            for index, layer in zip(group.indices, group.members):
                shapes = ((1, slot.heads, rows, slot.dim) for slot in layer)
                self._buffers[index] = [mx.zeros(shape, form.types[index]) for shape in shapes]
            self._first[number] = first
            self._filled |= {(number, stream.name): first for stream in coded_streams(group)}

    def add(self, parts: Sequence[StoredPart], stop: int) -> None:
        """Fill in the tokens of parts that follow those before.

        Parameters
        ----------
        parts
            The parts.
        stop
            Position after their last token that is wanted.

        Raises
        ------
        FormatError
            When one of them is damaged or does not fit.
        MismatchError
            When one of them was made with other artifacts.
        """
        pieces = decode_parts(parts, stop, self._form.dtype)
        while (piece := self._timed(pieces)) is not None:
            began = time.perf_counter()
            self._fill(piece)
            self._seconds["filling"] += time.perf_counter() - began

    def _timed(self, pieces: Iterator[Decoded]) -> Decoded | None:
        """Return the next piece, computed; None after the last one."""
        began = time.perf_counter()
        if (piece := next(pieces, None)) is not None:
            mx.eval(piece.array)
        self._seconds["decoding"] += time.perf_counter() - began
        return piece

    def _fill(self, piece: Decoded) -> None:
        """Copy a piece into the arrays of its layers."""
        group, key = self._form.spec.groups[piece.group], (piece.group, piece.name)
        at, tokens = piece.first - self._first[piece.group], piece.array.shape[3]
        if piece.first != self._filled.get(key) or piece.first + tokens > self._stop:
            raise FormatError(f"stored tokens from {piece.first} on do not follow {self._filled.get(key)}")
        self._filled[key] += tokens
        changed = []
        for row, index in enumerate(group.indices):
            buffers = self._buffers[index]
            for slot, array in _slots(group, piece.name, piece.array[row]):
                buffers[slot][..., at : at + tokens, :] = array.astype(buffers[slot].dtype)
                changed.append(buffers[slot])
        mx.eval(changed)  # now, so that the piece is not kept

    def finish(self, rings: Mapping[int, int], states: Mapping[str, np.ndarray], types: Mapping[str, str]) -> list[Any]:
        """Return the prompt cache.

        Parameters
        ----------
        rings
            Where the rings of windows are, as `mlxkv.dump.KVDump.rings`; missing ones are in the order of the text.
        states
            States of other layers.
        types
            MLX's types of them.

        Returns
        -------
        list
            mlx-lm's own prompt cache, all computed.

        Raises
        ------
        FormatError
            When tokens are missing.
        MismatchError
            When the states are not this model's.
        """
        if missing := {key for key, filled in self._filled.items() if filled != self._stop}:
            raise FormatError(f"stored tokens of {sorted(missing)} do not reach {self._stop}")
        entries = stock.entries(self._cache)
        for number, group in enumerate(self._form.spec.groups):
            for index in group.indices:
                keys, values = self._buffers.pop(index)
                if group.window is None:
                    entries[index].state = keys, values, self._stop
                else:
                    rows = keys.shape[2]
                    at = rings.get(number, rows)
                    if not is_int(at, 1, rows) or (at < rows < group.window):
                        raise FormatError(f"the ring of group {number} is at {at!r} of {rows} rows")
                    stock.fill_window(entries[index], keys, values, self._stop, at)
        if self._form.states:
            restore_states(entries, self._model, self._form.spec, states, types, (1, self._stop))
        mx.eval([entry.state for entry in self._cache if entry is not None])
        return self._cache


def _slots(group: Group, name: str, array: mx.array) -> Iterator[tuple[int, mx.array]]:
    """Yield which of a layer's two arrays rows `[1, H, t, D]` of a stream go to."""
    if group.latent:
        width = group.members[0].keys.dim
        yield 0, array[..., :width]
        yield 1, array[..., width:]
    else:
        yield int(name == "v"), array

"""The part of mlx-lm's cache contract that takes tokens back: rejected drafts, shared beginnings of prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import mlx.core as mx

from mlxkv.errors import InputError, UnsupportedError
from mlxkv.live.arrays import KeysValues, held, map_arrays
from mlxkv.live.contract import StateContract
from mlxkv.spec import is_int


class Rewinding(StateContract):
    """Base of `LayerCache` that takes the last tokens back.

    Attributes
    ----------
    takes_tokens_back
        Whether `_trim` works at any time, which a method that ever gives tokens up cannot say. mlx-lm's speculative
        decoding asks once, before the first token.
    """

    takes_tokens_back: ClassVar[bool] = False
    # The state before each token of the last small chunk, so that `trim` can go back to it.
    _checkpoints: list[dict[str, Any]]
    _offset: int

    @property
    def method_name(self) -> str:
        """The name under which the method is registered."""
        raise NotImplementedError

    def _trim(self, count: int) -> None:
        """Remove the last count >= 1 tokens; called only while every token is stored."""
        raise UnsupportedError(f"{self.method_name} cannot take tokens back")

    def _only_appends(self, count: int) -> bool:
        """Return whether `_trim` can undo exactly what the next tokens will change; `offset` includes them already."""
        return False

    def _store_one_by_one(self, chunk: KeysValues, take: Callable[[int, KeysValues], None]) -> None:
        """Store each token of a chunk, remembering the state before each unless `_trim` can go back to it exactly."""
        seen, remember = self._offset - chunk.tokens, not self._only_appends(chunk.tokens)
        for i in range(chunk.tokens):
            if remember:
                self._checkpoints.append({name: map_arrays(getattr(self, name), held) for name in self.state_fields})
            self._offset = seen + i + 1
            take(i, chunk.slice_tokens(i, i + 1))

    def is_trimmable(self) -> bool:
        """Return whether the last tokens can be removed now and at any later time.

        Returns
        -------
        bool
            True if the method supports it, no entry of the same prompt cache drops tokens, and no call of the model was
            interrupted.
        """
        whole = self._pending_chunk is None and (self._group is None or self._group.can_trim)
        return self.takes_tokens_back and whole

    def can_take_back(self, n: int) -> bool:
        """Return whether the last tokens can be removed now, which `is_trimmable` promises for later as well.

        Parameters
        ----------
        n
            Number of tokens.

        Returns
        -------
        bool
            True also for a method that gives tokens up, if it removes tokens exactly and has not given up any yet.
        """
        removes = type(self)._trim is not Rewinding._trim and self.kept == self.offset
        return self._pending_chunk is None and (n == 0 or removes or n <= len(self._checkpoints))

    def trim(self, n: int) -> int:
        """Remove the last tokens, as if they had never come.

        Up to all tokens of a last chunk of 2 to 16 are removed exactly. Where more are removed, quantized tokens that are
        to become unquantized again keep their rounded values.

        Parameters
        ----------
        n
            Number of tokens, 0 or more; all where there are fewer.

        Returns
        -------
        int
            Number of tokens removed.

        Raises
        ------
        InputError
            When n is negative or no integer.
        UnsupportedError
            When the method cannot remove them: see `can_take_back`.
        """
        if not is_int(n):
            raise InputError(f"trim takes 0 or more tokens back, not {n!r}")
        count = min(n, self.offset)
        if not self.can_take_back(count):
            raise UnsupportedError(
                f"this {self.method_name} cache cannot take {count} tokens back: ask is_trimmable() or can_take_back first"
            )
        checkpoints, self._checkpoints = self._checkpoints, []
        if 0 < count <= len(checkpoints):
            for name, field in checkpoints[-count].items():
                setattr(self, name, field)
        elif count:
            self._trim(count)
        self.offset -= count
        mx.eval(self._arrays())  # by the thread that can: another one may go on
        return count

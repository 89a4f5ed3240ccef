"""Base class of methods that also work in layers with a sliding window: they drop old tokens block by block."""

from __future__ import annotations

from abc import abstractmethod

import mlx.core as mx

from mlxkv.config import Config
from mlxkv.live.attention import AttentionCall, causal_mask, newest_columns
from mlxkv.live.base import KeysValues, LayerCache
from mlxkv.live.group import mask_hiding
from mlxkv.spec import CacheSpec


class WindowedCache(LayerCache):
    """Base class of methods that keep every token, or every token of the layer's sliding window.

    Whole blocks that have left the window are dropped, and sinks as soon as all of them have. So at most `window + block`
    tokens are stored, and which ones depends only on the number of tokens seen. Until their block is dropped, tokens before
    the window are hidden by the mask.

    Where the model fetches what is stored (`mlxkv.spec.Layer.use`), blocks are dropped when the next chunk comes: until then
    other layers may read them.

    Parameters
    ----------
    config
        Settings, of the method's `config_class`.
    spec
        Description of the model's cache.
    layer
        The layer's index in the model.

    Attributes
    ----------
    sinks
        Number of first tokens that are stored apart from blocks.
    block
        Number of tokens that are dropped at a time.
    max_size
        The window, as mlx-lm's RotatingKVCache calls it; only where there is one.
    """

    any_use = True
    takes_windows = True
    sinks = 0
    block = 1

    def __init__(self, config: Config, spec: CacheSpec, layer: int) -> None:
        super().__init__(config, spec, layer)
        if self.window is not None:
            self.max_size = self.window
        self._returned: int | None = None  # tokens of a window that the model got last

    @abstractmethod
    def drop_oldest(self, count: int) -> None:
        """Drop stored tokens.

        Parameters
        ----------
        count
            Number of tokens, from the oldest: the sinks if they are still there, then whole blocks; 1 or more.
        """

    def leaving(self, seen: int, dropped: int = 0) -> int:
        """Return how many stored tokens can be dropped.

        Parameters
        ----------
        seen
            Number of tokens seen.
        dropped
            How many of them have been dropped.

        Returns
        -------
        int
            Tokens in whole blocks that no later query sees; 0 without a window.
        """
        outside = 0 if self.window is None else seen - self.window + 1 - dropped
        sinks = 0 if dropped else self.sinks
        return 0 if outside < sinks else sinks + self._in_blocks(outside - sinks)

    def _in_blocks(self, count: int) -> int:
        """Return how many of so many tokens after the sinks are in whole blocks."""
        return max(0, count // self.block * self.block)

    def _dropped(self) -> int:
        """Return how many tokens have been dropped."""
        return 0 if self.window is None else self._offset - self.kept

    def _drop_outside(self, seen: int) -> None:
        """Drop what no query after so many tokens sees, of which all are stored that were not dropped before."""
        if count := self.leaving(seen, seen - self.kept):
            self.drop_oldest(count)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        """Return the mask of the next chunk, as mlx-lm's caches do: of one with a window where the layer has one."""
        if self.window is None:
            return super().make_mask(N, return_array, window_size)
        older, width = self.window - 1, window_size or self.window
        kept = self.kept - self.leaving(self._offset, self._dropped())
        if N == 1:
            kept = min(kept, older)
            return mask_hiding(kept + 1 - width, kept + 1) if kept >= width else None
        if kept + N <= min(width, self.window) and not return_array:
            return "causal"
        return causal_mask(N, kept + N, width, older)

    def _within_window(self, call: AttentionCall) -> AttentionCall:
        """Return a call whose mask fits the stored tokens and hides those that have left the window."""
        assert self.window is not None
        mask, length, kept = call.mask, call.queries.shape[2], self.kept
        if isinstance(mask, mx.array):  # of a layer that may have dropped more or less
            return call._replace(mask=newest_columns(mask, kept + length))
        if kept + length <= self.window:
            return call
        if length > 1:
            return call._replace(mask=causal_mask(length, kept + length, self.window, self.window - 1))
        hide = mask_hiding if self._group is None else self._group.mask_hiding
        return call._replace(mask=hide(kept + 1 - self.window, kept + 1))

    def _fetch(self, chunk: KeysValues) -> tuple[mx.array, mx.array]:
        """Drop what has left the window, then store a chunk; for a single query return its window alone."""
        if self.window is None:
            return super()._fetch(chunk)
        self._drop_outside(self._offset - chunk.tokens)
        keys, values = super()._fetch(chunk)
        if chunk.tokens == 1:
            keys, values = keys[..., -self.window :, :], values[..., -self.window :, :]
        self._returned = keys.shape[2]
        return keys, values

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Return all stored tokens; of a window that the model fetches, those that it got last."""
        keys, values = super().keys_and_values()
        if self._returned is None:
            return keys, values
        return keys[..., -self._returned :, :], values[..., -self._returned :, :]

    def size(self) -> int:
        """Return how many tokens are stored; in a layer with a window, how many of them a query sees."""
        return self.kept if self.window is None else min(self._offset, self.window)

    def can_take_back(self, n: int) -> bool:
        """Return whether the last tokens can be removed now: in a window, while every token is there that is seen then."""
        dropped = self._dropped()
        if self.window is None or not dropped:
            return super().can_take_back(n)
        there = self._offset - n - dropped >= self.window - 1
        return self._pending_chunk is None and (there or n <= len(self._checkpoints))

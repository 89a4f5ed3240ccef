"""Rows of a batch as mlx-lm's generators see them: requests that join and leave, padding, and the state of all."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import mlx.core as mx

from mlxkv.errors import InputError, UnsupportedError
from mlxkv.live.merging import check_extends, check_whole, copied_row, keep_descriptions
from mlxkv.spec import is_int

if TYPE_CHECKING:
    from mlxkv.live.base import LayerCache

_ENDLESS = 2**62  # tokens of a row that no padding follows


class RowPart(NamedTuple):
    """Part of a call that a row takes.

    Parameters
    ----------
    start, stop
        The columns of the call that are the row's; equal where it has none.
    keys, values
        What the row's `update_and_fetch` returned; None where it has no column.
    """

    start: int
    stop: int
    keys: mx.array | None
    values: mx.array | None


class BatchedRows:
    """Base of `LiveBatch` without what models call.

    Parameters
    ----------
    rows
        Caches of one layer, each of a single text; they belong to the batch.

    Attributes
    ----------
    rows
        One cache a request.
    layer
        The layer's index in the model.
    spec
        Description of the model's cache.
    method_name
        The name under which the method of the first row is registered.
    """

    def __init__(self, rows: Sequence[LayerCache]) -> None:
        self.rows = list(rows)
        first = self.rows[0]
        self.layer, self.spec, self.method_name = first.layer, first.spec, first.method_name
        self._columns = max(row.offset for row in rows)  # as BatchKVCache has them: indexers choose among these
        self._padding: list[tuple[int, int]] | None = None  # tokens of coming calls that a row skips, then takes
        self._pending_chunk: list[RowPart] | None = None
        self._last: tuple[list[bool], list[int], int, list[Any]] | None = None  # what a layer that fetches gave last
        self._offsets: mx.array | None = None

    @property
    def offset(self) -> mx.array:
        """Tokens that each row has seen, `[B]` int32; less than 0 while padding is to come first."""
        if self._offsets is None:
            skipped = [0] * len(self.rows) if self._padding is None else [skip for skip, _ in self._padding]
            self._offsets = mx.array([row.offset - skip for row, skip in zip(self.rows, skipped)], mx.int32)
        return self._offsets

    def _take(self, length: int) -> list[tuple[int, int]]:
        """Return the columns of a call that are each row's, and count them as taken."""
        if self._padding is None:
            return [(0, length)] * len(self.rows)
        spans = []
        for i, (skip, left) in enumerate(self._padding):
            start = min(skip, length)
            stop = start + min(left, length - start)
            spans.append((start, stop))
            self._padding[i] = skip - start, left - (stop - start)
        if all(skip == 0 and left > _ENDLESS // 2 for skip, left in self._padding):
            self._padding = None  # what was on the left is through
        return spans

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Say which tokens of the coming calls are padding.

        Parameters
        ----------
        left_padding
            Padding before each row's tokens; only while the batch is empty.
        lengths
            Tokens of each row in all coming calls up to `finalize`; what follows them is padding.
        right_padding
            Padding after them; `lengths` say where it begins.

        Raises
        ------
        InputError
            For padding on the left of what is stored, on the right without lengths, of another number of rows, or below 0.
        """
        if left_padding is not None and not self.empty():
            raise InputError("padding on the left is possible only before the first token of a batch")
        if lengths is None and right_padding is not None and max(_integers(right_padding), default=0) > 0:
            raise InputError(
                "right_padding needs the lengths of the rows as well: prepare(lengths=..., right_padding=...)"
            )
        skips = [0] * len(self.rows) if left_padding is None else _integers(left_padding)
        counts = [_ENDLESS] * len(self.rows) if lengths is None else _integers(lengths)
        if not len(skips) == len(counts) == len(self.rows):
            raise InputError(
                f"this batch has {len(self.rows)} rows, but padding is given for {len(skips)} and {len(counts)}"
            )
        if min([*skips, *counts], default=0) < 0:
            raise InputError("lengths and padding are numbers of tokens, 0 or more")
        self._padding, self._offsets = list(zip(skips, counts)), None

    def finalize(self) -> None:
        """End what `prepare` began: all rows take all tokens again."""
        self._padding = self._offsets = None

    def filter(self, batch_indices: Sequence[int]) -> None:
        """Keep some rows.

        Parameters
        ----------
        batch_indices
            Their indices, in their new order; a row that is named twice becomes two.
        """
        check_whole(self)
        indices, rows = _integers(batch_indices), self.rows
        self.rows = [
            copied_row(rows[i], ("filter", place)) if i in indices[:place] else rows[i]
            for place, i in enumerate(indices)
        ]
        if self._padding is not None:
            self._padding = [self._padding[i] for i in indices]
        self._columns, self._offsets, self._last = max((row.offset for row in self.rows), default=0), None, None

    def extend(self, other: BatchedRows) -> None:
        """Take copies of the rows of another batch in, after the own ones.

        Parameters
        ----------
        other
            A batch of the same layer, which does not change.

        Raises
        ------
        MismatchError
            When it is none, or when a call of either batch was interrupted.
        """
        check_extends(self, other)
        if self._padding is not None or other._padding is not None:
            self._padding = [
                each for batch in (self, other) for each in batch._padding or [(0, _ENDLESS)] * len(batch.rows)
            ]
        self.rows += [copied_row(row, ("extend", place)) for place, row in enumerate(other.rows)]  # it may be this one
        self._columns, self._offsets, self._last = max(self._columns, other._columns), None, None

    def extract(self, idx: int) -> LayerCache:
        """Return the cache of one request, which goes on alone; the batch keeps its own.

        Parameters
        ----------
        idx
            The row.

        Returns
        -------
        LayerCache
            A copy.
        """
        check_whole(self)
        return copied_row(self.rows[idx], "extract")

    def is_trimmable(self) -> bool:
        """Return whether every row could lose its last tokens now and at any later time.

        Returns
        -------
        bool
            As `LayerCache.is_trimmable`.
        """
        return self._pending_chunk is None and all(row.is_trimmable() for row in self.rows)

    def trim(self, n: int) -> int:
        """Remove the last tokens of every row, as if they had never come.

        Parameters
        ----------
        n
            Number of tokens; of rows with fewer, all.

        Returns
        -------
        int
            Number of tokens removed from the longest row.

        Raises
        ------
        InputError
            When n is negative or no integer.
        UnsupportedError
            When a row cannot remove them; no row changes.
        """
        check_whole(self)
        if is_int(n) and not all(row.can_take_back(min(n, row.offset)) for row in self.rows):
            raise UnsupportedError(
                f"a row of this {self.method_name} batch cannot take {n} tokens back: ask is_trimmable()"
            )
        count = max((row.trim(n) for row in self.rows), default=0)
        self._columns, self._offsets = self._columns - count, None
        return count

    @property
    def state(self) -> list[Any]:
        """The state of each row, for `mx.eval`."""
        return [row.state for row in self.rows]

    @state.setter
    def state(self, state: Sequence[Any]) -> None:
        for row, each in zip(self.rows, state, strict=True):
            row.state = each
        self._columns, self._offsets = max((row.offset for row in self.rows), default=0), None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays held."""
        return sum(row.nbytes for row in self.rows)

    def size(self) -> int:
        """Return how many tokens the longest row stores.

        Returns
        -------
        int
            0 or more.
        """
        return max((row.size() for row in self.rows), default=0)

    def empty(self) -> bool:
        """Return whether no row has seen a token.

        Returns
        -------
        bool
            True before the first chunk.
        """
        return all(row.empty() for row in self.rows)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        for row in self.rows:
            keep_descriptions(row, memo)
        memo[id(self._last)] = self._last
        memo[id(self)] = new = object.__new__(type(self))
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new


def _integers(values: Any) -> list[int]:
    """Return the numbers in a list or an array."""
    return [int(value) for value in (values.tolist() if hasattr(values, "tolist") else values)]

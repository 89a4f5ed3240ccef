"""Arrays that a model gets of all rows of a batch: each row's tokens at the right, so that the chunk is in the same columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import mlx.core as mx

from mlxkv.live.attention import causal_mask

if TYPE_CHECKING:
    from mlxkv.live.base import LayerCache


def columns_before(row: LayerCache, tokens: int) -> int:
    """Return how many stored tokens the model gets beside a chunk.

    Parameters
    ----------
    row
        A layer's cache.
    tokens
        Tokens in the chunk.

    Returns
    -------
    int
        All that are stored; in a window those that it does not drop before.
    """
    kept, window = row.kept, row.window
    if window is None:
        return kept
    kept -= row.leaving(row.offset, row.offset - kept)  # type: ignore[attr-defined]  # methods with windows have it
    return min(kept, window - 1) if tokens == 1 else kept


def aligned(
    arrays: Sequence[mx.array | None], stops: Sequence[int], before: int, shape: Sequence[int], dtype: mx.Dtype
) -> mx.array:
    """Return the keys or values of all rows as one array.

    Parameters
    ----------
    arrays
        A row's stored tokens and its part of the chunk `[1, H, T, D]`; None for a row without a part.
    stops
        The column of the chunk after each row's part.
    before
        Columns before those of the chunk.
    shape
        That of the chunk, `[B, H, L, D]`.
    dtype
        Its type.

    Returns
    -------
    mx.array
        `[B, H, before + L, D]`, zero beside a row's tokens.
    """
    _, heads, length, dims = shape
    padded = []
    for array, stop in zip(arrays, stops):
        if array is None:
            array = mx.zeros((1, heads, before + length, dims), dtype)
        elif array.shape[2] < before + length:
            left = before + stop - array.shape[2]
            array = mx.pad(array, [(0, 0), (0, 0), (left, length - stop), (0, 0)])
        padded.append(array)
    return mx.concatenate(padded)


def common_mask(lengths: Sequence[int], before: int, tokens: int, width: int | None, older: int | None) -> mx.array:
    """Return the causal mask of all rows.

    Parameters
    ----------
    lengths
        Stored tokens of each row; empty where rows find their own columns.
    before
        Columns before those of the chunk.
    tokens
        Tokens in the chunk.
    width, older
        As `causal_mask` takes them.

    Returns
    -------
    mx.array
        Bool `[B, 1, tokens, before + tokens]`, or `[tokens, before + tokens]` without lengths.
    """
    seen = causal_mask(tokens, before + tokens, width, older)
    if not lengths:
        return seen
    hidden = mx.array([before - length for length in lengths])
    return seen & (mx.arange(before + tokens) >= hidden[:, None, None, None])


def row_mask(mask: mx.array, index: int, start: int, stop: int, length: int, before: int | None) -> mx.array:
    """Return the part of a mask of all rows that a row's own tokens have.

    Parameters
    ----------
    mask
        An array that broadcasts to `[B, Hq, L, T]`.
    index
        The row.
    start, stop
        The columns of the chunk that are the row's.
    length
        L, tokens in the chunk.
    before
        Stored tokens of the row; None to leave all columns that there are.

    Returns
    -------
    mx.array
        An array that broadcasts to `[1, Hq, stop - start, before + stop - start]`.
    """
    if mask.ndim == 4 and mask.shape[0] > 1:
        mask = mask[index : index + 1]
    if mask.shape[-1] > 1:
        first = mask.shape[-1] - length
        mask = mask[..., 0 if before is None else max(0, first + start - before) : first + stop]
    return mask if mask.ndim < 2 or mask.shape[-2] == 1 else mask[..., start:stop, :]

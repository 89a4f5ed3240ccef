"""Batches: the caches of several requests in one entry of a prompt cache, as mlx-lm's `BatchGenerator` and server use them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import mlx.core as mx

from mlxkv.errors import InputError, MismatchError, UnsupportedError
from mlxkv.live.attention import AttentionCall, attention_mass, concat_stored, mask_with_bias
from mlxkv.live.columns import aligned, columns_before, common_mask, row_mask
from mlxkv.live.merging import check_whole
from mlxkv.live.rows import BatchedRows, RowPart

if TYPE_CHECKING:
    from mlxkv.live.base import LayerCache


class LiveBatch(BatchedRows):
    """Caches of one layer and several requests, in place of `mlx_lm.models.cache.BatchKVCache`.

    Its rows are the requests' own layer caches: each goes on exactly as it would alone, whatever the others do, so that
    histories may have any length, and may have been quantized, evicted, merged or taken back. Only the model's weights are
    read once for all rows. Arrays that a model gets of all rows (masks, and what `update_and_fetch` returns of stored tokens)
    have each row's tokens at the right; what is left of them is zero, and hidden by the mask.

    A row without tokens in a call, as after the end of a shorter prompt, does not change.

    Parameters
    ----------
    rows
        Caches of one layer, each of a single text; they belong to the batch.

    Attributes
    ----------
    rows
        One cache a request.
    """

    # Attention is computed row by row, by each row's own code. Where all rows are equally far in packing (int8, int4, kivi),
    # their packed tokens could be stacked for one call of a kernel; on a CPU the weights, not these calls, take the time.

    def __init__(self, rows: Sequence[LayerCache]) -> None:
        super().__init__(rows)
        first = self.rows[0]
        self._latent, self._fetching, self._window = first.latent, first._fetching, first.window
        if first.window is not None:
            self.max_size = first.window
        # Layers that read by themselves get arrays of all rows, and may use a mask that another layer made.
        self._masked = any(layer is not None and layer.use == "fetch" for layer in first.spec.layers)
        self._ties: list[mx.array] = []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Hold a chunk until `attend`, as `LayerCache.update_and_fetch` does for each row.

        Parameters
        ----------
        keys, values
            The chunk `[B, Hkv, L, D]` and `[B, Hkv, L, Dv]`.

        Returns
        -------
        tuple of mx.array
            What `LayerCache.update_and_fetch` returns, of all rows: the chunk, or `[B, Hkv, columns + L, D]`.

        Raises
        ------
        UnsupportedError
            When the attention of the previous chunk has not been computed.
        MismatchError
            When the call has another number of texts than the batch, or layers have seen different numbers of tokens.
        """
        check_whole(self)
        count, length = len(self.rows), keys.shape[2]
        if keys.shape[0] != count:
            raise MismatchError(f"this batch holds {count} texts, the call has {keys.shape[0]}")
        before = self._before(length) if self._fetching or (self._latent and (length > 1 or self._masked)) else 0
        parts: list[RowPart] = []
        chunks = zip(_split(keys, count), _split(values, count))
        for row, (start, stop), (key, value) in zip(self.rows, self._take(length), chunks):
            parts.append(self._update(row, start, stop, key, value))
            self._pending_chunk = parts
        self._columns, self._offsets = self._columns + length, None
        if self._fetching:
            return self._fetch(parts, before, keys, values)
        if not self._latent:
            return keys, values
        if length == 1:
            before = max([before, *(part.values.shape[2] - 1 for part in parts if part.values is not None)])
        return (keys if length == 1 else _aligned(parts, 2, before, keys)), _aligned(parts, 3, before, values)

    def _before(self, length: int) -> int:
        """Return how many columns arrays of all rows have before those of a chunk."""
        if self._masked and self._window is None:
            return self._columns
        return max(columns_before(row, length) for row in self.rows)

    def _update(self, row: LayerCache, start: int, stop: int, keys: mx.array, values: mx.array) -> RowPart:
        """Let a row take its part of a chunk."""
        length = keys.shape[2]
        if start == stop:
            return RowPart(start, stop, None, None)
        if stop - start < length:
            keys, values = keys[:, :, start:stop], values[:, :, start:stop]
        if self._latent and not self._fetching and stop - start == 1 < length:
            # The model derives keys of all tokens, as it does not for a single one.
            latents = concat_stored(row.buckets(), 0, keys)
            return RowPart(start, stop, latents, row.update_and_fetch(keys, values)[1])
        return RowPart(start, stop, *row.update_and_fetch(keys, values))

    def _fetch(self, parts: list[RowPart], before: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return what rows that have stored their part of the chunk gave the model."""
        stops = [part.stop for part in parts]
        self._last = (
            [part.keys is not None for part in parts],
            stops,
            before,
            [(x.shape, x.dtype) for x in (keys, values)],
        )
        self._pending_chunk = None
        keys, values = _aligned(parts, 2, before, keys), _aligned(parts, 3, before, values)
        return self._tied(keys), values

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Return each row's attention over its stored tokens and its part of the chunk, and let the row absorb that.

        Parameters
        ----------
        queries
            `[B, Hq, L, D]`.
        keys, values
            The arrays that `update_and_fetch` returned, or for MLA those that the model derived from them.
        scale
            Factor of the scores.
        mask
            None, "causal", or an array that broadcasts to `[B, Hq, L, columns + L]`.
        sinks
            `[Hq]`, as `LayerCache.attend` takes them.

        Returns
        -------
        mx.array
            `[B, Hq, L, Dv]`, zero where a row has no token.

        Raises
        ------
        UnsupportedError
            When `update_and_fetch` was not called before.
        """
        if self._fetching:
            return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
        parts = self._pending_chunk
        if parts is None:
            raise UnsupportedError("a batch of live caches attends once for each update_and_fetch")
        each, length = _split(queries, len(self.rows)), queries.shape[2]
        if self._latent or isinstance(mask, mx.array) or any(part.stop - part.start < length for part in parts):
            call = AttentionCall(queries, keys, values, scale, mask, sinks)
            outputs = [self._attend_part(i, part, query, call) for i, (part, query) in enumerate(zip(parts, each))]
        else:
            outputs = [
                row.attend(query, part.keys, part.values, scale, mask, sinks)  # type: ignore[arg-type]  # all have tokens
                for row, part, query in zip(self.rows, parts, each)
            ]
        self._pending_chunk = None
        return self._tied(mx.concatenate(outputs))

    def _attend_part(self, index: int, part: RowPart, queries: mx.array, call: AttentionCall) -> mx.array:
        """Return a row's attention, with zeros where it has no tokens."""
        row, (start, stop, keys, values), length = self.rows[index], part, queries.shape[2]
        if keys is None or values is None:
            return mx.zeros((*queries.shape[:3], call.values.shape[3]), queries.dtype)
        tokens = stop - start
        before = values.shape[2] - tokens  # in the arrays that the model got
        mask = call.mask
        if isinstance(mask, mx.array):  # a row with a window finds its own columns
            stored = before if self._latent else min(row.kept, row.offset - tokens)
            mask = row_mask(mask, index, start, stop, length, None if self._window is not None else stored)
        elif tokens == 1:
            mask = None
        if self._latent and length == 1:
            values = keys  # as models that get latents alone have it
        elif self._latent:
            last = call.keys.shape[2] - length + stop
            keys, values = (x[index : index + 1, :, last - tokens - before : last] for x in (call.keys, call.values))
        one = AttentionCall(queries[:, :, start:stop], keys, values, call.scale, mask, call.sinks)
        output = _attend_derived(row, one) if self._latent and tokens == 1 < length else row.attend(*one)
        if tokens < length:
            output = mx.pad(output, [(0, 0), (0, 0), (start, length - stop), (0, 0)])
        return output

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        """Return the mask of the next chunk: its rows know what they store, and what is left of it.

        Parameters
        ----------
        N
            Tokens in the chunk, padding included.
        return_array
            Whether to return an array in place of "causal".
        window_size
            Number of newest tokens that a query sees, its own included; None for those of the layer.

        Returns
        -------
        mx.array, str or None
            None for one token, else "causal" or bool `[N, columns + N]`. In models with layers that read what is stored
            by themselves bool `[B, 1, N, columns + N]`, where rows have different numbers of tokens.

        Raises
        ------
        UnsupportedError
            For a window where tokens were given up.
        """
        window = self._window
        if window_size is not None and window is None:
            for row in self.rows:
                row.make_mask(N, return_array, window_size)  # which says whether it can
        width = window_size or window
        narrow = width != window
        if not (self._masked or narrow or (return_array and N > 1)):
            return None if N == 1 else "causal"
        lengths = [columns_before(row, N) for row in self.rows]
        before = self._before(N)
        equal = not self._masked or set(lengths) == {before}
        if equal and (N == 1 or not return_array) and (width is None or before + N <= min(width, window or width)):
            return None if N == 1 else "causal"
        return common_mask(lengths if self._masked else (), before, N, width, None if window is None else window - 1)

    @property
    def keys(self) -> mx.array:
        """An array to which models tie what has to be computed with the batch."""
        return mx.zeros(1)

    @keys.setter
    def keys(self, keys: mx.array) -> None:
        self._ties.append(keys)

    values = keys

    def _tied(self, array: mx.array) -> mx.array:
        """Return an array with which everything is computed that models tied to the layer."""
        ties, self._ties = self._ties, []
        return mx.depends(array, ties) if ties else array

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Return what models read of a layer after another one took its tokens in.

        Returns
        -------
        tuple of mx.array
            What `update_and_fetch` returned last, `[B, Hkv, columns + L, D]`.

        Raises
        ------
        InputError
            Where that was not all tokens, since the model attends to them through mlx-lm's function.
        """
        if self._last is None:
            raise InputError("no model has read this layer: its rows have their own keys_and_values")
        took, stops, before, forms = self._last
        stored = [row.keys_and_values() if some else (None, None) for row, some in zip(self.rows, took)]
        keys, values = (aligned([each[slot] for each in stored], stops, before, *forms[slot]) for slot in (0, 1))
        return keys, values


def _aligned(parts: Sequence[RowPart], slot: int, before: int, chunk: mx.array) -> mx.array:
    """Return the keys (2) or values (3) of all rows as one array."""
    return aligned([part[slot] for part in parts], [part.stop for part in parts], before, chunk.shape, chunk.dtype)  # type: ignore[misc]


def _split(array: mx.array, count: int) -> Sequence[mx.array]:
    """Return the rows of an array, each `[1, ...]`."""
    return list(mx.split(array, count)) if count > 1 else [array]


def _attend_derived(row: LayerCache, call: AttentionCall) -> mx.array:
    """Return the attention of a row's only token in a chunk of several, where the model derived keys of all tokens (MLA).

    The row alone would get its token as latents; what follows is otherwise what it does.
    """
    if row.kept == row.offset:  # the token is stored, and there is nothing else to do
        return row.attend(*call)
    queries, keys, values, scale, mask, sinks = call
    mask = mask_with_bias(mask, row.score_bias(), queries)
    output = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
    chunk, mass = row._pending_chunk, None
    assert chunk is not None
    if row.observation_window:
        mass = attention_mass(queries, keys, scale, mask, 1, chunk.keys.shape[1], sinks)
    row._checkpoints = []
    row._store(chunk, mass)
    row._end()
    return mx.depends(output, row._arrays())

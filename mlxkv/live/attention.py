"""Attention over stored tokens and a chunk: masks, the bias of stored entries, and the attention that tokens get."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import mlx.core as mx

from mlxkv.kernels import metal
from mlxkv.kernels.bits import unpack
from mlxkv.kernels.decode_attention import Bucket, decode_attention
from mlxkv.live.arrays import KeysValues

MASKED = -1e38  # score of what a bool mask hides; finite, so that a query that sees nothing gives no NaN
_LOG2_E = math.log2(math.e)
_FEW_SCORES = 2**26  # that may be in memory at once
_ATTENDED_BLOCK = 256  # queries whose scores are held in memory at a time on a CPU
_QUERY_BLOCK = 64  # queries whose attention weights are held in memory at a time


class AttentionCall(NamedTuple):
    """The arguments that a model passes to attention.

    Parameters
    ----------
    queries
        `[B, Hq, L, D]`.
    keys, values
        The chunk, or for MLA the arrays that the model derived from what `update_and_fetch` returned.
    scale
        Factor of the scores.
    mask
        None, "causal", or an array that broadcasts to `[B, Hq, L, kept + L]`: bool, or added to the scores.
    sinks
        `[Hq]`: a logit of each query head that takes part in its softmax and adds nothing to the output; None for none.
    """

    queries: mx.array
    keys: mx.array
    values: mx.array
    scale: float
    mask: mx.array | str | None
    sinks: mx.array | None = None

    def of_token(self, index: int, token: KeysValues, tokens: int) -> AttentionCall:
        """Return the call of one token of the chunk, as decoding would make it.

        Parameters
        ----------
        index
            The token's index in the chunk.
        token
            Its key and value.
        tokens
            Number of tokens that it can see: those stored before the chunk, and those of the chunk up to itself.

        Returns
        -------
        AttentionCall
            Its queries are `[B, Hq, 1, D]`.
        """
        rows = slice(index, index + 1)
        mask = mask_rows(self.mask, rows, tokens) if isinstance(self.mask, mx.array) else None
        return AttentionCall(self.queries[:, :, rows], *token, self.scale, mask, self.sinks)


def stored_attention(
    call: AttentionCall,
    stored: Sequence[Bucket],
    chunk: KeysValues,
    *,
    bias: mx.array | None,
    latent: bool,
    window: int,
) -> tuple[mx.array, mx.array | None]:
    """Return the attention over stored tokens and a chunk, and the attention that each token gets.

    Parameters
    ----------
    call
        What the model passed.
    stored
        The tokens before the chunk.
    chunk
        The chunk as it came; for MLA latents and k_pe.
    bias
        `[B, 1 or Hkv, kept]`, added to the scores of stored entries, or None.
    latent
        Whether the model uses MLA.
    window
        Number of queries, from the end, whose attention is summed.

    Returns
    -------
    tuple
        The output `[B, Hq, L, Dv]`, and `[B, Hkv, kept + L]` float32, None where the window is 0.
    """
    queries, keys, values, scale, mask, sinks = call
    length = queries.shape[2]
    mask = mask_with_bias(mask, bias, queries)
    if length == 1 and (window or not all(k.is_unquantized and v.is_unquantized for k, v in stored)):
        tokens = [*stored, chunk.as_bucket()]
        if latent:
            tokens = [(k, k) for k, _ in tokens]
        added = mask_to_bias(mask, queries, sum(k.shape[2] for k, _ in tokens))
        output, mass = decode_attention(queries, tokens, scale, added, sinks)
        return output, mass if window else None
    if not latent:
        keys, values = concat_stored(stored, 0, keys), concat_stored(stored, 1, values)
    elif length == 1:
        keys = values = concat_stored(stored, 0, keys)
    last = min(window, length)
    if (
        last and length > 1 and not metal.available()
    ):  # MLX's attention on a CPU takes longer, and the weights are needed
        return _counted_attention(queries, keys, values, scale, mask, last, chunk.keys.shape[1], sinks)
    output = _attention_in_blocks(queries, keys, values, scale, mask, sinks)
    return output, attention_mass(queries, keys, scale, mask, last, chunk.keys.shape[1], sinks) if last else None


def _attention_in_blocks(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
) -> mx.array:
    """Return mlx's attention; on a CPU, where it holds all scores in memory, of a few hundred queries at a time."""
    heads, (length, tokens) = queries.shape[0] * queries.shape[1], (queries.shape[2], keys.shape[2])
    step = length if metal.available() or heads * length * tokens <= _FEW_SCORES else _ATTENDED_BLOCK
    outputs: list[mx.array] = []
    for start in range(0, length, step):
        stop = min(start + step, length)
        seen = tokens - length + stop if isinstance(mask, str) else tokens  # later ones are hidden from all of these
        part = mask_rows(mask, slice(start, stop)) if isinstance(mask, mx.array) else mask
        rows = mx.depends(queries[:, :, start:stop], outputs[-1:]) if outputs else queries[:, :, start:stop]
        outputs.append(
            mx.fast.scaled_dot_product_attention(
                rows, keys[:, :, :seen], values[:, :, :seen], scale=scale, mask=part, sinks=sinks
            )
        )
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)


def concat_stored(stored: Sequence[Bucket], slot: int, chunk: mx.array) -> mx.array:
    """Return all stored keys or values, unpacked temporarily, followed by the chunk.

    Parameters
    ----------
    stored
        Stored tokens.
    slot
        0 for keys, 1 for values.
    chunk
        `[B, Hkv, L, D]`.

    Returns
    -------
    mx.array
        `[B, Hkv, kept + L, D]` of the chunk's type.
    """
    return mx.concatenate([*(unpack(pair[slot], chunk.dtype) for pair in stored), chunk], axis=-2)


def causal_mask(queries: int, tokens: int, window: int | None = None, older: int | None = None) -> mx.array:
    """Return a causal mask: the last query sees all tokens, the query before it all but the last, and so on.

    Parameters
    ----------
    queries
        Number of queries; they belong to the last tokens.
    tokens
        Number of tokens, those of the queries included.
    window
        Number of newest tokens that a query sees, its own included; None for all.
    older
        Number of tokens before the first query that any query sees; None for all.

    Returns
    -------
    mx.array
        Bool `[queries, tokens]`, True where a query sees a token.

    Examples
    --------
    >>> causal_mask(2, 4).tolist()
    [[True, True, True, False], [True, True, True, True]]
    >>> causal_mask(2, 4, window=2).tolist()
    [[False, True, True, False], [False, False, True, True]]
    """
    rows, columns = mx.arange(tokens - queries, tokens)[:, None], mx.arange(tokens)[None]
    mask = rows >= columns
    if window is not None:
        mask = mask & (rows < columns + window)
    if older is not None:
        mask = mask & (columns >= tokens - queries - older)
    return mask


def newest_columns(mask: mx.array, tokens: int) -> mx.array:
    """Return a mask over so many newest tokens, where older ones are out of every query's window.

    Parameters
    ----------
    mask
        An array that broadcasts to `[B, Hq, L, T]`: bool, or added to the scores. Its last column is the newest token.
    tokens
        Number of tokens to return; those that the mask does not have are hidden.

    Returns
    -------
    mx.array
        The mask with `tokens` columns, unless it has a single one.

    Examples
    --------
    >>> newest_columns(mx.array([True, True]), 3).tolist(), newest_columns(mx.array([0.0, 1.0, 2.0]), 2).tolist()
    ([False, True, True], [1.0, 2.0])
    """
    missing = tokens - mask.shape[-1]
    if missing <= 0 or mask.shape[-1] == 1:
        return mask if missing >= 0 else mask[..., -tokens:]
    hidden: bool | float = False if mask.dtype == mx.bool_ else max(MASKED, mx.finfo(mask.dtype).min)
    return mx.concatenate([mx.full((*mask.shape[:-1], missing), hidden, mask.dtype), mask], axis=-1)


def attention_mass(
    queries: mx.array,
    keys: mx.array,
    scale: float,
    mask: mx.array | str | None,
    last: int,
    kv_heads: int,
    sinks: mx.array | None = None,
) -> mx.array:
    """Return the total attention that each token gets from the last queries.

    Parameters
    ----------
    queries
        `[B, Hq, L, D]`.
    keys
        `[B, H, T, D]`.
    scale
        Factor of the scores.
    mask
        None, "causal", or an array that broadcasts to `[B, Hq, L, T]`: bool, or added to the scores.
    last
        Number of queries to count, from the end.
    kv_heads
        Number of kv heads to return; divides Hq.
    sinks
        `[Hq]`: a logit of each query head that takes part in its softmax; None for none.

    Returns
    -------
    mx.array
        `[B, kv_heads, T]` float32: attention probabilities, summed over the counted queries and over the query
        heads that share a kv head; without what the sinks take.
    """
    return _counted_attention(queries, keys, None, scale, mask, last, kv_heads, sinks)[1]


def _counted_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array | None,
    scale: float,
    mask: mx.array | str | None,
    last: int,
    kv_heads: int,
    sinks: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """Return the attention `[B, Hq, L, Dv]` (of no query without values), and what `attention_mass` returns."""
    B, Hq, L, D = queries.shape
    H, T = keys.shape[1:3]
    columns = keys.astype(mx.float32).swapaxes(-1, -2)
    summed = None if values is None else values.astype(mx.float32)
    mass, outputs = mx.zeros((B, kv_heads, 1, T)), [queries[:, :, :0, :0]]
    first = L - last
    edges = [*range(first if values is None else 0, first, _QUERY_BLOCK), *range(first, L, _QUERY_BLOCK), L]
    for start, stop in pairwise(edges):
        rows = slice(start, stop)
        block = queries[:, :, rows].astype(mx.float32) * (scale * _LOG2_E)
        scores = (block.reshape(B, H, -1, D) @ columns).reshape(B, Hq, -1, T)
        if mask is not None:
            part = causal_mask(L - start, T)[: rows.stop - start] if isinstance(mask, str) else mask_rows(mask, rows)
            scores = mx.where(part, scores, MASKED) if part.dtype == mx.bool_ else scores + part * _LOG2_E
        top = scores.max(axis=-1, keepdims=True)
        # Powers of 2, since MLX's exp, also in softmax, takes three times as long on a CPU.
        if sinks is None:
            weights = mx.power(2.0, scores - top)
            total = weights.sum(axis=-1, keepdims=True)
        else:
            logits = sinks.astype(mx.float32)[:, None, None] * _LOG2_E
            top = mx.maximum(top, logits)
            weights = mx.power(2.0, scores - top)
            total = weights.sum(axis=-1, keepdims=True) + mx.power(2.0, logits - top)
        if start >= first:
            shares, together = ((x.reshape(B, kv_heads, -1, x.shape[-1])) for x in (1 / total, weights))
            mass += shares.swapaxes(-1, -2) @ together
        if summed is not None:
            output = (weights.reshape(B, H, -1, T) @ summed).reshape(B, Hq, -1, summed.shape[-1]) / total
            # The weights of a block are gone before those of the next are there.
            outputs.append(mx.depends(output.astype(queries.dtype), [mass]))
    return mx.concatenate(outputs[1:] or outputs, axis=2), mass[:, :, 0]


def mask_with_bias(mask: mx.array | str | None, bias: mx.array | None, queries: mx.array) -> mx.array | str | None:
    """Combine the mask of a chunk with the score bias of stored entries.

    Parameters
    ----------
    mask
        The mask that is passed to `LayerCache.attend`; arrays broadcast to `[B, Hq, L, kept + L]`.
    bias
        `[B, 1 or Hkv, kept]`, added to the scores of stored entries, or None.
    queries
        `[B, Hq, L, D]`; only shape and type are used.

    Returns
    -------
    mx.array, str or None
        The mask unchanged if there is no bias, else an additive mask `[B, Hq, L, kept + L]`.
    """
    if bias is None:
        return mask
    Hq, L = queries.shape[1:3]
    bias = mx.pad(mx.repeat(bias, Hq // bias.shape[1], axis=1), [(0, 0), (0, 0), (0, L)])[:, :, None]
    if mask is None:
        return bias.astype(queries.dtype)
    seen = causal_mask(L, bias.shape[-1]) if isinstance(mask, str) else mask
    hidden = max(MASKED, mx.finfo(queries.dtype).min)
    return (mx.where(seen, bias, hidden) if seen.dtype == mx.bool_ else seen + bias).astype(queries.dtype)


def mask_rows(mask: mx.array, rows: slice, tokens: int | None = None) -> mx.array:
    """Return the part of a mask that some queries, and the first tokens, have.

    Parameters
    ----------
    mask
        An array that broadcasts to `[B, Hq, L, T]`.
    rows
        The queries.
    tokens
        Number of tokens; None for all.

    Returns
    -------
    mx.array
        A mask that broadcasts to `[B, Hq, queries, tokens]`.
    """
    if mask.shape[-1] > 1:
        mask = mask[..., :tokens]
    return mask if mask.ndim < 2 or mask.shape[-2] == 1 else mask[..., rows, :]


def mask_to_bias(mask: mx.array | str | None, queries: mx.array, tokens: int) -> mx.array | None:
    """Return what the mask of a single query adds to its scores.

    Parameters
    ----------
    mask
        None, "causal" (which hides nothing from the last token), or an array that broadcasts to `[B, Hq, 1, T]`.
    queries
        `[B, Hq, 1, D]`; only the shape is used.
    tokens
        T.

    Returns
    -------
    mx.array or None
        `[B, 1 or Hq, T]` float32.
    """
    if not isinstance(mask, mx.array):
        return None
    if mask.dtype == mx.bool_:
        mask = mx.where(mask, 0.0, MASKED)
    mask = mask.astype(mx.float32).reshape(*(1,) * (4 - mask.ndim), *mask.shape)
    return mx.broadcast_to(mask, (queries.shape[0], mask.shape[1], 1, tokens))[:, :, 0]

"""Array operations of live caches: storage types, masks, and the attention that tokens get."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx

from mlxkv.kernels.bits import UNQUANTIZED, QuantizedArray, pack
from mlxkv.kernels.decode_attention import Bucket

_QUERY_BLOCK = 64  # queries whose attention weights are held in memory at a time


def unquantized(x: mx.array) -> QuantizedArray:
    """Wrap an unquantized array in the form that buckets have.

    Parameters
    ----------
    x
        `[..., T, D]`.

    Returns
    -------
    QuantizedArray
        The same values, marked as not quantized.
    """
    return pack(x, UNQUANTIZED, 1, x.shape[-1])


def to_storage_dtype(x: mx.array) -> mx.array:
    """Convert float32 to float16 and leave other types, so that caches take at most 2 bytes per element.

    Parameters
    ----------
    x
        Any shape.

    Returns
    -------
    mx.array
        The converted array, of the same shape.
    """
    return x.astype(mx.float16) if x.dtype == mx.float32 else x


def copy_without_parent(x: mx.array) -> mx.array:
    """Return a copy that owns its memory.

    A slice or view would keep the whole array that it belongs to in memory.

    Parameters
    ----------
    x
        `[..., T, D]`.

    Returns
    -------
    mx.array
        The same values.
    """
    return mx.concatenate([x[..., :0, :], x], axis=-2)


class KeysValues(NamedTuple):
    """Keys and values of the same tokens, unquantized.

    Parameters
    ----------
    keys
        `[B, Hkv, T, D]`; for MLA the latents.
    values
        `[B, Hkv, T, Dv]`; for MLA k_pe, the part of the keys that is rotated.
    """

    keys: mx.array
    values: mx.array

    @property
    def tokens(self) -> int:
        """T, the number of tokens."""
        return self.keys.shape[2]

    def append(self, newer: KeysValues) -> KeysValues:
        """Append newer tokens.

        Parameters
        ----------
        newer
            Tokens with the same heads and dims.

        Returns
        -------
        KeysValues
            These tokens, then the newer ones.
        """
        return KeysValues(*concat_pairs(self, newer))

    def copy_tokens(self, start: int = 0, stop: int | None = None) -> KeysValues:
        """Return copies of the tokens in a slice, which own their memory.

        Parameters
        ----------
        start, stop
            Bounds of the slice.

        Returns
        -------
        KeysValues
            The copies.
        """
        return KeysValues(*(copy_without_parent(part[..., start:stop, :]) for part in self))

    def as_bucket(self) -> Bucket:
        """Return the pair in the form that `LayerCache.buckets` returns.

        Returns
        -------
        Bucket
            Keys and values, marked as not quantized.
        """
        return unquantized(self.keys), unquantized(self.values)


def append_chunk(stored: KeysValues | None, keys: mx.array, values: mx.array) -> KeysValues:
    """Append a chunk to stored tokens, in the storage type.

    Parameters
    ----------
    stored
        Older tokens, None if there are none.
    keys, values
        The chunk, `[B, Hkv, L, D]` and `[B, Hkv, L, Dv]`; may be views of larger arrays.

    Returns
    -------
    KeysValues
        Stored tokens, then the chunk; owns its memory.
    """
    chunk = KeysValues(to_storage_dtype(keys), to_storage_dtype(values))
    return chunk.copy_tokens() if stored is None else stored.append(chunk)


def concat_pairs(first: Iterable[mx.array], second: Iterable[mx.array]) -> Iterator[mx.array]:
    """Concatenate corresponding arrays of older and newer tokens.

    Parameters
    ----------
    first, second
        Equally many arrays, `[B, H, T1, ...]` and `[B, H, T2, ...]`.

    Returns
    -------
    Iterator of mx.array
        Arrays `[B, H, T1 + T2, ...]`.
    """
    return (mx.concatenate([*pair], axis=2) for pair in zip(first, second))


def safe_divide(a: mx.array, b: mx.array) -> mx.array:
    """Return a / b, and 0 where b is 0 or negative.

    Parameters
    ----------
    a, b
        Arrays whose shapes broadcast.

    Returns
    -------
    mx.array
        The quotient.
    """
    return mx.where(b > 0, a / b, 0)


def unit_vectors(x: mx.array) -> mx.array:
    """Normalize vectors to length 1; zero vectors stay zero.

    Parameters
    ----------
    x
        `[..., D]`.

    Returns
    -------
    mx.array
        `[..., D]`.
    """
    return safe_divide(x, mx.linalg.norm(x, axis=-1, keepdims=True))


def causal_mask(queries: int, tokens: int) -> mx.array:
    """Return a causal mask: the last query sees all tokens, the query before it all but the last, and so on.

    Parameters
    ----------
    queries
        Number of queries; they belong to the last tokens.
    tokens
        Number of tokens, those of the queries included.

    Returns
    -------
    mx.array
        Bool `[queries, tokens]`, True where a query sees a token.

    Examples
    --------
    >>> causal_mask(2, 4).tolist()
    [[True, True, True, False], [True, True, True, True]]
    """
    return mx.arange(tokens - queries, tokens)[:, None] >= mx.arange(tokens)[None]


def attention_mass(
    queries: mx.array, keys: mx.array, scale: float, mask: mx.array | str | None, last: int, kv_heads: int
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
        None, "causal", or an array `[..., L, T]`: bool, or added to the scores.
    last
        Number of queries to count, from the end.
    kv_heads
        Number of kv heads to return; divides Hq.

    Returns
    -------
    mx.array
        `[B, kv_heads, T]` float32: attention probabilities, summed over the counted queries and over the query
        heads that share a kv head.
    """
    B, Hq, L, _ = queries.shape
    H, T = keys.shape[1:3]
    mass = mx.zeros((B, kv_heads, T))
    for start in range(L - last, L, _QUERY_BLOCK):
        rows = slice(start, min(start + _QUERY_BLOCK, L))
        block = (queries[:, :, rows].astype(mx.float32) * scale).reshape(B, H, Hq // H, -1, queries.shape[-1])
        scores = (block @ keys.astype(mx.float32)[:, :, None].swapaxes(-1, -2)).reshape(B, Hq, -1, T)
        part = causal_mask(L, T)[rows] if isinstance(mask, str) else mask if mask is None else mask[..., rows, :]
        if part is not None:
            scores = mx.where(part, scores, -mx.inf) if part.dtype == mx.bool_ else scores + part
        mass += mx.softmax(scores, axis=-1).reshape(B, kv_heads, -1, T).sum(axis=2)
    return mass


def mask_with_bias(mask: mx.array | str | None, bias: mx.array | None, queries: mx.array) -> mx.array | str | None:
    """Combine the mask of a chunk with the score bias of stored entries.

    Parameters
    ----------
    mask
        The mask that is passed to `LayerCache.attend`.
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
    return (mx.where(seen, bias, -mx.inf) if seen.dtype == mx.bool_ else seen + bias).astype(queries.dtype)


def iter_arrays(tree: object) -> Iterator[mx.array]:
    """Iterate over all arrays in nested lists, tuples, dicts and QuantizedArray.

    Parameters
    ----------
    tree
        A cache's state; items that are no arrays are skipped.

    Returns
    -------
    Iterator of mx.array
        Depth first.
    """
    if isinstance(tree, mx.array):
        yield tree
    elif isinstance(tree, QuantizedArray):
        yield from (tree.words, tree.bias, tree.scale)
    elif isinstance(tree, Sequence) and not isinstance(tree, str):
        for item in tree:
            yield from iter_arrays(item)
    elif isinstance(tree, Mapping):
        yield from iter_arrays(list(tree.values()))

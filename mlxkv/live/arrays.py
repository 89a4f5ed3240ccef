"""Array operations of live caches: storage types, masks, and the attention that tokens get."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxkv.kernels.bits import UNQUANTIZED, QuantizedArray, pack
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.live.storage import to_storage_dtype


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
    like = _like(tuple(x.shape), x.dtype)
    if like.words.shape[-1] * 32 != like.dim * like.bits:  # rows end within a word
        return pack(x, UNQUANTIZED, 1, like.dim)
    same = object.__new__(QuantizedArray)
    same.__dict__.update(like.__dict__, words=x.view(mx.uint32))
    return same


@lru_cache(maxsize=256)
def _like(shape: tuple[int, ...], dtype: mx.Dtype) -> QuantizedArray:
    """Return zeros, which are never computed, in the form that buckets have: all but the words is the same for all arrays."""
    like = pack(mx.zeros(shape, dtype), UNQUANTIZED, 1, shape[-1])
    none = mx.array(np.zeros(like.bias.shape, np.float32), dtype)  # there at once: any thread can use it
    like = dataclasses.replace(like, bias=none, scale=none)
    _ = like.kind  # computed here, once for all of them
    return like


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

    def slice_tokens(self, start: int, stop: int) -> KeysValues:
        """Return the tokens in a slice, as views.

        Parameters
        ----------
        start, stop
            Bounds of the slice.

        Returns
        -------
        KeysValues
            The tokens.
        """
        return KeysValues(self.keys[:, :, start:stop], self.values[:, :, start:stop])

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


def map_arrays(tree: Any, change: Callable[[mx.array], mx.array]) -> Any:
    """Return nested lists, tuples, dicts and QuantizedArray with every array changed.

    Parameters
    ----------
    tree
        A cache's state; what is no array stays.
    change
        Called for each array, in the order of `iter_arrays`.

    Returns
    -------
    object
        A tree of the same form, which shares no list or dict with the old one.
    """
    if isinstance(tree, mx.array):
        return change(tree)
    if isinstance(tree, QuantizedArray):
        return dataclasses.replace(tree, words=change(tree.words), bias=change(tree.bias), scale=change(tree.scale))
    if isinstance(tree, tuple):
        parts = [map_arrays(item, change) for item in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    if isinstance(tree, list):
        return [map_arrays(item, change) for item in tree]
    if isinstance(tree, dict):
        return {key: map_arrays(item, change) for key, item in tree.items()}
    return tree


def held(array: mx.array) -> mx.array:
    """Return the array as it is now, which later writes into it do not change.

    Parameters
    ----------
    array
        Any shape.

    Returns
    -------
    mx.array
        The same values; no copy is made until one of the two is written to.
    """
    return copy.copy(array)


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

"""Base class of methods that quantize old tokens and keep the newest tokens unquantized."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import Any, ClassVar

import mlx.core as mx

from mlxkv.config import Config
from mlxkv.errors import FormatError
from mlxkv.kernels.bits import QuantizedArray, pack, unpack
from mlxkv.kernels.decode_attention import Bucket, slice_rows
from mlxkv.live.arrays import copy_without_parent
from mlxkv.live.base import KeysValues, LayerCache, append_chunk
from mlxkv.live.checks import check_kept, check_like
from mlxkv.spec import CacheSpec

BLOCK = 64  # tokens packed at a time: few, so that the tail stays small, but enough that `packed` is rarely copied


class PackingCache(LayerCache):
    """Base class of methods that quantize old tokens and keep the newest unquantized, in a tail.

    While fewer than `recent + BLOCK` tokens have come, all are in the tail; after that the tail has at least `recent`
    and fewer than `recent + BLOCK` tokens. Tokens leave it in blocks of BLOCK, so the stored values do not depend on
    how the text was split into chunks. If `trim` removes part of a block, the rest of the block returns to the tail
    with its quantized values. A method implements `pack`.

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
    packed
        Keys and values of the quantized tokens, None while there are none.
    tail
        The newest tokens.
    recent
        Minimal number of tokens that stay in the tail.
    """

    state_fields = ("packed", "tail")
    state_types: ClassVar = {"tail": KeysValues}
    takes_tokens_back = True
    recent = 0

    def __init__(self, config: Config, spec: CacheSpec, layer: int) -> None:
        super().__init__(config, spec, layer)
        self.packed: Bucket | None = None
        self.tail: KeysValues | None = None

    @abstractmethod
    def pack(self, keys: mx.array, values: mx.array) -> Bucket:
        """Quantize whole blocks of tokens.

        Parameters
        ----------
        keys, values
            `[B, Hkv, n * BLOCK, D]` and `[B, Hkv, n * BLOCK, Dv]`.

        Returns
        -------
        Bucket
            Quantized keys and values. The number of tokens per tile divides BLOCK.
        """

    def buckets(self) -> list[Bucket]:
        """Return the packed tokens, then the tail."""
        packed = [] if self.packed is None else [self.packed]
        return packed if self.tail is None else [*packed, self.tail.as_bucket()]

    def check_state(self) -> None:
        """Check how the packed tokens are packed, then what every method has; no token may be missing."""
        if self.packed is not None:
            block = (mx.zeros((1, slot.heads, BLOCK, slot.dim)) for slot in self.slots)
            check_like(self.packed, "packed", self.pack(*block))
            if token_count(self.packed) % BLOCK:
                raise FormatError(f"{token_count(self.packed)} tokens are packed, which are no blocks of {BLOCK}")
        super().check_state()
        check_kept(self, self.offset)

    def absorb(self, keys: mx.array, values: mx.array, mass: mx.array | None) -> None:
        """Append the chunk to the tail and pack the blocks that are old enough."""
        tail = append_chunk(self.tail, keys, values)
        count = max(0, tail.tokens - self.recent) // BLOCK * BLOCK
        if count:
            block = self.pack(tail.keys[..., :count, :], tail.values[..., :count, :])
            self.packed = block if self.packed is None else concat_buckets(self.packed, block)
            tail = tail.copy_tokens(count)
        self.tail = tail

    def _only_appended_to(self, state: dict[str, Any]) -> bool:
        """Return whether no block was packed since."""
        return token_count(state["packed"]) == token_count(self.packed)

    def _trim(self, count: int) -> None:
        """Drop tokens from the tail, then whole blocks; unpack what remains of a trimmed block."""
        left = self.kept - count
        packed_tokens = token_count(self.packed)
        if self.packed is not None and left < packed_tokens:
            keys, values = self.packed
            start = left // BLOCK * BLOCK
            rest = copy_rows(keys, start, left), copy_rows(values, start, left)
            self.tail = KeysValues(unpack(rest[0], keys.dtype), unpack(rest[1], values.dtype))
            self.packed = copy_rows(keys, 0, start), copy_rows(values, 0, start)
        elif self.tail is not None:
            self.tail = self.tail.copy_tokens(0, left - packed_tokens)


def token_count(bucket: Bucket | None) -> int:
    """Return how many tokens a bucket has.

    Parameters
    ----------
    bucket
        Keys and values, or None.

    Returns
    -------
    int
        Number of tokens, 0 for None.
    """
    return 0 if bucket is None else bucket[0].shape[-2]


def concat_buckets(first: Bucket, second: Bucket) -> Bucket:
    """Concatenate two buckets of the same precision and tiling.

    Parameters
    ----------
    first
        T1 tokens, a multiple of the tokens per tile.
    second
        T2 tokens.

    Returns
    -------
    Bucket
        T1 + T2 tokens.
    """
    return concat_tokens(first[0], second[0]), concat_tokens(first[1], second[1])


def concat_tokens(first: QuantizedArray, second: QuantizedArray) -> QuantizedArray:
    """Concatenate packed tokens of the same precision and tiling.

    Parameters
    ----------
    first
        `[..., T1, D]`; T1 is a multiple of the tokens per tile.
    second
        `[..., T2, D]`.

    Returns
    -------
    QuantizedArray
        `[..., T1 + T2, D]`.
    """
    words, bias, scale = (
        mx.concatenate([getattr(first, name), getattr(second, name)], axis=-2) for name in ("words", "bias", "scale")
    )
    return dataclasses.replace(first, words=words, bias=bias, scale=scale)


def copy_rows(packed: QuantizedArray, start: int, stop: int) -> QuantizedArray:
    """Copy a range of packed tokens.

    Parameters
    ----------
    packed
        `[..., T, D]`.
    start
        The first token, at the start of a tile.
    stop
        The token after the last one.

    Returns
    -------
    QuantizedArray
        `[..., stop - start, D]`, which owns its memory.
    """
    rows = slice_rows(packed, start, stop)
    return dataclasses.replace(
        rows,
        words=copy_without_parent(rows.words),
        bias=copy_without_parent(rows.bias),
        scale=copy_without_parent(rows.scale),
    )


def gather_rows(packed: QuantizedArray, indices: mx.array) -> QuantizedArray:
    """Gather tokens that were packed token by token, with different indices for each head.

    Parameters
    ----------
    packed
        `[B, H, T, D]` in tiles of one token.
    indices
        `[B, H, n]`.

    Returns
    -------
    QuantizedArray
        `[B, H, n, D]`.
    """
    words, bias, scale = (
        mx.take_along_axis(x, indices[..., None], axis=2) for x in (packed.words, packed.bias, packed.scale)
    )
    return dataclasses.replace(packed, words=words, bias=bias, scale=scale)


def quantize_per_token(x: mx.array, bits: int) -> QuantizedArray:
    """Quantize each token by itself, in groups of 64 dims, or all dims in one group where 64 does not divide D.

    Parameters
    ----------
    x
        `[..., T, D]`.
    bits
        Bits per value: 2, 3, 4 or 8; 16 leaves values unchanged.

    Returns
    -------
    QuantizedArray
        `[..., T, D]`, with one minimum and one step per group (`mlxkv.kernels.bits.bias_and_scale`).
    """
    dim = x.shape[-1]
    return pack(x, bits, 1, 64 if dim % 64 == 0 else dim)

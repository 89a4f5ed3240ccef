"""Base class of methods that quantize old tokens and keep the first and the newest tokens unquantized."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import Any, ClassVar

import mlx.core as mx

from mlxkv.config import Config
from mlxkv.errors import FormatError
from mlxkv.kernels.bits import QuantizedArray, pack, slice_rows, unpack
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.live.arrays import copy_without_parent
from mlxkv.live.base import KeysValues, append_chunk
from mlxkv.live.checks import check_kept, check_like
from mlxkv.live.windowing import WindowedCache
from mlxkv.spec import CacheSpec

BLOCK = 64  # tokens packed at a time: few, so that the tail stays small, but enough that `packed` is rarely copied


class PackingCache(WindowedCache):
    """Base class of methods that quantize old tokens and keep the first ones, sinks, and the newest unquantized.

    All tokens come into a tail and leave it in blocks as soon as `recent` tokens remain. So the tail has fewer than
    `recent + block` tokens, and the stored values do not depend on how the text
    was split into chunks. The sinks leave the tail with the first block, and stay unquantized. If `trim` removes part of a
    block, the rest of the block returns to the tail with its quantized values. A method implements `pack`.

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
        The newest tokens; also the sinks, while no token is quantized.
    first
        The sinks, once tokens are quantized; None where there are none.
    sinks
        Number of first tokens that stay unquantized.
    recent
        Minimal number of tokens that stay in the tail.
    block
        Number of tokens that are packed at a time.
    """

    state_fields = ("packed", "tail", "first")
    state_types: ClassVar = {"tail": KeysValues, "first": KeysValues}
    takes_tokens_back = True
    recent = 0
    block = BLOCK

    def __init__(self, config: Config, spec: CacheSpec, layer: int) -> None:
        super().__init__(config, spec, layer)
        self.packed: Bucket | None = None
        self.tail: KeysValues | None = None
        self.first: KeysValues | None = None

    @abstractmethod
    def pack(self, keys: mx.array, values: mx.array) -> Bucket:
        """Quantize whole blocks of tokens.

        Parameters
        ----------
        keys, values
            `[B, Hkv, n * block, D]` and `[B, Hkv, n * block, Dv]`.

        Returns
        -------
        Bucket
            Quantized keys and values. The number of tokens per tile divides `block`.
        """

    def buckets(self) -> list[Bucket]:
        """Return the sinks, the packed tokens, then the tail."""
        first, tail = ([] if part is None else [part.as_bucket()] for part in (self.first, self.tail))
        return [*first, *([] if self.packed is None else [self.packed]), *tail]

    def check_state(self) -> None:
        """Check how the packed tokens are packed, then what every method has; no token may be missing."""
        if self.packed is not None:
            block = (mx.zeros((1, slot.heads, self.block, slot.dim)) for slot in self.slots)
            check_like(self.packed, "packed", self.pack(*block))
            count = token_count(self.packed)
            if count % self.block:
                raise FormatError(f"{count} tokens are packed, which are no blocks of {self.block}")
        super().check_state()
        dropped = self._dropped()
        sinks = self.sinks if self.packed is not None and not dropped else 0
        if sinks != (self.first.tokens if self.first is not None else 0):
            raise FormatError(f"first should have {sinks} tokens")
        expected = self.leaving(self.offset)
        # Where the model fetches, tokens are dropped only when the next ones come.
        waiting = self._fetching and self.window and dropped == self.leaving(dropped + self.window - 1) < expected
        if not waiting:
            check_kept(self, self.offset - expected)

    def absorb(self, keys: mx.array, values: mx.array, mass: mx.array | None) -> None:
        """Append the chunk to the tail, drop the blocks that left the window, and pack those that are old enough."""
        self.tail = append_chunk(self.tail, keys, values)
        if self.window is not None and not self._fetching:
            self._drop_outside(self._offset)
        tail = self.tail
        # The sinks wait in the tail for the first block.
        start = self.sinks if self.packed is None and not self._dropped() else 0
        stop = start + self._in_blocks(tail.tokens - start - self.recent)
        if stop > start:
            block = self.pack(tail.keys[..., start:stop, :], tail.values[..., start:stop, :])
            if start:
                self.first = tail.copy_tokens(0, start)
            self.packed = block if self.packed is None else concat_buckets(self.packed, block)
            self.tail = tail.copy_tokens(stop)

    @property
    def kept(self) -> int:
        """Number of tokens stored."""
        return _count(self.packed, self.tail, self.first)

    def drop_oldest(self, count: int) -> None:
        """Drop the sinks and the first blocks, packed or still in the tail."""
        if self.first is not None:
            count -= self.first.tokens
            self.first = None
        packed = min(count, token_count(self.packed))
        if self.packed is not None and packed:
            keys, values = (copy_rows(part, packed, part.shape[-2]) for part in self.packed)
            self.packed = (keys, values) if keys.shape[-2] else None
        if self.tail is not None and count > packed:
            self.tail = self.tail.copy_tokens(count - packed)

    def _only_appended_to(self, state: dict[str, Any]) -> bool:
        """Return whether no block was packed since, and none dropped."""
        stays = token_count(state["packed"]) == token_count(self.packed)
        return stays and (self.window is None or _count(**state) + len(self._checkpoints) == self.kept)

    def _trim(self, count: int) -> None:
        """Drop tokens from the tail, then whole blocks; unpack what remains of a trimmed block."""
        sinks = 0 if self.first is None else self.first.tokens
        left = self.kept - count - sinks
        packed_tokens = token_count(self.packed)
        if self.packed is not None and left < packed_tokens:
            keys, values = self.packed
            start = self._in_blocks(left)
            rest = (copy_rows(part, start, max(start, left)) for part in self.packed)
            self.tail = KeysValues(*(unpack(part, part.dtype) for part in rest))
            self.packed = (copy_rows(keys, 0, start), copy_rows(values, 0, start)) if start else None
            if self.first is not None and self.packed is None:
                self.tail, self.first = self.first.copy_tokens(0, min(sinks, sinks + left)).append(self.tail), None
        elif self.tail is not None:
            self.tail = self.tail.copy_tokens(0, left - packed_tokens)


def _count(packed: Bucket | None, tail: KeysValues | None, first: KeysValues | None) -> int:
    """Return how many tokens are in these parts."""
    unpacked = sum(part.tokens for part in (first, tail) if part is not None)
    return token_count(packed) + unpacked


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

"""Base class of methods that quantize old tokens and keep the first and the newest tokens unquantized."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from functools import cache
from typing import ClassVar

import mlx.core as mx

from mlxkv.config import Config
from mlxkv.errors import FormatError
from mlxkv.kernels import metal
from mlxkv.kernels.bits import QuantizedArray, pack, slice_rows, unpack
from mlxkv.kernels.decode_attention import Bucket
from mlxkv.kernels.packed_attention import packed_attention
from mlxkv.live.arrays import copy_without_parent, iter_arrays
from mlxkv.live.attention import AttentionCall, mask_to_bias
from mlxkv.live.base import KeysValues
from mlxkv.live.checks import check_kept, check_like
from mlxkv.live.storage import to_storage_dtype
from mlxkv.live.tail import Tail
from mlxkv.live.windowing import WindowedCache
from mlxkv.spec import CacheSpec

BLOCK = 64  # tokens packed at a time: few, so that the tail stays small, but enough that `packed` is rarely copied


class PackingCache(WindowedCache):
    """Base class of methods that quantize old tokens and keep the first ones, sinks, and the newest unquantized.

    All tokens come into a tail, a buffer that is written in place, and leave it in blocks as soon as `recent` tokens remain.
    So the tail has fewer than `recent + block` tokens, and the stored values do not depend on how the text was split into
    chunks. `nbytes` counts up to 15 rows of the tail that are allocated in advance. A single token is stored before its query
    attends, by one call for all that is stored (`mlxkv.kernels.packed_attention`). The sinks leave the tail with the first block, and stay unquantized. If `trim` removes part of a
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
        self._tail: Tail | None = None
        self.first: KeysValues | None = None
        # Whether a single token sees all that is stored, and is stored as it is.
        self._plain = not (self.latent or self._fetching or self.window is not None)

    @property
    def tail(self) -> KeysValues | None:
        """The newest tokens, and the sinks while no token is quantized."""
        return None if self._tail is None else self._tail.tokens()

    @tail.setter
    def tail(self, tokens: KeysValues | None) -> None:
        self._tail = None if tokens is None else Tail(*tokens)

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

    def _arrays(self) -> list[mx.array]:
        """Return all arrays held: of the tail the whole buffer."""
        tail = self._tail
        return [*iter_arrays([self.packed, self.first]), *(() if tail is None else (tail.keys, tail.values))]

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Return the attention over the stored tokens and the chunk; a single token is stored before it."""
        token = self._pending_chunk
        if not self._plain or mask is not None or token is None or queries.shape[2] != 1 or self._tail is None:
            return super().attend(queries, keys, values, scale, mask, sinks)
        self._checkpoints = []
        output = self._attend_stored(queries, token, scale, None, sinks)
        if self._tail.rows >= self.recent + self.block and self._pack_old():
            # Generation evaluates only outputs, and no output depends on these arrays yet.
            output = mx.depends(output, self._arrays())
        self._end()
        return output

    def _attend_chunk(self, call: AttentionCall, chunk: KeysValues) -> mx.array:
        """Store a token, then attend to all that is stored; longer chunks are attended to first, as they came."""
        if chunk.tokens > 1 or self.latent or self._tail is None:
            return super()._attend_chunk(call, chunk)
        if self.window is not None:
            call = self._within_window(call)
        bias = mask_to_bias(call.mask, call.queries, self.kept + 1)
        output = self._attend_stored(call.queries, chunk, call.scale, bias, call.sinks)
        self._settle()
        return output

    def _attend_stored(
        self, queries: mx.array, token: KeysValues, scale: float, bias: mx.array | None, logits: mx.array | None
    ) -> mx.array:
        """Append a token to the tail, and attend to all that is stored."""
        tail = self._tail
        assert tail is not None
        keys, values = token
        if keys.dtype == mx.float32:
            dtype = tail.keys.dtype
            keys, values = to_storage_dtype(keys, dtype), to_storage_dtype(values, dtype)
        tail.append(keys, values)
        if not metal.available():
            return packed_attention(queries, self.first, self.packed, tail.tokens(), scale, None, bias, logits)
        # The kernel reads the buffer where it is: a view of some rows would be copied.
        whole, unused = KeysValues(tail.keys, tail.values), tail.allocated - tail.rows
        lengths = row_counts(queries.shape[0], tail.rows) if unused else None
        if bias is not None and unused:
            bias = mx.pad(bias, [(0, 0), (0, 0), (0, unused)])
        return packed_attention(queries, self.first, self.packed, whole, scale, lengths, bias, logits)

    def absorb(self, keys: mx.array, values: mx.array, mass: mx.array | None) -> None:
        """Append the chunk to the tail, drop the blocks that left the window, and pack those that are old enough."""
        if self._tail is None:
            self._tail = Tail.copy_of(KeysValues(keys, values))
        else:
            self._tail.append(keys, values)
        self._settle()

    def _settle(self) -> None:
        """Drop the blocks that left the window, and pack those that are old enough."""
        if self.window is not None and not self._fetching:
            self._drop_outside(self._offset)
        self._pack_old()

    def _pack_old(self) -> bool:
        """Pack the blocks that are old enough, and return whether there were any."""
        tail = self._tail
        assert tail is not None
        # The sinks wait in the tail for the first block.
        start = self.sinks if self.packed is None and not self._dropped() else 0
        stop = start + self._in_blocks(tail.rows - start - self.recent)
        if stop <= start:
            return False
        tokens = tail.tokens()
        block = self.pack(*tokens.slice_tokens(start, stop))
        if start:
            self.first = tokens.copy_tokens(0, start)
        self.packed = block if self.packed is None else concat_buckets(self.packed, block)
        self._tail = Tail.copy_of(tokens.slice_tokens(stop, tail.rows))
        return True

    @property
    def kept(self) -> int:
        """Number of tokens stored."""
        first, tail = self.first, self._tail
        unpacked = (0 if first is None else first.tokens) + (0 if tail is None else tail.rows)
        return token_count(self.packed) + unpacked

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
            self._tail = Tail.copy_of(KeysValues(*(part[..., count - packed :, :] for part in self.tail)))

    def _only_appends(self, count: int) -> bool:
        """Return whether no block will be packed, and none dropped."""
        if self._tail is None or self._tail.rows + count >= self.recent + self.block:
            return False
        return self.window is None or not self.leaving(self._offset, self._offset - count - self.kept)

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
        elif self._tail is not None:
            self._tail.rows = left - packed_tokens


@cache
def row_counts(batch: int, rows: int) -> mx.array:
    """Return how many rows of a buffer are used, once for each number.

    Parameters
    ----------
    batch
        Number of texts.
    rows
        Number of rows that each has.

    Returns
    -------
    mx.array
        int32 `[B]`, there at once: any thread can use it.
    """
    return mx.array([rows] * batch, mx.int32)


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

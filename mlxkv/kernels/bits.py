"""Rows of 2, 3, 4 or 8-bit codes with a bias and a scale for each tile of tokens x dims, and rows kept as they are.

A row's codes are one stream of little-endian 32-bit words, lowest bits first, zeros at the end: `mx.quantize`'s layout
where that has one (dims divisible by its groups). Tiles of 1 token x 32 or more dims are the usual per-token groups;
tiles of 32 or more tokens x 1 dim are KIVI's per-channel keys (https://arxiv.org/abs/2402.02750).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlxkv.errors import InputError, MismatchError
from mlxkv.kernels import metal
from mlxkv.kernels.metal import Kernel
from mlxkv.kernels.operations import Example, Operation, register

CODE_BITS = (2, 3, 4, 8)
UNPACKED = 16

_PACK = Kernel("bits_pack", inputs=("x", "shift", "scale"), outputs=("words",))
_UNPACK = Kernel("bits_unpack", inputs=("words", "shift", "scale"), outputs=("x",))


@dataclass(frozen=True, eq=False)
class QuantizedArray:
    """An array `[..., T, D]` as words uint32 `[..., T, ceil(D * bits / 32)]`.

    bias and scale are `[..., ceil(T / tile_tokens), ceil(D / tile_dims)]` of the array's dtype, one for each tile, the last
    tiles perhaps partial: value = scale * code + bias. With bits 16 or 32 the words are the values' own bits and bias
    and scale have no columns, `[..., ceil(T / tile_tokens), 0]`; their dtype still names the type of the values.
    Bits, dims and tiles are compiled into the kernels that read this: a method should keep to few of them.

    Raises InputError for a number of bits, dim or tile that cannot be, MismatchError for parts that do not fit together.
    """

    words: mx.array
    bias: mx.array
    scale: mx.array
    bits: int
    dim: int
    tile_tokens: int
    tile_dims: int

    def __post_init__(self) -> None:
        if min(self.dim, self.tile_tokens, self.tile_dims) < 1:
            raise InputError(f"dim {self.dim} and tiles of {self.tile_tokens} x {self.tile_dims} must be at least 1")
        if self.bits not in CODE_BITS and self.bits != 8 * self.dtype.size:
            raise InputError(f"bits {self.bits} is none of {CODE_BITS} and not the size of {self.dtype}")
        *lead, length, _ = self.words.shape
        words = (*lead, length, -(-self.dim * self.bits // 32))
        tiles = (*lead, -(-length // self.tile_tokens), 0 if self.is_unquantized else -(-self.dim // self.tile_dims))
        for name, part, shape in (
            ("words", self.words, words),
            ("bias", self.bias, tiles),
            ("scale", self.scale, tiles),
        ):
            if part.shape != shape:
                raise MismatchError(f"{name} of {self.bits}-bit {self.dim}-dim rows are {part.shape}, expected {shape}")
        if self.words.dtype != mx.uint32 or self.scale.dtype != self.dtype or not _is_float(self.dtype):
            raise MismatchError(f"words {self.words.dtype}, bias {self.dtype} and scale {self.scale.dtype}: expected "
                                "uint32 and twice the same float type")  # fmt: skip

    @property
    def is_unquantized(self) -> bool:
        """Whether the words are the values themselves."""
        return self.bits >= UNPACKED

    @property
    def dtype(self) -> mx.Dtype:
        """Of the array that was packed."""
        return self.bias.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array that was packed, `[..., T, D]`."""
        return (*self.words.shape[:-1], self.dim)

    @property
    def nbytes(self) -> int:
        """Bytes of words, biases and scales."""
        return self.words.nbytes + self.bias.nbytes + self.scale.nbytes


def scales(x: mx.array, bits: int, tile_tokens: int, tile_dims: int) -> tuple[mx.array, mx.array]:
    """x `[..., T, D]` to bias and scale, each `[..., ceil(T / tile_tokens), ceil(D / tile_dims)]` of x's dtype.

    Every tile goes affinely from its minimum to its maximum. A constant tile has scale 0. A tile that holds NaN or an
    infinity, or spreads beyond float32, has scale NaN and so decodes as NaN: damage stays visible.
    """
    tiles = _tiled(x.astype(mx.float32), tile_tokens, tile_dims)  # float16 minima take ten times as long on a CPU
    low, high = tiles.min(axis=(-3, -1)), tiles.max(axis=(-3, -1))
    scale = (high - low) / (2**bits - 1)
    return low.astype(x.dtype), mx.where(mx.isfinite(scale), scale, mx.nan).astype(x.dtype)


def pack(x: mx.array, bits: int, tile_tokens: int, tile_dims: int) -> QuantizedArray:
    """x `[..., T, D]` (float32, float16 or bfloat16) to codes of 2, 3, 4 or 8 bits, tiles of tile_tokens x tile_dims.

    With bits 16 the values stay as they are (for float32 the result then says bits 32). Raises InputError for other
    bits, tiles or types.
    """
    return (metal_pack if metal.available() else reference_pack)(x, bits, tile_tokens, tile_dims)


def reference_pack(x: mx.array, bits: int, tile_tokens: int, tile_dims: int) -> QuantizedArray:
    _check(x, bits, tile_tokens, tile_dims)
    if bits == UNPACKED:
        return _pack_unquantized(x, tile_tokens, tile_dims)
    bias, scale = scales(x, bits, tile_tokens, tile_dims)
    step = mx.where(scale == 0, 1, scale).astype(mx.float32)[..., :, None, :, None]
    steps = (
        _tiled(x.astype(mx.float32), tile_tokens, tile_dims) - bias.astype(mx.float32)[..., :, None, :, None]
    ) / step
    rounded = mx.where(steps > 0, mx.minimum(mx.round(steps), 2**bits - 1), 0)  # NaN becomes 0
    return QuantizedArray(
        _to_words(_untiled(rounded, x.shape), bits), bias, scale, bits, x.shape[-1], tile_tokens, tile_dims
    )


def metal_pack(x: mx.array, bits: int, tile_tokens: int, tile_dims: int) -> QuantizedArray:
    _check(x, bits, tile_tokens, tile_dims)
    if bits == UNPACKED:
        return _pack_unquantized(x, tile_tokens, tile_dims)
    bias, scale = scales(x, bits, tile_tokens, tile_dims)
    shape = (*x.shape[:-1], -(-x.shape[-1] * bits // 32))
    template = [("BITS", bits), ("TOKENS", tile_tokens), ("DIMS", tile_dims)]
    words = _call(_PACK, (x, bias, scale), template, shape, mx.uint32)
    return QuantizedArray(words, bias, scale, bits, x.shape[-1], tile_tokens, tile_dims)


def unpack(packed: QuantizedArray, dtype: mx.Dtype) -> mx.array:
    """The inverse up to rounding, `[..., T, D]` of this float dtype; the arithmetic is float32."""
    return (metal_unpack if metal.available() else reference_unpack)(packed, dtype)


def reference_unpack(packed: QuantizedArray, dtype: mx.Dtype) -> mx.array:
    if packed.is_unquantized:
        return _unquantized_values(packed).astype(dtype)
    bias, scale = (part.astype(mx.float32)[..., :, None, :, None] for part in (packed.bias, packed.scale))
    return _untiled(scale * _tiled(codes(packed), packed.tile_tokens, packed.tile_dims) + bias, packed.shape).astype(
        dtype
    )


def codes(packed: QuantizedArray) -> mx.array:
    """The codes of what is packed, float32 `[..., T, D]`."""
    return _from_words(packed.words, packed.bits, packed.dim).astype(mx.float32)


def metal_unpack(packed: QuantizedArray, dtype: mx.Dtype) -> mx.array:
    if packed.is_unquantized:
        return _unquantized_values(packed).astype(dtype)
    template = [("T", dtype), ("BITS", packed.bits), ("TOKENS", packed.tile_tokens), ("DIMS", packed.tile_dims)]
    return _call(_UNPACK, (packed.words, packed.bias, packed.scale), template, packed.shape, dtype)


def _call(
    kernel: Kernel,
    arrays: tuple[mx.array, mx.array, mx.array],
    template: Sequence[tuple[str, object]],
    shape: tuple[int, ...],
    dtype: mx.Dtype,
) -> mx.array:
    """One thread for each element of an output of this shape, `[..., T, columns]`. Without elements, no kernel."""
    if 0 in shape:
        return mx.zeros(shape, dtype)
    flat = (math.prod(shape[:-2]), *shape[-2:])
    (output,) = kernel(
        inputs=[array.reshape(flat[0], *array.shape[-2:]) for array in arrays],
        template=list(template),
        grid=flat[::-1],
        threadgroup=(32, 8, 1),
        output_shapes=[flat],
        output_dtypes=[dtype],
    )
    return output.reshape(shape)


def _check(x: mx.array, bits: int, tile_tokens: int, tile_dims: int) -> None:
    if not _is_float(x.dtype):
        raise InputError(f"cannot pack {x.dtype}, only float32, float16 and bfloat16")
    if bits not in (*CODE_BITS, UNPACKED) or min(tile_tokens, tile_dims) < 1:
        raise InputError(
            f"bits {bits} must be one of {(*CODE_BITS, UNPACKED)}, tiles {tile_tokens} x {tile_dims} at least 1 x 1"
        )


def _is_float(dtype: mx.Dtype) -> bool:
    return dtype in (mx.float32, mx.float16, mx.bfloat16)


def _pack_unquantized(x: mx.array, tile_tokens: int, tile_dims: int) -> QuantizedArray:
    bits, dim = 8 * x.dtype.size, x.shape[-1]
    words = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -dim * bits % 32 // bits)]).view(mx.uint32)
    none = mx.zeros((*x.shape[:-2], -(-x.shape[-2] // tile_tokens), 0), x.dtype)
    return QuantizedArray(words, none, none, bits, dim, tile_tokens, tile_dims)


def _unquantized_values(packed: QuantizedArray) -> mx.array:
    return packed.words.view(packed.dtype)[..., : packed.dim]


def _tiled(x: mx.array, tile_tokens: int, tile_dims: int) -> mx.array:
    """`[..., T, D]` to `[..., tiles, tile_tokens, tiles, tile_dims]`, the last row and column repeated to fill the last tiles."""
    *lead, length, dim = x.shape
    more = (-length % tile_tokens, -dim % tile_dims)
    if any(more):
        x = mx.pad(x, [(0, 0)] * len(lead) + [(0, n) for n in more], mode="edge")
    return x.reshape(*lead, (length + more[0]) // tile_tokens, tile_tokens, (dim + more[1]) // tile_dims, tile_dims)


def _untiled(tiles: mx.array, shape: tuple[int, ...]) -> mx.array:
    """The inverse of `_tiled`."""
    *lead, rows, tile_tokens, columns, tile_dims = tiles.shape
    return tiles.reshape(*lead, rows * tile_tokens, columns * tile_dims)[..., : shape[-2], : shape[-1]]


def _to_words(codes: mx.array, bits: int) -> mx.array:
    """Codes `[..., D]` to words uint32. Eight codes fill `bits` bytes, so a uint64 holds any eight."""
    *lead, dim = codes.shape
    eights = -(-dim // 32) * 4
    padded = mx.pad(codes.astype(mx.uint64), [(0, 0)] * len(lead) + [(0, eights * 8 - dim)])
    joined = (padded.reshape(*lead, eights, 8) << _places(bits)).sum(axis=-1, keepdims=True)
    words = joined.view(mx.uint8)[..., :bits].reshape(*lead, eights * bits).view(mx.uint32)
    return words[..., : -(-dim * bits // 32)]


def _from_words(words: mx.array, bits: int, dim: int) -> mx.array:
    """The inverse, uint8 `[..., dim]`: codes that lie together are moved apart by halves, until each has a byte."""
    *lead, count = words.shape
    data = words.view(mx.uint8)
    if 8 % bits == 0:
        together, total = 8 // bits, count * 32 // bits
        wide = data.astype({1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[together])
    else:
        together, total = 8, -(-dim // 8) * 8
        size = total // 8 * bits
        data = mx.pad(data, [(0, 0)] * len(lead) + [(0, max(0, size - 4 * count))])[..., :size]
        eights = data.reshape(*lead, total // 8, bits)
        wide = mx.pad(eights, [(0, 0)] * (len(lead) + 1) + [(0, 8 - bits)]).view(mx.uint64)
    half = together // 2
    while half:
        mask = sum((2 ** (half * bits) - 1) << place for place in range(0, 8 * together, 8 * half))
        wide = (wide | (wide << (half * (8 - bits)))) & mask
        half //= 2
    return wide.view(mx.uint8).reshape(*lead, total)[..., :dim]


def _places(bits: int) -> mx.array:
    return mx.arange(0, 8 * bits, bits, dtype=mx.uint64)


def _example(width: int, tokens: int, dims: int) -> Callable[[int], tuple]:
    """Arguments of `pack` for 16 layers x 8 heads x 128 dims."""
    return lambda n: (mx.random.normal((128, n, 128), key=mx.random.key(0)).astype(mx.bfloat16), width, tokens, dims)


def _example_packed(width: int, tokens: int, dims: int) -> Callable[[int], tuple]:
    return lambda n: (reference_pack(*_example(width, tokens, dims)(n)), mx.bfloat16)


register(
    Operation(
        "bits.pack",
        pack,
        reference_pack,
        metal_pack,
        (
            Example("128 heads x 128 dims, 4 bits, tiles 1 x 32", _example(4, 1, 32)),
            Example("128 heads x 128 dims, 2 bits, tiles 32 x 1", _example(2, 32, 1)),
        ),
    )
)
register(
    Operation(
        "bits.unpack",
        unpack,
        reference_unpack,
        metal_unpack,
        (
            Example("128 heads x 128 dims, 4 bits, tiles 1 x 32", _example_packed(4, 1, 32)),
            Example("128 heads x 128 dims, 2 bits, tiles 32 x 1", _example_packed(2, 32, 1)),
        ),
    )
)

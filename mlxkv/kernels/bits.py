"""Arrays of 2, 3, 4 or 8-bit codes with a bias and a scale for each tile of tokens x dims, or of unquantized values.

A row's codes are a sequence of little-endian 32-bit words, lowest bits first, zeros at the end: `mx.quantize`'s layout
where that has one (dims divisible by its groups). Tiles of 1 token x 32 or more dims are the usual per-token groups;
tiles of 32 or more tokens x 1 dim are KIVI's per-channel keys (https://arxiv.org/abs/2402.02750).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import mlx.core as mx

from mlxkv.errors import InputError, MismatchError
from mlxkv.kernels import metal
from mlxkv.kernels._layout import codes_to_words, from_tiles, to_tiles, words_to_codes
from mlxkv.kernels._rotation import rotate, rotate_back
from mlxkv.kernels.metal import Kernel
from mlxkv.kernels.operations import Example, Operation, register

CODE_BITS = (2, 3, 4, 8)
UNQUANTIZED = 16

# The Metal bodies name parts of a QuantizedArray differently: `shift` is bias, TOKENS and DIMS are tile_tokens and
# tile_dims. So does decode_attention.metal, where `bias` is added to scores.
_PACK = Kernel("bits_pack", inputs=("x", "shift", "scale"), outputs=("words",))
_UNPACK = Kernel("bits_unpack", inputs=("words", "shift", "scale"), outputs=("x",))


@dataclass(frozen=True, eq=False)
class QuantizedArray:
    """An array `[..., T, D]` as packed codes, with a bias and a scale for each tile of tokens x dims.

    A value is `scale * code + bias`. With 16 or 32 bits the words are the values' own bits, and bias and scale have no
    columns, `[..., ceil(T / tile_tokens), 0]`; their dtype still names the type of the values.

    Parameters
    ----------
    words
        uint32 `[..., T, ceil(D * bits / 32)]`.
    bias
        `[..., ceil(T / tile_tokens), ceil(D / tile_dims)]` of the array's float type; the last tiles may be partial.
    scale
        Like `bias`.
    bits
        Bits of a code, one of `CODE_BITS`, or the bits of the float type.
    dim
        D, at least 1.
    tile_tokens
        Tokens of a tile, at least 1.
    tile_dims
        Dims of a tile, at least 1.
    rotated
        Whether the codes are of rotated rows: `unpack` and attention rotate back.

    Raises
    ------
    InputError
        For a number of bits, dim or tile that cannot be.
    MismatchError
        For parts whose shapes or types do not fit together.

    Notes
    -----
    Bits, dim and tiles are compiled into the kernels that read the array: a method should keep to few of them.

    Examples
    --------
    >>> x = mx.random.normal((2, 8, 64))
    >>> quantized = pack(x, bits=4, tile_tokens=1, tile_dims=32)
    >>> quantized.shape, quantized.words.shape, quantized.scale.shape
    ((2, 8, 64), (2, 8, 8), (2, 8, 2))
    >>> x.nbytes, quantized.nbytes
    (4096, 768)
    """

    words: mx.array
    bias: mx.array
    scale: mx.array
    bits: int
    dim: int
    tile_tokens: int
    tile_dims: int
    rotated: bool = False

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
        """True where the words are the values themselves."""
        return self.bits >= UNQUANTIZED

    @property
    def dtype(self) -> mx.Dtype:
        """Float type of the array before quantization."""
        return self.bias.dtype

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array before quantization, `[..., T, D]`."""
        return (*self.words.shape[:-1], self.dim)

    @cached_property
    def kind(self) -> tuple[Hashable, ...]:
        """All that the launch of a kernel depends on: shape, bits, tiles, whether rotated, type."""
        return self.shape, self.bits, self.tile_tokens, self.tile_dims, self.rotated, self.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of words, biases and scales."""
        return self.words.nbytes + self.bias.nbytes + self.scale.nbytes


def bias_and_scale(x: mx.array, bits: int, tile_tokens: int, tile_dims: int) -> tuple[mx.array, mx.array]:
    """Return the affine map of each tile, from its minimum to its maximum.

    Parameters
    ----------
    x
        `[..., T, D]`, float32, float16 or bfloat16.
    bits
        Bits of a code.
    tile_tokens
        Tokens of a tile, at least 1.
    tile_dims
        Dims of a tile, at least 1.

    Returns
    -------
    tuple[mx.array, mx.array]
        Bias and scale, each `[..., ceil(T / tile_tokens), ceil(D / tile_dims)]` of x's type. Only a constant tile has
        scale 0. A tile that holds NaN or an infinity, or spreads beyond float32, has scale NaN and so decodes as NaN: damage
        stays visible.
    """
    tiles = to_tiles(x.astype(mx.float32), tile_tokens, tile_dims)  # float16 minima take ten times as long on a CPU
    low, high = tiles.min(axis=(-3, -1)), tiles.max(axis=(-3, -1))
    scale = (high - low) / (2**bits - 1)
    if x.dtype == mx.float16:
        # Subnormal numbers are far apart: rounded up, no step vanishes and no value is out of reach.
        scale = mx.where(scale < 2.0**-14, mx.ceil(scale * 2.0**24) * 2.0**-24, scale)
    return low.astype(x.dtype), mx.where(mx.isfinite(scale), scale, mx.nan).astype(x.dtype)


def pack(x: mx.array, bits: int, tile_tokens: int, tile_dims: int, rotated: bool = False) -> QuantizedArray:
    """Quantize an array, with a bias and a scale for each tile of tile_tokens x tile_dims.

    Parameters
    ----------
    x
        `[..., T, D]`, float32, float16 or bfloat16.
    bits
        Bits of a code: 2, 3, 4 or 8; 16 leaves values unquantized, of whichever type (float32 then has 32 bits).
    tile_tokens
        Tokens of a tile, at least 1.
    tile_dims
        Dims of a tile, at least 1.
    rotated
        Whether to rotate rows first, which makes all their dims alike: outliers and constant means of single dims then
        widen no tile. Unquantized values are left as they are.

    Returns
    -------
    QuantizedArray
        Of the same shape.

    Raises
    ------
    InputError
        For other bits, tiles or types.

    Examples
    --------
    >>> quantized = pack(mx.array([[0.0, 1.0, 2.0, 3.0]]), bits=2, tile_tokens=1, tile_dims=4)
    >>> f"{quantized.words.item():b}"
    '11100100'
    """
    return (metal_pack if metal.available() else reference_pack)(x, bits, tile_tokens, tile_dims, rotated)


def reference_pack(x: mx.array, bits: int, tile_tokens: int, tile_dims: int, rotated: bool = False) -> QuantizedArray:
    """Quantize by the array operations that define `pack`.

    Parameters
    ----------
    x, bits, tile_tokens, tile_dims, rotated
        See `pack`.

    Returns
    -------
    QuantizedArray
        See `pack`.
    """
    _check(x, bits, tile_tokens, tile_dims)
    if bits == UNQUANTIZED:
        return _pack_unquantized(x, tile_tokens, tile_dims)
    dtype, x = x.dtype, rotate(x) if rotated else x
    bias, scale = (part.astype(dtype) for part in bias_and_scale(x, bits, tile_tokens, tile_dims))
    step = mx.where(scale == 0, 1, scale).astype(mx.float32)[..., :, None, :, None]
    steps = (
        to_tiles(x.astype(mx.float32), tile_tokens, tile_dims) - bias.astype(mx.float32)[..., :, None, :, None]
    ) / step
    rounded = mx.where(steps > 0, mx.minimum(mx.round(steps), 2**bits - 1), 0)  # NaN becomes 0
    words = codes_to_words(from_tiles(rounded, x.shape), bits)
    return QuantizedArray(words, bias, scale, bits, x.shape[-1], tile_tokens, tile_dims, rotated)


def metal_pack(x: mx.array, bits: int, tile_tokens: int, tile_dims: int, rotated: bool = False) -> QuantizedArray:
    """Quantize by the kernel, one thread for each word.

    Parameters
    ----------
    x, bits, tile_tokens, tile_dims, rotated
        See `pack`.

    Returns
    -------
    QuantizedArray
        See `pack`.
    """
    _check(x, bits, tile_tokens, tile_dims)
    if bits == UNQUANTIZED:
        return _pack_unquantized(x, tile_tokens, tile_dims)
    dtype, x = x.dtype, rotate(x) if rotated else x
    bias, scale = (part.astype(dtype) for part in bias_and_scale(x, bits, tile_tokens, tile_dims))
    shape = (*x.shape[:-1], -(-x.shape[-1] * bits // 32))
    template = [("BITS", bits), ("TOKENS", tile_tokens), ("DIMS", tile_dims)]
    words = _call(_PACK, (x, bias, scale), template, shape, mx.uint32)
    return QuantizedArray(words, bias, scale, bits, x.shape[-1], tile_tokens, tile_dims, rotated)


def unpack(packed: QuantizedArray, dtype: mx.Dtype) -> mx.array:
    """Return the values of a quantized array: the inverse of `pack` up to rounding.

    Parameters
    ----------
    packed
        An array `[..., T, D]`.
    dtype
        Float type of the result; the arithmetic is float32.

    Returns
    -------
    mx.array
        `[..., T, D]` of type dtype.

    Examples
    --------
    >>> quantized = pack(mx.array([[0.0, 1.9, 4.2, 6.0]]), bits=2, tile_tokens=1, tile_dims=4)
    >>> unpack(quantized, mx.float32).tolist()
    [[0.0, 2.0, 4.0, 6.0]]
    """
    return (metal_unpack if metal.available() else reference_unpack)(packed, dtype)


def reference_unpack(packed: QuantizedArray, dtype: mx.Dtype) -> mx.array:
    """Return the values by the array operations that define `unpack`.

    Parameters
    ----------
    packed, dtype
        See `unpack`.

    Returns
    -------
    mx.array
        See `unpack`.
    """
    if packed.is_unquantized:
        return unquantized_values(packed).astype(dtype)
    bias, scale = (part.astype(mx.float32)[..., :, None, :, None] for part in (packed.bias, packed.scale))
    tiles = scale * to_tiles(unpack_codes(packed), packed.tile_tokens, packed.tile_dims) + bias
    x = from_tiles(tiles, packed.shape)
    return (rotate_back(x) if packed.rotated else x).astype(dtype)


def unpack_codes(packed: QuantizedArray) -> mx.array:
    """Return the codes of a quantized array, without bias and scale.

    Parameters
    ----------
    packed
        An array `[..., T, D]` that is not unquantized.

    Returns
    -------
    mx.array
        float32 `[..., T, D]`, whole numbers; of rotated rows where `packed.rotated`.
    """
    return words_to_codes(packed.words, packed.bits, packed.dim).astype(mx.float32)


def code_planes(packed: QuantizedArray) -> list[mx.array]:
    """Return the codes of a quantized array apart: those in the same place of their bytes together.

    Parameters
    ----------
    packed
        An array `[..., T, D]` that is not unquantized.

    Returns
    -------
    list of mx.array
        n arrays float32 `[..., T, D / n]` of whole numbers, the j-th of dims j, j + n, j + 2 n. One of all dims where codes
        do not divide a byte, or rows not into words.
    """
    if packed.bits == 8 and packed.dim % 4 == 0:
        return [packed.words.view(mx.uint8).astype(mx.float32)]
    if packed.bits in (3, 8) or packed.dim * packed.bits % 32:
        return [unpack_codes(packed)]
    words, (mask, shifts) = packed.words, _places(packed.bits)
    parts = [words, *[words >> shift for shift in shifts]]
    return [(part & mask).view(mx.uint8).astype(mx.float32) for part in parts]


@cache
def _places(bits: int) -> tuple[mx.array, list[mx.array]]:
    """Return the mask of the lowest code of each byte of a word, and how far to shift words for the others."""
    shifts = [mx.array(place, mx.uint32) for place in range(bits, 8, bits)]
    return mx.array((2**bits - 1) * 0x01010101, mx.uint32), shifts


def slice_rows(packed: QuantizedArray, start: int, stop: int) -> QuantizedArray:
    """Return some rows of a quantized array, as views of its parts.

    Parameters
    ----------
    packed
        `[..., T, D]`.
    start
        The first row, at the beginning of a tile.
    stop
        The row after the last; T or more means all the rest.

    Returns
    -------
    QuantizedArray
        `[..., stop - start, D]`.
    """
    if start == 0 and stop >= packed.shape[-2]:
        return packed
    tiles = slice(start // packed.tile_tokens, -(-stop // packed.tile_tokens))
    words, bias, scale = packed.words[..., start:stop, :], packed.bias[..., tiles, :], packed.scale[..., tiles, :]
    return dataclasses.replace(packed, words=words, bias=bias, scale=scale)


def metal_unpack(packed: QuantizedArray, dtype: mx.Dtype) -> mx.array:
    """Return the values by the kernel, one thread for each value.

    Parameters
    ----------
    packed, dtype
        See `unpack`.

    Returns
    -------
    mx.array
        See `unpack`.
    """
    if packed.is_unquantized:
        return unquantized_values(packed).astype(dtype)
    if packed.rotated:
        return rotate_back(metal_unpack(dataclasses.replace(packed, rotated=False), mx.float32)).astype(dtype)
    template = [("T", dtype), ("BITS", packed.bits), ("TOKENS", packed.tile_tokens), ("DIMS", packed.tile_dims)]
    return _call(_UNPACK, (packed.words, packed.bias, packed.scale), template, packed.shape, dtype)


def _call(
    kernel: Kernel,
    arrays: tuple[mx.array, mx.array, mx.array],
    template: Sequence[tuple[str, object]],
    shape: tuple[int, ...],
    dtype: mx.Dtype,
) -> mx.array:
    """Launch a thread for each element of an output of this shape, `[..., T, columns]`; none without elements."""
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
    if bits not in (*CODE_BITS, UNQUANTIZED) or min(tile_tokens, tile_dims) < 1:
        raise InputError(
            f"bits {bits} must be one of {(*CODE_BITS, UNQUANTIZED)}, tiles {tile_tokens} x {tile_dims} at least 1 x 1"
        )


def _is_float(dtype: mx.Dtype) -> bool:
    return dtype in (mx.float32, mx.float16, mx.bfloat16)


def _pack_unquantized(x: mx.array, tile_tokens: int, tile_dims: int) -> QuantizedArray:
    bits, dim = 8 * x.dtype.size, x.shape[-1]
    words = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -dim * bits % 32 // bits)]).view(mx.uint32)
    none = mx.zeros((*x.shape[:-2], -(-x.shape[-2] // tile_tokens), 0), x.dtype)
    return QuantizedArray(words, none, none, bits, dim, tile_tokens, tile_dims)


def unquantized_values(packed: QuantizedArray) -> mx.array:
    """Return the values of an array that is unquantized.

    Parameters
    ----------
    packed
        An array `[..., T, D]` of 16 or 32 bits.

    Returns
    -------
    mx.array
        A view `[..., T, D]` of its own type.
    """
    return packed.words.view(packed.dtype)[..., : packed.dim]


def _example(width: int, tokens: int, dims: int) -> Callable[[int], tuple]:
    """Return a function from tokens to the arguments of `pack` for 16 layers x 8 heads x 128 dims."""
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

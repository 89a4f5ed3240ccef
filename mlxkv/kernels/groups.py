"""Groups of PCA coefficients to one block's payload, and back: round, clip and pack by the bit plan, all runs at once.

Each group of each token has its own float16 shift and scale, fitted in mlxkv/codec/stages/quantize.py. The shift is an offset:
a coefficient is `shift + scale * code`.
int2 and int4 codes are whole steps; fp8 codes are E4M3 (4 exponent bits, 3 mantissa bits, largest 448).

For each run of equal groups the payload holds all shifts, all scales (low bytes first, then high bytes), then the
codes, component by component, so that similar bytes lie together for the lossless stage. docs/format.md specifies it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import mlx.core as mx
import numpy as np

from mlxkv.kernels import metal
from mlxkv.kernels.metal import Kernel
from mlxkv.kernels.operations import Example, Operation, register

BITS = {"none": 0, "int2": 2, "int4": 4, "fp8": 8}  # of a code, by its type
_PACK = Kernel("groups_pack", inputs=("coefficients", "shifts", "scales", "runs", "sizes"), outputs=("payload",))
_UNPACK = Kernel("groups_unpack", inputs=("payload", "runs", "sizes"), outputs=("coefficients",))


@dataclass(frozen=True)
class Run:
    """Equal neighbouring groups, coded in one sweep.

    Parameters
    ----------
    start
        The first component.
    count
        Number of groups, at least 1.
    size
        Components of a group, at least 1.
    kind
        Type of the codes: "int2", "int4" or "fp8".

    Examples
    --------
    >>> run = Run(start=16, count=2, size=8, kind="int4")
    >>> run.stop, run.code_bytes(tokens=3), run.payload_bytes(tokens=3)
    (32, 24, 48)
    """

    start: int
    count: int
    size: int
    kind: str

    @property
    def stop(self) -> int:
        """The component after the last, start + count * size."""
        return self.start + self.count * self.size

    def code_bytes(self, tokens: int) -> int:
        """Return the bytes of the packed codes; zeros fill the last byte.

        Parameters
        ----------
        tokens
            Number of tokens.

        Returns
        -------
        int
            Bytes.
        """
        return -(-self.count * self.size * tokens * BITS[self.kind] // 8)

    def payload_bytes(self, tokens: int) -> int:
        """Return the bytes of the whole run: shifts, scales, codes.

        Parameters
        ----------
        tokens
            Number of tokens.

        Returns
        -------
        int
            Bytes.
        """
        return 4 * self.count * tokens + self.code_bytes(tokens)


def payload_size(runs: Sequence[Run], tokens: int) -> int:
    """Return the bytes of a payload.

    Parameters
    ----------
    runs
        Its runs.
    tokens
        Number of tokens.

    Returns
    -------
    int
        Bytes that `pack` makes.
    """
    return sum(run.payload_bytes(tokens) for run in runs)


def to_codes(x: mx.array, shift: mx.array, scale: mx.array, kind: str) -> mx.array:
    """Round coefficients to codes.

    Parameters
    ----------
    x
        `[count, size, n]` float32: groups, components of a group, tokens.
    shift
        float16 `[count, n]`.
    scale
        float16 `[count, n]`; 0 acts as 1.
    kind
        Type of the codes: "int2", "int4" or "fp8".

    Returns
    -------
    mx.array
        uint8 `[count, size, n]`.
    """
    wide = scale.astype(mx.float32)[:, None]
    steps = (x - shift.astype(mx.float32)[:, None]) / mx.where(wide == 0, 1.0, wide)
    if kind == "fp8":
        return mx.to_fp8(steps)
    return mx.clip(mx.round(steps), 0, 2 ** BITS[kind] - 1).astype(mx.uint8)


def from_codes(codes: mx.array, shift: mx.array, scale: mx.array, kind: str) -> mx.array:
    """Return the coefficients that codes represent.

    Parameters
    ----------
    codes
        uint8 `[count, size, n]`.
    shift
        float16 `[count, n]`.
    scale
        float16 `[count, n]`.
    kind
        Type of the codes: "int2", "int4" or "fp8".

    Returns
    -------
    mx.array
        float32 `[count, size, n]`.
    """
    steps = codes.astype(mx.float32)
    if kind == "fp8":  # the two codes of NaN, which only damage can bring, differ between MLX's devices
        steps = mx.where((codes & 127) == 127, mx.nan, mx.from_fp8(codes, mx.float32))
    return steps * scale.astype(mx.float32)[:, None] + shift.astype(mx.float32)[:, None]


def pack(coefficients: mx.array, shifts: mx.array, scales: mx.array, runs: Sequence[Run]) -> mx.array:
    """Round coefficients and pack them into a payload.

    Parameters
    ----------
    coefficients
        float32 `[r, n]`: components, tokens.
    shifts
        Offsets float16 `[groups, n]`, of the groups of all runs in order.
    scales
        float16 `[groups, n]`; 0 acts as 1.
    runs
        The groups that are coded, by rising components.

    Returns
    -------
    mx.array
        uint8 `[payload_size(runs, n)]`.

    Examples
    --------
    >>> runs = [Run(start=0, count=1, size=2, kind="int4")]
    >>> coefficients = mx.array([[0.0, 1.0, 3.0], [15.0, 7.0, 2.0]])
    >>> shifts, scales = mx.zeros((1, 3), mx.float16), mx.ones((1, 3), mx.float16)
    >>> payload = pack(coefficients, shifts, scales, runs)
    >>> payload.size == payload_size(runs, tokens=3)
    True
    >>> unpack(payload, runs, rank=2, tokens=3).tolist()
    [[0.0, 1.0, 3.0], [15.0, 7.0, 2.0]]
    """
    return (metal_pack if metal.available() else reference_pack)(coefficients, shifts, scales, runs)


def unpack(payload: mx.array, runs: Sequence[Run], rank: int, tokens: int) -> mx.array:
    """Return the coefficients of a payload: the inverse of `pack` up to rounding.

    Parameters
    ----------
    payload
        uint8 `[payload_size(runs, tokens)]`.
    runs
        The groups that are coded.
    rank
        Number r of components.
    tokens
        Number n of tokens.

    Returns
    -------
    mx.array
        float32 `[r, n]`, zero where no run codes them.
    """
    return (metal_unpack if metal.available() else reference_unpack)(payload, runs, rank, tokens)


def reference_pack(coefficients: mx.array, shifts: mx.array, scales: mx.array, runs: Sequence[Run]) -> mx.array:
    """Pack by the array operations that define `pack`, run by run.

    Parameters
    ----------
    coefficients, shifts, scales, runs
        See `pack`.

    Returns
    -------
    mx.array
        See `pack`.
    """
    tokens, group, parts = coefficients.shape[1], 0, [mx.zeros(0, mx.uint8)]
    for run in runs:
        side = slice(group, group + run.count)
        group += run.count
        x = coefficients[run.start : run.stop].reshape(run.count, run.size, tokens)
        codes = to_codes(x, shifts[side], scales[side], run.kind)
        parts += [*_byte_planes(shifts[side]), *_byte_planes(scales[side]), _pack_codes(codes, BITS[run.kind])]
    return mx.concatenate(parts)


def reference_unpack(payload: mx.array, runs: Sequence[Run], rank: int, tokens: int) -> mx.array:
    """Unpack by the array operations that define `unpack`, run by run.

    Parameters
    ----------
    payload, runs, rank, tokens
        See `unpack`.

    Returns
    -------
    mx.array
        See `unpack`.
    """
    parts, done, position = [], 0, 0
    for run in runs:
        side, codes = run.count * tokens, run.code_bytes(tokens)
        ends = np.cumsum([position, side, side, side, side, codes]).tolist()
        planes = [payload[a:b] for a, b in pairwise(ends)]
        position = ends[-1]
        shift, scale = (_join_planes(low, high).reshape(run.count, tokens) for low, high in (planes[:2], planes[2:4]))
        flat = _unpack_codes(planes[4], BITS[run.kind])[: run.count * run.size * tokens]
        values = from_codes(flat.reshape(run.count, run.size, tokens), shift, scale, run.kind)
        parts += [mx.zeros((run.start - done, tokens)), values.reshape(-1, tokens)]
        done = run.stop
    return mx.concatenate([*parts, mx.zeros((rank - done, tokens))])


def metal_pack(coefficients: mx.array, shifts: mx.array, scales: mx.array, runs: Sequence[Run]) -> mx.array:
    """Pack by the kernel, one thread for each byte of the payload.

    Parameters
    ----------
    coefficients, shifts, scales, runs
        See `pack`.

    Returns
    -------
    mx.array
        See `pack`.
    """
    tokens = coefficients.shape[1]
    size = payload_size(runs, tokens)
    if size == 0:
        return mx.zeros(0, mx.uint8)
    table = _table(runs, tokens)
    return _PACK(
        inputs=[coefficients, shifts.view(mx.uint16), scales.view(mx.uint16), table, mx.array([len(runs), tokens])],
        grid=(size, 1, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[(size,)],
        output_dtypes=[mx.uint8],
    )[0]


def metal_unpack(payload: mx.array, runs: Sequence[Run], rank: int, tokens: int) -> mx.array:
    """Unpack by the kernel, one thread for each coefficient.

    Parameters
    ----------
    payload, runs, rank, tokens
        See `unpack`.

    Returns
    -------
    mx.array
        See `unpack`.
    """
    if payload.size == 0 or rank == 0:
        return mx.zeros((rank, tokens))
    return _UNPACK(
        inputs=[payload, _table(runs, tokens), mx.array([len(runs), tokens])],
        grid=(tokens, rank, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[(rank, tokens)],
        output_dtypes=[mx.float32],
    )[0]


def _table(runs: Sequence[Run], tokens: int) -> mx.array:
    """Return int32 `[runs, 6]`, for the kernels: first byte, first group, first component, count, size, bits."""
    return mx.array(list(_rows(runs, tokens)), dtype=mx.int32)


def _rows(runs: Sequence[Run], tokens: int) -> Iterator[tuple[int, ...]]:
    position, group = 0, 0
    for run in runs:
        yield position, group, run.start, run.count, run.size, BITS[run.kind]
        position += run.payload_bytes(tokens)
        group += run.count


def _byte_planes(values: mx.array) -> list[mx.array]:
    """Split float16 values into their low bytes and their high bytes."""
    bits = values.view(mx.uint16).reshape(-1)
    return [(bits & 255).astype(mx.uint8), (bits >> 8).astype(mx.uint8)]


def _join_planes(low: mx.array, high: mx.array) -> mx.array:
    return (low.astype(mx.uint16) | (high.astype(mx.uint16) << 8)).view(mx.float16)


def _pack_codes(codes: mx.array, bits: int) -> mx.array:
    """Pack uint8 codes into bytes, the first code in the lowest bits."""
    flat, lanes = codes.reshape(-1), 8 // bits
    if lanes == 1:
        return flat
    flat = mx.concatenate([flat, mx.zeros(-flat.size % lanes, mx.uint8)]).reshape(-1, lanes)
    return (flat << mx.arange(0, 8, bits, dtype=mx.uint8)).sum(axis=-1).astype(mx.uint8)


def _unpack_codes(data: mx.array, bits: int) -> mx.array:
    if bits == 8:
        return data
    return ((data[:, None] >> mx.arange(0, 8, bits, dtype=mx.uint8)) & (2**bits - 1)).reshape(-1)


_EXAMPLE_RUNS = (Run(0, 4, 16, "fp8"), Run(64, 3, 64, "int4"), Run(256, 3, 256, "int2"))


def _example(tokens: int) -> tuple[mx.array, mx.array, mx.array, Sequence[Run]]:
    x = mx.random.normal((1024, tokens), key=mx.random.key(0))
    shifts, scales = (mx.full((10, tokens), value, mx.float16) for value in (-2.0, 0.3))
    return x, shifts, scales, _EXAMPLE_RUNS


def _example_payload(tokens: int) -> tuple[mx.array, Sequence[Run], int, int]:
    return reference_pack(*_example(tokens)), _EXAMPLE_RUNS, 1024, tokens


register(
    Operation(
        "groups.pack", pack, reference_pack, metal_pack, (Example("1,024 components, fp8, int4 and int2", _example),)
    )
)
register(
    Operation(
        "groups.unpack",
        unpack,
        reference_unpack,
        metal_unpack,
        (Example("1,024 components, fp8, int4 and int2", _example_payload),),
    )
)

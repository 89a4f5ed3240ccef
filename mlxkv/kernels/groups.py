"""Groups of PCA coefficients to one block's payload, and back: round, clip and pack by the plan, all runs at once.

Every token's group has its own 16-bit shift and scale, fitted elsewhere: a coefficient is `shift + scale * code`.
int2 and int4 codes are whole steps; fp8 codes are E4M3 (4 exponent bits, 3 mantissa bits, largest 448).

For each run of equal groups the payload holds all shifts, all scales (low bytes first, then high bytes), then the
codes, component by component, so that the lossless stage meets alike bytes side by side. docs/format.md specifies it.
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

BITS = {"none": 0, "int2": 2, "int4": 4, "fp8": 8}
_PACK = Kernel("groups_pack", inputs=("coefficients", "shifts", "scales", "runs", "sizes"), outputs=("payload",))
_UNPACK = Kernel("groups_unpack", inputs=("payload", "runs", "sizes"), outputs=("coefficients",))


@dataclass(frozen=True)
class Run:
    """Equal neighbouring groups, coded in one sweep: components start .. start + count * size."""

    start: int
    count: int
    size: int
    kind: str

    @property
    def stop(self) -> int:
        return self.start + self.count * self.size

    def code_bytes(self, tokens: int) -> int:
        """Bytes of the packed codes; zeros fill the last byte."""
        return -(-self.count * self.size * tokens * BITS[self.kind] // 8)

    def bytes(self, tokens: int) -> int:
        """Bytes of the whole run: shifts, scales, codes."""
        return 4 * self.count * tokens + self.code_bytes(tokens)


def payload_size(runs: Sequence[Run], tokens: int) -> int:
    """Bytes that `pack` makes of `tokens` tokens."""
    return sum(run.bytes(tokens) for run in runs)


def to_codes(x: mx.array, shift: mx.array, scale: mx.array, kind: str) -> mx.array:
    """x `[count, size, n]` float32 to uint8 codes, by float16 shift and scale `[count, n]`. A scale of 0 acts as 1."""
    wide = scale.astype(mx.float32)[:, None]
    steps = (x - shift.astype(mx.float32)[:, None]) / mx.where(wide == 0, 1.0, wide)
    if kind == "fp8":
        return mx.to_fp8(steps)
    return mx.clip(mx.round(steps), 0, 2 ** BITS[kind] - 1).astype(mx.uint8)


def from_codes(codes: mx.array, shift: mx.array, scale: mx.array, kind: str) -> mx.array:
    """The inverse, `[count, size, n]` float32."""
    steps = codes.astype(mx.float32)
    if kind == "fp8":  # the two codes of NaN, which only damage can bring, differ between MLX's devices
        steps = mx.where((codes & 127) == 127, mx.nan, mx.from_fp8(codes, mx.float32))
    return steps * scale.astype(mx.float32)[:, None] + shift.astype(mx.float32)[:, None]


def pack(coefficients: mx.array, shifts: mx.array, scales: mx.array, runs: Sequence[Run]) -> mx.array:
    """Coefficients `[r, n]` float32 to a payload, uint8 `[payload_size(runs, n)]`.

    shifts, scales: float16 `[groups, n]`, the groups of all runs in order.
    """
    return (metal_pack if metal.available() else reference_pack)(coefficients, shifts, scales, runs)


def unpack(payload: mx.array, runs: Sequence[Run], rank: int, tokens: int) -> mx.array:
    """The inverse: coefficients `[rank, tokens]` float32, zero where no run codes them."""
    return (metal_unpack if metal.available() else reference_unpack)(payload, runs, rank, tokens)


def reference_pack(coefficients: mx.array, shifts: mx.array, scales: mx.array, runs: Sequence[Run]) -> mx.array:
    tokens, group, parts = coefficients.shape[1], 0, [mx.zeros(0, mx.uint8)]
    for run in runs:
        side = slice(group, group + run.count)
        group += run.count
        x = coefficients[run.start : run.stop].reshape(run.count, run.size, tokens)
        codes = to_codes(x, shifts[side], scales[side], run.kind)
        parts += [*_byte_planes(shifts[side]), *_byte_planes(scales[side]), _packed(codes, BITS[run.kind])]
    return mx.concatenate(parts)


def reference_unpack(payload: mx.array, runs: Sequence[Run], rank: int, tokens: int) -> mx.array:
    parts, done, position = [], 0, 0
    for run in runs:
        side, codes = run.count * tokens, run.code_bytes(tokens)
        ends = np.cumsum([position, side, side, side, side, codes]).tolist()
        planes = [payload[a:b] for a, b in pairwise(ends)]
        position = ends[-1]
        shift, scale = (_from_planes(low, high).reshape(run.count, tokens) for low, high in (planes[:2], planes[2:4]))
        flat = _unpacked(planes[4], BITS[run.kind])[: run.count * run.size * tokens]
        values = from_codes(flat.reshape(run.count, run.size, tokens), shift, scale, run.kind)
        parts += [mx.zeros((run.start - done, tokens)), values.reshape(-1, tokens)]
        done = run.stop
    return mx.concatenate([*parts, mx.zeros((rank - done, tokens))])


def metal_pack(coefficients: mx.array, shifts: mx.array, scales: mx.array, runs: Sequence[Run]) -> mx.array:
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
    """What a kernel knows of each run, int32 `[runs, 6]`: first byte, first group, first component, count, size, bits."""
    return mx.array(list(_rows(runs, tokens)), dtype=mx.int32)


def _rows(runs: Sequence[Run], tokens: int) -> Iterator[tuple[int, ...]]:
    position, group = 0, 0
    for run in runs:
        yield position, group, run.start, run.count, run.size, BITS[run.kind]
        position += run.bytes(tokens)
        group += run.count


def _byte_planes(values: mx.array) -> list[mx.array]:
    """float16 to its low bytes and its high bytes."""
    bits = values.view(mx.uint16).reshape(-1)
    return [(bits & 255).astype(mx.uint8), (bits >> 8).astype(mx.uint8)]


def _from_planes(low: mx.array, high: mx.array) -> mx.array:
    return (low.astype(mx.uint16) | (high.astype(mx.uint16) << 8)).view(mx.float16)


def _packed(codes: mx.array, bits: int) -> mx.array:
    """uint8 codes to bytes, the first code in the lowest bits."""
    flat, lanes = codes.reshape(-1), 8 // bits
    if lanes == 1:
        return flat
    flat = mx.concatenate([flat, mx.zeros(-flat.size % lanes, mx.uint8)]).reshape(-1, lanes)
    return (flat << mx.arange(0, 8, bits, dtype=mx.uint8)).sum(axis=-1).astype(mx.uint8)


def _unpacked(data: mx.array, bits: int) -> mx.array:
    if bits == 8:
        return data
    return ((data[:, None] >> mx.arange(0, 8, bits, dtype=mx.uint8)) & (2**bits - 1)).reshape(-1)


_EXAMPLE = (Run(0, 4, 16, "fp8"), Run(64, 3, 64, "int4"), Run(256, 3, 256, "int2"))


def _example(tokens: int) -> tuple[mx.array, mx.array, mx.array, Sequence[Run]]:
    x = mx.random.normal((1024, tokens), key=mx.random.key(0))
    shifts, scales = (mx.full((10, tokens), value, mx.float16) for value in (-2.0, 0.3))
    return x, shifts, scales, _EXAMPLE


def _example_payload(tokens: int) -> tuple[mx.array, Sequence[Run], int, int]:
    return reference_pack(*_example(tokens)), _EXAMPLE, 1024, tokens


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

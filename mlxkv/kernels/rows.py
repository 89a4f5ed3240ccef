"""Layers `[L, B, H, T, D]` to token rows `[B*T, p]` and back, turning pairs of dims by their angle on the way.

A row is one token: all layers, then all heads, then all dims, p = L * H * D. Turning is RoPE (Su et al., arXiv
2104.09864) or its inverse, of any kind: an element becomes `x * cosine + partner * sine`. The angles come from
`Rope` and so from `mx.fast.rope` itself: every path agrees with the model, and with each other bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import mlx.core as mx
import numpy as np

from mlxkv.kernels import metal
from mlxkv.kernels.metal import Kernel
from mlxkv.kernels.operations import Example, Operation, register
from mlxkv.spec import Rope

_ROWS = Kernel("rows", inputs=("x", "cosines", "sines", "partners", "table", "sizes"), outputs=("turned",))
_SLICES = 8  # more pieces than this are gathered one element at a time


@dataclass(frozen=True)
class RotationTable:
    """How each layer's dims turn. cosines, sines: float32 `[R, T, D]`. partners: int32 `[R, D]`. table: int32 `[L]`,
    which of the R kinds of rotation a layer has. Build it with `turns`."""

    cosines: mx.array
    sines: mx.array
    partners: np.ndarray
    table: np.ndarray

    def only(self, kind: int) -> RotationTable:
        """The rotation of a single kind."""
        pick = slice(kind, kind + 1)
        return RotationTable(self.cosines[pick], self.sines[pick], self.partners[pick], np.zeros(1, np.int32))


def rotation_table(
    ropes: Sequence[Rope | None], dim: int, start: int, tokens: int, inverse: bool
) -> RotationTable | None:
    """The rotation of tokens start..start + tokens of layers with these ropes, or None when no layer rotates."""
    kinds = list(dict.fromkeys(ropes))
    if kinds == [None]:
        return None
    built = [_angles(rope, dim, start, tokens, inverse) for rope in kinds]
    return RotationTable(
        mx.stack([cosine for cosine, _, _ in built]),
        mx.stack([sine for _, sine, _ in built]),
        np.stack([partner for _, _, partner in built]),
        np.array([kinds.index(rope) for rope in ropes], dtype=np.int32),
    )


def to_rows(x: mx.array, turn: RotationTable | None) -> mx.array:
    """Layers x `[L, B, H, T, D]` of any float type to float32 rows `[B*T, L*H*D]`, in one pass over memory."""
    return (metal_to_rows if metal.available() else reference_to_rows)(x, turn)


def from_rows(rows: mx.array, shape: tuple[int, ...], turn: RotationTable | None, dtype: mx.Dtype) -> mx.array:
    """The inverse layout, of rows `[B*T, p]` float32 to layers `[L, B, H, T, D]` = shape of type dtype."""
    return (metal_from_rows if metal.available() else reference_from_rows)(rows, shape, turn, dtype)


def reference_to_rows(x: mx.array, turn: RotationTable | None) -> mx.array:
    layers, batch, heads, tokens, dim = x.shape
    if turn is not None:
        x = _rotate(x.astype(mx.float32), turn)
    return x.transpose(1, 3, 0, 2, 4).astype(mx.float32).reshape(batch * tokens, layers * heads * dim)


def metal_to_rows(x: mx.array, turn: RotationTable | None) -> mx.array:
    if turn is None or x.size == 0:  # MLX's own copy does it in one pass
        return reference_to_rows(x, turn)
    layers, batch, heads, tokens, dim = x.shape
    return _launch(x, x.shape, turn, (batch * tokens, layers * heads * dim), mx.float32, to_rows=True)


def reference_from_rows(
    rows: mx.array, shape: tuple[int, ...], turn: RotationTable | None, dtype: mx.Dtype
) -> mx.array:
    layers, batch, heads, tokens, dim = shape
    x = rows.reshape(batch, tokens, layers, heads, dim).transpose(2, 0, 3, 1, 4)
    return (x if turn is None else _rotate(mx.contiguous(x), turn)).astype(dtype)


def metal_from_rows(rows: mx.array, shape: tuple[int, ...], turn: RotationTable | None, dtype: mx.Dtype) -> mx.array:
    if turn is None or rows.size == 0:
        return reference_from_rows(rows, shape, turn, dtype)
    return _launch(rows, shape, turn, shape, dtype, to_rows=False)


def _launch(
    x: mx.array, shape: tuple[int, ...], turn: RotationTable, out: tuple[int, ...], dtype: mx.Dtype, to_rows: bool
) -> mx.array:
    layers, batch, heads, tokens, dim = shape
    return _ROWS(
        inputs=[x, turn.cosines, turn.sines, mx.array(turn.partners), mx.array(turn.table), mx.array(shape)],
        template=[("T", dtype), ("TO_ROWS", to_rows)],
        grid=(dim, tokens, layers * batch * heads),
        threadgroup=(64, 4, 1),
        output_shapes=[out],
        output_dtypes=[dtype],
    )[0]


def _angles(
    rope: Rope | None, dim: int, start: int, tokens: int, inverse: bool
) -> tuple[mx.array, mx.array, np.ndarray]:
    """Cosines and sines `[T, D]` and partners `[D]` of one kind of rotation."""
    partner, first = np.arange(dim, dtype=np.int32), np.ones(dim, dtype=np.float32)
    if rope is None:
        return mx.ones((tokens, dim)), mx.zeros((tokens, dim)), partner
    pairs = partner[rope.offset : rope.offset + rope.dims].reshape((-1, 2) if rope.traditional else (2, -1))
    a, b = pairs.T if rope.traditional else pairs
    partner[a], partner[b] = b, a.copy()
    first[b] = 0
    # Where the first of a pair is 1 and the second 0, the model's rotation leaves the cosine and the sine.
    unit = mx.broadcast_to(mx.array(first), (1, 1, tokens, dim))
    turned = np.array((rope.unrotate if inverse else rope.rotate)(unit, start)[0, 0])
    cosine, sine = turned.copy(), np.zeros_like(turned)
    cosine[:, b] = turned[:, a]
    sine[:, a], sine[:, b] = -turned[:, b], turned[:, b]
    return mx.array(cosine), mx.array(sine), partner


def _rotate(x: mx.array, turn: RotationTable) -> mx.array:
    """x `[L, B, H, T, D]` float32, each layer turned."""
    if len(turn.partners) > 1:
        return mx.stack([_rotate(layer, turn.only(kind)) for layer, kind in zip(x, turn.table)])
    return x * turn.cosines + _permuted(x, turn.partners[0]) * turn.sines


def _permuted(x: mx.array, order: np.ndarray) -> mx.array:
    """x with its last axis in another order: a few slices where that is all it takes, which is several times faster."""
    edges = [0, *(np.flatnonzero(np.diff(order) != 1) + 1).tolist(), len(order)]
    if len(edges) > _SLICES:
        return mx.take(x, mx.array(order), axis=-1)
    return mx.concatenate([x[..., order[a] : order[b - 1] + 1] for a, b in pairwise(edges)], axis=-1)


def _example(tokens: int) -> tuple[mx.array, RotationTable | None]:
    x = mx.random.normal((16, 1, 8, tokens, 128), key=mx.random.key(0)).astype(mx.bfloat16)
    return x, rotation_table([Rope(128, base=1e6)] * 16, 128, 0, tokens, inverse=True)


def _example_back(tokens: int) -> tuple[mx.array, tuple[int, ...], RotationTable | None, mx.Dtype]:
    x, turn = _example(tokens)
    return reference_to_rows(x, None), x.shape, turn, x.dtype


register(
    Operation(
        "rows.to_rows",
        to_rows,
        reference_to_rows,
        metal_to_rows,
        (Example("16 layers x 8 heads x 128 dims, bfloat16", _example),),
    )
)
register(
    Operation(
        "rows.from_rows",
        from_rows,
        reference_from_rows,
        metal_from_rows,
        (Example("16 layers x 8 heads x 128 dims, bfloat16", _example_back),),
    )
)

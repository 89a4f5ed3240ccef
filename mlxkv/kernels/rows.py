"""Layers `[L, B, H, T, D]` to token rows `[B*T, p]` and back, rotating pairs of dims by their angle on the way.

A row is one token: all layers, then all heads, then all dims, p = L * H * D. The rotation is RoPE (Su et al., arXiv
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
    """Rotations of a range of tokens, as `rotation_table` makes them: R kinds of rotation, one of them per layer.

    Parameters
    ----------
    cosines
        float32 `[R, T, D]`, 1 where nothing rotates.
    sines
        float32 `[R, T, D]`, the factors on partners, sign included.
    partners
        int32 `[R, D]`, the other dim of each dim's pair, or the dim itself.
    layer_kinds
        int32 `[L]`, each layer's kind.
    """

    cosines: mx.array
    sines: mx.array
    partners: np.ndarray
    layer_kinds: np.ndarray

    def of_kind(self, kind: int) -> RotationTable:
        """Return the table of one kind alone.

        Parameters
        ----------
        kind
            Index below R.

        Returns
        -------
        RotationTable
            R and L are 1.
        """
        pick = slice(kind, kind + 1)
        return RotationTable(self.cosines[pick], self.sines[pick], self.partners[pick], np.zeros(1, np.int32))


def rotation_table(
    ropes: Sequence[Rope | None], dim: int, start: int, tokens: int, inverse: bool
) -> RotationTable | None:
    """Return the rotations of some layers' tokens.

    Parameters
    ----------
    ropes
        L rotary embeddings, one for each layer; None where it has none.
    dim
        D, the width of a head.
    start
        Position of the first token.
    tokens
        T, the number of tokens.
    inverse
        True undoes the rotation, False applies it.

    Returns
    -------
    RotationTable | None
        None when no layer rotates.

    Examples
    --------
    >>> rotation_table([Rope(dims=4, base=1e4), None], dim=4, start=0, tokens=3, inverse=False).layer_kinds.tolist()
    [0, 1]
    """
    kinds: dict[Rope | None, int] = {}
    # By identity first: hashing a long table of periods for each layer would take longer than the block.
    kind_of = {key: kinds.setdefault(rope, len(kinds)) for key, rope in {id(rope): rope for rope in ropes}.items()}
    if list(kinds) == [None]:
        return None
    built = [_angles(rope, dim, start, tokens, inverse) for rope in kinds]
    return RotationTable(
        mx.stack([cosine for cosine, _, _ in built]),
        mx.stack([sine for _, sine, _ in built]),
        np.stack([partner for _, _, partner in built]),
        np.array([kind_of[id(rope)] for rope in ropes], dtype=np.int32),
    )


def to_rows(x: mx.array, rotation: RotationTable | None) -> mx.array:
    """Rotate layers and gather each token's values in a row, in one pass over memory.

    Parameters
    ----------
    x
        `[L, B, H, T, D]` of any float type.
    rotation
        The rotations of these layers and tokens; None leaves values as they are.

    Returns
    -------
    mx.array
        float32 `[B*T, L*H*D]`.

    Examples
    --------
    >>> to_rows(mx.zeros((2, 1, 3, 5, 8)), None).shape
    (5, 48)
    """
    return (metal_to_rows if metal.available() else reference_to_rows)(x, rotation)


def from_rows(rows: mx.array, shape: tuple[int, ...], rotation: RotationTable | None, dtype: mx.Dtype) -> mx.array:
    """Scatter rows to layers and rotate them: the inverse layout of `to_rows`.

    Parameters
    ----------
    rows
        float32 `[B*T, L*H*D]`.
    shape
        Sizes of the result, (L, B, H, T, D).
    rotation
        The rotations of these layers and tokens; None leaves values as they are.
    dtype
        Float type of the result.

    Returns
    -------
    mx.array
        `[L, B, H, T, D]` of type dtype.
    """
    return (metal_from_rows if metal.available() else reference_from_rows)(rows, shape, rotation, dtype)


def reference_to_rows(x: mx.array, rotation: RotationTable | None) -> mx.array:
    """Rotate and gather by the array operations that define `to_rows`.

    Parameters
    ----------
    x, rotation
        See `to_rows`.

    Returns
    -------
    mx.array
        See `to_rows`.
    """
    layers, batch, heads, tokens, dim = x.shape
    if rotation is not None:
        x = _rotate(x.astype(mx.float32), rotation)
    return x.transpose(1, 3, 0, 2, 4).astype(mx.float32).reshape(batch * tokens, layers * heads * dim)


def metal_to_rows(x: mx.array, rotation: RotationTable | None) -> mx.array:
    """Rotate and gather by the kernel, one thread for each value.

    Parameters
    ----------
    x, rotation
        See `to_rows`.

    Returns
    -------
    mx.array
        See `to_rows`.
    """
    if rotation is None or x.size == 0:  # MLX's own copy does it in one pass
        return reference_to_rows(x, rotation)
    layers, batch, heads, tokens, dim = x.shape
    return _launch(x, x.shape, rotation, (batch * tokens, layers * heads * dim), mx.float32, to_rows=True)


def reference_from_rows(
    rows: mx.array, shape: tuple[int, ...], rotation: RotationTable | None, dtype: mx.Dtype
) -> mx.array:
    """Scatter and rotate by the array operations that define `from_rows`.

    Parameters
    ----------
    rows, shape, rotation, dtype
        See `from_rows`.

    Returns
    -------
    mx.array
        See `from_rows`.
    """
    layers, batch, heads, tokens, dim = shape
    x = rows.reshape(batch, tokens, layers, heads, dim).transpose(2, 0, 3, 1, 4)
    return (x if rotation is None else _rotate(mx.contiguous(x), rotation)).astype(dtype)


def metal_from_rows(
    rows: mx.array, shape: tuple[int, ...], rotation: RotationTable | None, dtype: mx.Dtype
) -> mx.array:
    """Scatter and rotate by the kernel, one thread for each value.

    Parameters
    ----------
    rows, shape, rotation, dtype
        See `from_rows`.

    Returns
    -------
    mx.array
        See `from_rows`.
    """
    if rotation is None or rows.size == 0:
        return reference_from_rows(rows, shape, rotation, dtype)
    return _launch(rows, shape, rotation, shape, dtype, to_rows=False)


def _launch(
    x: mx.array, shape: tuple[int, ...], rotation: RotationTable, out: tuple[int, ...], dtype: mx.Dtype, to_rows: bool
) -> mx.array:
    layers, batch, heads, tokens, dim = shape
    return _ROWS(
        inputs=[
            x,
            rotation.cosines,
            rotation.sines,
            mx.array(rotation.partners),
            mx.array(rotation.layer_kinds),
            mx.array(shape),
        ],
        template=[("T", dtype), ("TO_ROWS", to_rows)],
        grid=(dim, tokens, layers * batch * heads),
        threadgroup=(64, 4, 1),
        output_shapes=[out],
        output_dtypes=[dtype],
    )[0]


def _angles(
    rope: Rope | None, dim: int, start: int, tokens: int, inverse: bool
) -> tuple[mx.array, mx.array, np.ndarray]:
    """Return cosines and sines `[T, D]` and partners `[D]` of one kind of rotation."""
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


def _rotate(x: mx.array, rotation: RotationTable) -> mx.array:
    """Rotate `[L, B, H, T, D]` float32, each layer by its kind."""
    if len(rotation.partners) > 1:
        return mx.stack([_rotate(layer, rotation.of_kind(kind)) for layer, kind in zip(x, rotation.layer_kinds)])
    return x * rotation.cosines + _permuted(x, rotation.partners[0]) * rotation.sines


def _permuted(x: mx.array, order: np.ndarray) -> mx.array:
    """Reorder the last axis: a few slices where that is all it takes, which is several times faster."""
    edges = [0, *(np.flatnonzero(np.diff(order) != 1) + 1).tolist(), len(order)]
    if len(edges) > _SLICES:
        return mx.take(x, mx.array(order), axis=-1)
    return mx.concatenate([x[..., order[a] : order[b - 1] + 1] for a, b in pairwise(edges)], axis=-1)


def _example(tokens: int) -> tuple[mx.array, RotationTable | None]:
    x = mx.random.normal((16, 1, 8, tokens, 128), key=mx.random.key(0)).astype(mx.bfloat16)
    return x, rotation_table([Rope(128, base=1e6)] * 16, 128, 0, tokens, inverse=True)


def _example_back(tokens: int) -> tuple[mx.array, tuple[int, ...], RotationTable | None, mx.Dtype]:
    x, rotation = _example(tokens)
    return reference_to_rows(x, None), x.shape, rotation, x.dtype


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

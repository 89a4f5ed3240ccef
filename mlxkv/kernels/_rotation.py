"""A fixed rotation of heads of any width, which spreads outlier dims and constant channel means over all dims.

Rows times the Hadamard matrix of the width's power of two, Kronecker the Hartley matrix of its odd part, after a fixed
sign for each dim (QuaRot, https://arxiv.org/abs/2404.00456, rotates by signed Hadamard matrices). No entry is larger than
sqrt(2 / width). It is a matrix product, since on a GPU that is one launch for any width.
"""

from __future__ import annotations

import hashlib
from functools import cache

import mlx.core as mx
import numpy as np


@cache
def rotation(dim: int) -> mx.array:
    """Return the rotation of heads of a width; saved caches depend on every sign in it.

    Parameters
    ----------
    dim
        The width, at least 1.

    Returns
    -------
    mx.array
        Orthogonal, `[dim, dim]` float32.
    """
    hadamard, odd = np.ones((1, 1)), dim
    while odd % 2 == 0:
        hadamard, odd = np.block([[hadamard, hadamard], [hadamard, -hadamard]]), odd // 2
    angles = 2 * np.pi / odd * (np.outer(np.arange(odd), np.arange(odd)) % odd)
    spread = np.kron(hadamard, np.cos(angles) + np.sin(angles)) / np.sqrt(dim)
    random = hashlib.shake_256(b"mlxkv rotation %d" % dim).digest(-(-dim // 8))  # the same in every version of NumPy
    signs = 1 - 2.0 * np.unpackbits(np.frombuffer(random, np.uint8))[:dim]
    return mx.array((signs[:, None] * spread).astype(np.float32))


def rotate(x: mx.array) -> mx.array:
    """Rotate rows.

    Parameters
    ----------
    x
        `[..., D]` of any float type.

    Returns
    -------
    mx.array
        `[..., D]` float32: products of rotated rows are those of the rows.
    """
    return x.astype(mx.float32) @ rotation(x.shape[-1])


def rotate_back(x: mx.array) -> mx.array:
    """Undo `rotate`.

    Parameters
    ----------
    x
        `[..., D]` of any float type.

    Returns
    -------
    mx.array
        `[..., D]` float32.
    """
    return x.astype(mx.float32) @ rotation(x.shape[-1]).T


@cache
def turn(dim: int) -> mx.array:
    """Return the columns of a rotation that its others follow from by signs, as kernels read them.

    Parameters
    ----------
    dim
        The width, at least 1.

    Returns
    -------
    mx.array
        float32 `[dim, the odd part of dim]`.
    """
    return mx.array(np.ascontiguousarray(np.array(rotation(dim))[:, : dim // (dim & -dim)]))

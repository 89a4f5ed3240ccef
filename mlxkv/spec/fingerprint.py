"""A name for a model's weights, by which files know the model that they belong to."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten


def fingerprint(model: Any) -> str:
    """Return a short name for a model's weights.

    Parameters
    ----------
    model
        A loaded mlx-lm model.

    Returns
    -------
    str
        Sixteen hexadecimal digits: BLAKE2b of every parameter's name, shape and first 64 values. Equal for float16 or
        bfloat16 weights and the same weights widened to float32.
    """
    digest = blake2b(digest_size=8)
    parameters = cast(dict[str, mx.array], tree_flatten(model.parameters(), destination={}))
    for name, value in sorted(parameters.items()):
        head = value.reshape(-1)[:64]
        if mx.issubdtype(head.dtype, mx.floating):
            head = head.astype(mx.float32)
        digest.update(f"{name} {value.shape} ".encode() + np.array(head).tobytes())
    return digest.hexdigest()

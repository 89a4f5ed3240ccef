"""Comparison in every kernel's tests: integers are identical to the reference, floats within TOLERANCE."""

import mlx.core as mx
import numpy as np

from mlxkv.kernels.operations import TOLERANCE


def assert_same(found: mx.array, expected: mx.array) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    relative, absolute = TOLERANCE.get(found.dtype, (0, 0))
    wide = mx.float32 if found.dtype in TOLERANCE else found.dtype
    np.testing.assert_allclose(
        np.array(found.astype(wide)), np.array(expected.astype(wide)), rtol=relative, atol=absolute
    )

"""Settings of matrix products: a fast BLAS on Linux, full float32 precision on Apple GPUs.

The Linux `mlx[cpu]` wheel links reference BLAS, many times slower than OpenBLAS. Loading a system OpenBLAS before
`mlx.core` is imported makes its symbols win. On macOS, MLX multiplies float32 matrices on M5 GPUs with 10-bit
mantissas (TF32) by default; the codec's coefficients and the kernels' references need full precision.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings

LIBRARY = "libopenblas.so.0"
INSTALL = "apt-get install libopenblas0-pthread"


def preload() -> None:
    """Load OpenBLAS, where it is installed, for all later imports; warn when MLX was imported before.

    `import mlxkv` calls it. It also turns TF32 off, unless the environment variable `MLX_ENABLE_TF32` is set.
    Products of other types than float32 are not affected.

    Warns
    -----
    RuntimeWarning
        On Linux, when `mlx.core` was imported earlier and no OpenBLAS was loaded by then.
    """
    os.environ.setdefault("MLX_ENABLE_TF32", "0")
    if sys.platform != "linux":
        return
    late = "mlx.core" in sys.modules
    try:
        # Too late to help, so only check whether it was loaded in time by other code.
        ctypes.CDLL(LIBRARY, mode=os.RTLD_NOLOAD if late else ctypes.RTLD_GLOBAL)
    except OSError:
        if late:
            warnings.warn(
                "import mlxkv before mlx: its fast BLAS can only be loaded first", RuntimeWarning, stacklevel=3
            )

"""A fast BLAS for MLX on Linux.

The Linux `mlx[cpu]` wheel links reference BLAS, many times slower than OpenBLAS. Loading a system OpenBLAS before
`mlx.core` is imported makes its symbols win. macOS has Accelerate and needs nothing.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings

LIBRARY = "libopenblas.so.0"
INSTALL = "apt-get install libopenblas0-pthread"


def preload() -> None:
    """Load OpenBLAS, where it is installed, for all later imports; warn when MLX was imported before."""
    if sys.platform != "linux":
        return
    late = "mlx.core" in sys.modules
    try:
        # Too late to help, so only look whether somebody else has loaded it in time.
        ctypes.CDLL(LIBRARY, mode=os.RTLD_NOLOAD if late else ctypes.RTLD_GLOBAL)
    except OSError:
        if late:
            warnings.warn(
                "import mlxkv before mlx: its fast BLAS can only be loaded first", RuntimeWarning, stacklevel=3
            )

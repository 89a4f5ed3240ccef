"""A fast BLAS for MLX on Linux.

The Linux `mlx[cpu]` wheel links reference BLAS, about 70 times slower than OpenBLAS. Loading a system OpenBLAS
before `mlx.core` is imported makes its symbols win. macOS has Accelerate and needs nothing.
"""

from __future__ import annotations

import ctypes
import sys

LIBRARY = "libopenblas.so.0"
INSTALL = "apt-get install libopenblas0-pthread"


def preload() -> bool:
    """Load OpenBLAS for all later imports. False when it is not needed, too late or not installed."""
    if sys.platform != "linux" or "mlx.core" in sys.modules:
        return False
    try:
        ctypes.CDLL(LIBRARY, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True

"""What a result was measured on: it stands in every JSON beside the numbers."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Any

import mlx.core as mx

import mlxkv


def describe() -> dict[str, Any]:
    """Machine, operating system, device and versions."""
    info = mx.device_info()
    return {
        "os": platform.platform(),
        "processor": info.get("device_name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "device": str(mx.default_device()),
        "metal": mx.metal.is_available(),
        "python": platform.python_version(),
        "mlxkv": mlxkv.__version__,
        **{name: version(name) for name in ("mlx", "mlx-lm", "numpy")},
    }

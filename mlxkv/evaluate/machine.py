"""The machine and versions of a measurement: they stand in every JSON result beside the numbers."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxkv.version import __version__


def describe() -> dict[str, Any]:
    """Describe the machine.

    Returns
    -------
    dict
        `os`, `processor`, `cores`, `device` (MLX's default), `metal` (whether it is available), `commit`, and versions
        of `python`, `mlxkv`, `mlx`, `mlx-lm` and `numpy`.
    """
    info = mx.device_info()
    return {
        "os": platform.platform(),
        "processor": info.get("device_name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "device": str(mx.default_device()),
        "metal": mx.metal.is_available(),
        "python": platform.python_version(),
        "mlxkv": __version__,
        "commit": commit(),
        **{name: version(name) for name in ("mlx", "mlx-lm", "numpy")},
    }


def commit() -> str | None:
    """Return the checked-out commit of mlxkv.

    Returns
    -------
    str or None
        Ten hexadecimal digits, with "+" when files other than benchmark results differ from the commit; None for an
        installed release.
    """
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=checkout, capture_output=True, text=True, check=False).stdout.strip()

    found = git("rev-parse", "--short=10", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return f"{found}{'+' if changed else ''}" if found else None

from __future__ import annotations

import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mlxkv.cli._output import Json, show_rows

SLOW_GFLOPS = 20.0  # reference BLAS reaches 3, OpenBLAS 100 and more on two cores


def command(json: Json = False) -> None:
    """Check the installation and say what to do about each problem. Exits with 1 when there is one.

    Example: mlxkv doctor
    """
    import typer

    rows = [_versions(), *_packages(), _device(), _blas(), _model(), _resources()]
    show_rows(rows, json)
    if any(row["status"] == "problem" for row in rows):
        raise typer.Exit(1)


def _row(check: str, found: str, advice: str = "") -> dict[str, Any]:
    return {"check": check, "status": "problem" if advice else "ok", "found": found, "advice": advice}


def _versions() -> dict[str, Any]:
    import platform

    import mlxkv

    return _row("mlxkv", f"{mlxkv.__version__}, Python {platform.python_version()}, {platform.platform()}")


def _packages() -> list[dict[str, Any]]:
    rows = []
    for name in ("mlx", "mlx-lm", "numpy"):
        try:
            rows.append(_row(name, version(name)))
        except PackageNotFoundError:
            rows.append(_row(name, "not installed", f"pip install {name}"))
    return rows


def _device() -> dict[str, Any]:
    import mlx.core as mx

    metal = "Metal available" if mx.metal.is_available() else "no Metal: everything runs on the CPU, in float32"
    return _row("device", f"{mx.default_device()}, {metal}")


def _blas() -> dict[str, Any]:
    import mlx.core as mx

    from mlxkv import blas

    a = mx.random.normal((512, 512))
    mx.eval(a, a @ a)
    start = time.perf_counter()
    for _ in range(4):
        mx.eval(a @ a)
    speed = 4 * 2 * 512**3 / (time.perf_counter() - start) / 1e9
    advice = f"install OpenBLAS: {blas.INSTALL}" if speed < SLOW_GFLOPS else ""
    return _row("matrix product", f"{speed:.0f} GFLOP/s in float32", advice)


def _model() -> dict[str, Any]:
    from mlxkv import smollm2
    from mlxkv.errors import ModelNotFoundError

    try:
        return _row(smollm2.NAME, str(smollm2.find_gguf()))
    except ModelNotFoundError:
        return {**_row(smollm2.NAME, "not installed (only needed for the demo and tests)"), "advice": smollm2.INSTALL}


def _resources() -> dict[str, Any]:
    from mlxkv.errors import InputError
    from mlxkv.presets import names

    try:
        return _row("presets", f"{len(names('models'))} models, {len(names('methods'))} methods")
    except InputError as error:
        return _row("presets", "missing", str(error))

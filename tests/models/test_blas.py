import subprocess
import sys

import pytest


def run(code):
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has Accelerate")
def test_importing_mlx_first_is_warned_about_on_linux():
    assert "import mlxkv before mlx" in run("import mlx.core, mlxkv").stderr


def test_importing_mlxkv_first_says_nothing():
    assert run("import mlxkv, mlx.core, mlxkv.spec").returncode == 0


@pytest.mark.parametrize(("given", "kept"), [(None, "0"), ("1", "1")])
def test_float32_products_keep_their_digits_unless_told_otherwise(given, kept, monkeypatch):
    monkeypatch.delenv("MLX_ENABLE_TF32") if given is None else monkeypatch.setenv("MLX_ENABLE_TF32", given)
    assert run("import os, mlxkv; print(os.environ['MLX_ENABLE_TF32'])").stdout.strip() == kept


@pytest.mark.parametrize("benchmark", ["experiments.codec_speed", "demo"])
def test_benchmarks_load_the_fast_blas_first(benchmark):
    assert run(f"import benchmarks.{benchmark}").stderr == ""

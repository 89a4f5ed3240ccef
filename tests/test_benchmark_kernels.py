"""The kernels' benchmark refuses without Metal, times every kernel, and computes what it says."""

import subprocess
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path

import mlx.core as mx
import pytest
from metal_host import installed

from benchmarks import kernels, schema
from benchmarks.kernels import main, measure
from mlxkv.errors import MlxkvError
from mlxkv.kernels.examples import Example, all_examples

ROOT = Path(__file__).parents[1]


@pytest.fixture
def no_results(monkeypatch, tmp_path):
    monkeypatch.setattr(schema, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def test_without_metal_it_says_so_and_leaves_with_5(monkeypatch, no_results, capsys):
    monkeypatch.setattr(kernels.metal, "available", lambda: False)
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda rounds: pytest.fail("measured without Metal"))
    with pytest.raises(SystemExit) as exit_info:
        main([])
    assert exit_info.value.code == 5
    assert capsys.readouterr().err.count("\n") == 1
    assert not no_results.exists()


@pytest.mark.skipif(mx.metal.is_available(), reason="a Mac measures")
def test_the_command_line_refuses_too():
    done = subprocess.run([sys.executable, "-m", "benchmarks.kernels"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 5
    assert "needs a Mac" in done.stderr


def test_a_row_is_measured_for_a_real_kernel(monkeypatch):
    monkeypatch.setattr(kernels, "WARM_UP", 0)
    example = next(one for one in all_examples() if one.module == "rows")
    with installed():
        row = measure(replace(example, tokens=3), 1, 1e9)
    assert len(row["seconds"]["reference"]) == len(row["seconds"]["metal"]) == 1
    assert row["kernel"] == "rows.to_rows"
    assert row["shape"].startswith("3 tokens, ")
    assert row["bytes"] > 0


@pytest.fixture
def doubled(monkeypatch):
    """A case of 1,000 floats in and out, which reference and kernel double in 3 and 2 milliseconds."""
    ticks = count()
    steps = [0, 3e-3, 3e-3, 5e-3]  # start and stop of the reference, start and stop of the kernel
    monkeypatch.setattr(kernels, "perf_counter", lambda: (n := next(ticks)) // 4 + steps[n % 4])
    monkeypatch.setattr(Example, "function", lambda self, path: lambda x: 2 * x)
    return Example("double", "1,000 floats", lambda tokens: (mx.arange(tokens, dtype=mx.float32),), 1000, "any")


def test_a_row_has_the_arithmetic_right(doubled):
    row = measure(doubled, 5, bandwidth=16e6)
    assert row["bytes"] == 8000
    assert row["reference_ms"] == pytest.approx(3)
    assert row["metal_ms"] == pytest.approx(2)
    assert row["times_faster"] == pytest.approx(1.5)
    assert row["gb_per_second"] == pytest.approx(8000 / 2e-3 / 1e9)
    assert row["of_copy"] == pytest.approx(0.25)
    assert [len(each) for each in row["seconds"].values()] == [5, 5]


def test_a_kernel_that_disagrees_is_not_timed(doubled, monkeypatch):
    monkeypatch.setattr(Example, "function", lambda self, path: lambda x: x + (path == "metal"))
    with pytest.raises(MlxkvError, match="disagrees"):
        measure(doubled, 1, bandwidth=1.0)


def test_copy_bandwidth_counts_bytes_read_and_written(monkeypatch):
    ticks = count()
    monkeypatch.setattr(kernels, "perf_counter", lambda: next(ticks) * 0.5)
    assert kernels.copy_bandwidth(3, size=4000) == pytest.approx(2 * 4000 / 0.5)


def test_main_prints_a_table_and_writes_one_file(doubled, monkeypatch, no_results, capsys):
    monkeypatch.setattr(kernels.metal, "available", lambda: True)
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda rounds: 16e6)
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "Apple M0"})
    monkeypatch.setattr(kernels, "all_examples", lambda: [doubled])
    main(["--rounds", "3"])
    out = capsys.readouterr().out
    assert "Apple M0" in out
    assert "1.5x" in out
    assert [path.name for path in no_results.iterdir()] == ["kernels.json"]

"""The kernels' benchmark refuses without Metal, times every kernel, and computes what it says."""

from dataclasses import replace
from itertools import count

import mlx.core as mx
import pytest
from metal_host import installed

from benchmarks.experiments import kernels
from benchmarks.experiments.kernels import measure
from mlxkv.errors import MlxkvError, UnsupportedError
from mlxkv.kernels.operations import Example, Operation, iter_examples


def test_without_metal_it_says_so_and_measures_nothing(monkeypatch):
    monkeypatch.setattr(kernels.metal, "available", lambda: False)
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda rounds: pytest.fail("measured without Metal"))
    with pytest.raises(UnsupportedError, match="needs a Mac"):
        kernels.run(True)


def test_a_row_is_measured_for_a_real_kernel(monkeypatch):
    monkeypatch.setattr(kernels, "WARM_UP", 0)
    operation, example = next(pair for pair in iter_examples() if pair[0].name == "rows.to_rows")
    with installed():
        row = measure(operation, replace(example, tokens=3), 1, 1e9)
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
    example = Example("1,000 floats", lambda tokens: (mx.arange(tokens, dtype=mx.float32),), 1000)
    return Operation("any.double", *[lambda x: 2 * x] * 3, (example,)), example


def test_a_row_has_the_arithmetic_right(doubled):
    row = measure(*doubled, 5, bandwidth=16e6)
    assert row["bytes"] == 8000
    assert row["reference_ms"] == pytest.approx(3)
    assert row["metal_ms"] == pytest.approx(2)
    assert row["times_faster"] == pytest.approx(1.5)
    assert row["gb_per_second"] == pytest.approx(8000 / 2e-3 / 1e9)
    assert row["of_copy"] == pytest.approx(0.25)
    assert [len(each) for each in row["seconds"].values()] == [5, 5]


def test_a_kernel_that_disagrees_is_not_timed(doubled):
    operation, example = doubled
    with pytest.raises(MlxkvError, match="disagrees"):
        measure(replace(operation, metal=lambda x: 2 * x + 1), example, 1, bandwidth=1.0)


def test_copy_bandwidth_counts_bytes_read_and_written(monkeypatch):
    ticks = count()
    monkeypatch.setattr(kernels, "perf_counter", lambda: next(ticks) * 0.5)
    assert kernels.copy_bandwidth(3, size=4000) == pytest.approx(2 * 4000 / 0.5)


def test_the_section_says_where_it_was_measured_and_what_is_slower(doubled, monkeypatch):
    monkeypatch.setattr(kernels.metal, "available", lambda: True)
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda rounds: 16e6)
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "Apple M0"})
    monkeypatch.setattr(kernels, "iter_examples", lambda: [doubled, doubled])
    outcome = kernels.run(True)
    rows = [outcome.summary[0], {**outcome.summary[1], "kernel": "snail", "times_faster": 0.5}]
    text = kernels.section({"config": outcome.config, "summary": rows})
    assert "1 of 2 measurements on Apple M0" in text
    assert "slower: snail" in text
    assert "1.5x" in text

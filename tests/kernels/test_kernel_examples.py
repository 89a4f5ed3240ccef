"""Every operation of every kernel has an example; on the host each agrees with its reference, and doctor tells."""

import json
from importlib import import_module
from pkgutil import iter_modules

import mlx.core as mx
import pytest
from conftest import run
from metal_host import installed

import mlxkv.kernels
from mlxkv.kernels.examples import Example, all_examples, arrays

EXAMPLES = list(all_examples())


def test_every_operation_has_an_example():
    modules = {info.name for info in iter_modules(mlxkv.kernels.__path__)} - {"metal", "examples"}
    operations = {
        (name, function.removeprefix("metal_"))
        for name in modules
        for function in vars(import_module(f"mlxkv.kernels.{name}"))
        if function.startswith("metal_")
    }
    assert {name for name, _ in operations} == modules
    assert {(example.module, example.op) for example in EXAMPLES} == operations


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda one: f"{one.module}.{one.op} {one.label} {one.tokens}")
def test_every_example_agrees_with_its_reference(example):
    with installed():
        assert example.agrees(example.arguments(3))


@pytest.mark.parametrize(
    ("result", "same"),
    [
        (mx.array([1.0, 2.0]), True),
        (mx.array([1.0, 2.000001]), True),
        (mx.array([1.0, 2.0001]), False),
        (mx.array([1, 2]), False),
        (mx.array([[1.0, 2.0]]), False),
        ((mx.array([1.0, 2.0]), mx.array([0])), False),
        (mx.array([1.0, mx.nan]), False),
    ],
)
def test_agreement_is_of_shape_type_and_value(monkeypatch, result, same):
    expected = mx.array([1.0, 2.0])
    monkeypatch.setattr(Example, "function", lambda self, path: lambda: expected if path == "reference" else result)
    assert Example("any", "", lambda tokens: ()).agrees(()) == same


def test_arrays_are_found_wherever_they_are():
    example = next(one for one in EXAMPLES if one.op == "decode_attention")
    found = arrays(example.arguments(3))
    assert len(found) == 1 + 4 * 3  # queries, and words, shift and scale of keys and values in two buckets


@pytest.fixture
def doctor(capsys):
    def row():
        code = run("doctor", "--json")
        return code, next(row for row in json.loads(capsys.readouterr().out) if row["check"] == "kernels")

    return row


@pytest.mark.skipif(mx.metal.is_available(), reason="a Mac has Metal")
def test_doctor_without_metal_says_that_kernels_do_not_run(doctor):
    row = doctor()[1]
    assert (row["status"], row["found"]) == ("ok", f"{len(EXAMPLES)} checks need Metal; plain operations run instead")


@pytest.fixture
def only_rows(monkeypatch):
    rows = [one for one in EXAMPLES if one.module == "rows"]
    monkeypatch.setattr("mlxkv.kernels.examples.all_examples", lambda: rows)


def test_doctor_runs_every_example_on_metal(doctor, only_rows):
    with installed():
        row = doctor()[1]
    assert row["status"] == "ok"
    assert row["found"].startswith("2 checks: each agrees")


@pytest.mark.parametrize("new", ["turned[to + d] = T(own - other)", "does not compile"])
def test_doctor_names_a_kernel_that_is_wrong_or_does_not_compile(doctor, only_rows, new):
    with installed(("rows", "turned[to + d] = T(own + other)", new)):
        code, row = doctor()
    assert code == 1
    assert row["found"] == "wrong on this Mac: rows.to_rows, rows.from_rows"

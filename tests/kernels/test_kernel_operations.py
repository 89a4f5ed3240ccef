"""Every operation of every kernel is registered with examples; each agrees with its reference, and doctor checks all."""

import inspect
import json
import sys
from importlib import import_module
from pkgutil import iter_modules

import mlx.core as mx
import pytest
from conftest import run
from metal_host import installed

import mlxkv.kernels
from mlxkv.errors import InputError
from mlxkv.kernels import operations
from mlxkv.kernels.operations import Example, Operation, arrays, iter_examples, kernel_operations
from mlxkv.registry import Registry

EXAMPLES = list(iter_examples())
NAMES = kernel_operations.names()


def test_every_operation_of_every_file_is_registered():
    modules = {info.name for info in iter_modules(mlxkv.kernels.__path__) if not info.name.startswith("_")}
    modules -= {"metal", "operations"}
    defined = {
        (name, function.removeprefix("metal_"))
        for name in modules
        for function in vars(import_module(f"mlxkv.kernels.{name}"))
        if function.startswith("metal_")
    }
    assert {name for name, _ in defined} == modules
    assert {tuple(name.split(".")) for name in NAMES} == defined
    assert {operation.name for operation, _ in EXAMPLES} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_operation_is_its_files_functions_of_that_name(name):
    file, op = name.split(".")
    module, operation = import_module(f"mlxkv.kernels.{file}"), kernel_operations.get(name)
    assert operation.name == name
    assert operation.dispatch is getattr(module, op)
    assert operation.reference is getattr(module, f"reference_{op}")
    assert operation.metal is getattr(module, f"metal_{op}")


@pytest.mark.parametrize("name", NAMES)
def test_the_three_functions_of_an_operation_have_one_signature(name):
    operation = kernel_operations.get(name)
    signature = inspect.signature(operation.dispatch)
    assert inspect.signature(operation.reference) == signature
    assert inspect.signature(operation.metal) == signature


def test_one_file_adds_a_kernel(monkeypatch, tmp_path):
    (tmp_path / "double.py").write_text(
        "from mlxkv.kernels.operations import Example, Operation, register\n"
        "double = lambda x: 2 * x\n"
        "register(Operation('double.double', double, double, double, (Example('a number', lambda tokens: (tokens,)),)))\n"
    )
    monkeypatch.setattr(mlxkv.kernels, "__path__", [str(tmp_path)])
    monkeypatch.setattr(mlxkv.kernels, "double", None, raising=False)  # so that the import's own is taken away again
    monkeypatch.setattr(operations, "kernel_operations", Registry("kernel operation", "mlxkv.kernels"))
    assert operations.kernel_operations.names() == ["double.double"]
    monkeypatch.delitem(sys.modules, "mlxkv.kernels.double")


def test_an_operation_without_examples_is_refused():
    with pytest.raises(InputError, match=r"any\.op needs an example"):
        Operation("any.op", abs, abs, abs, ())


def plain(x: mx.array, bits: int = 2) -> mx.array:
    return x


def other_name(x: mx.array, width: int = 2) -> mx.array:
    return x


def other_default(x: mx.array, bits: int = 3) -> mx.array:
    return x


def other_result(x: mx.array, bits: int = 2) -> list[mx.array]:
    return [x]


@pytest.mark.parametrize("other", [other_name, other_default, other_result])
def test_functions_of_different_signatures_are_refused(other):
    examples = (Example("", lambda tokens: ()),)
    for functions in ((plain, other, plain), (plain, plain, other)):
        with pytest.raises(InputError, match=r"any\.op: a function has"):
            Operation("any.op", *functions, examples)


@pytest.mark.parametrize(
    ("operation", "example"),
    EXAMPLES,
    ids=[f"{one.name} {example.label} {example.tokens}" for one, example in EXAMPLES],
)
def test_every_example_agrees_with_its_reference(operation, example):
    with installed():
        assert operation.agrees(example.arguments(3))


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
def test_agreement_is_of_shape_type_and_value(result, same):
    expected = mx.array([1.0, 2.0])
    examples = (Example("", lambda tokens: ()),)
    assert Operation("any.op", lambda: expected, lambda: expected, lambda: result, examples).agrees(()) == same


def test_arrays_are_found_wherever_they_are():
    example = kernel_operations.get("decode_attention.decode_attention").examples[0]
    found = arrays(example.arguments(3))
    assert len(found) == 1 + 4 * 3  # queries, and words, bias and scale of keys and values in two buckets


@pytest.fixture
def doctor(capsys):
    def row():
        code = run("doctor", "--json")
        return code, next(row for row in json.loads(capsys.readouterr().out) if row["check"] == "kernels")

    return row


@pytest.mark.skipif(mx.metal.is_available(), reason="a Mac has Metal")
def test_doctor_without_metal_says_that_kernels_do_not_run(doctor):
    row = doctor()[1]
    assert (row["status"], row["found"]) == (
        "skipped",
        f"no Metal for {len(EXAMPLES)} checks; plain operations run instead",
    )


@pytest.fixture
def only_rows(monkeypatch):
    rows = [pair for pair in EXAMPLES if pair[0].name.startswith("rows.")]
    monkeypatch.setattr(operations, "iter_examples", lambda: rows)


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
    assert row["found"] == "wrong on this Mac: rows.from_rows, rows.to_rows"

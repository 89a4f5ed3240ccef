"""Cheap mistakes are found before the expensive part: no model is loaded and nothing is calibrated for them."""

import os

import pytest
from conftest import run, tiny_model, tiny_tokens

from mlxkv import lm, write_dump


@pytest.fixture
def nothing_expensive(monkeypatch):
    def expensive(*_):
        raise AssertionError("the expensive part was reached")

    monkeypatch.setattr("mlxkv.lm.load", expensive)
    monkeypatch.setattr("mlxkv.codec.calibrate.calibrate", expensive)


@pytest.fixture
def npz(tmp_path):
    write_dump(tmp_path / "a.npz", lm.dump(tiny_model("llama"), tiny_tokens(40)))
    return tmp_path / "a.npz"


def commands(tmp_path, npz, out):
    """A right command line of each kind, but for `out`."""
    return {
        "dump": ["dump", "--model", "any", "--prompt", "a", "--out", out],
        "eval": ["eval", "fidelity", "--model", "any", "--text-file", npz, "--artifacts", tmp_path, "--out", out],
        "calibrate": ["calibrate", "--npz", npz, "--compression-ratio", 4, "--out", out],
    }


@pytest.mark.parametrize("command", ["dump", "eval", "calibrate"])
def test_an_out_below_a_file_is_found_first(command, npz, tmp_path, nothing_expensive, capsys):
    assert run(*commands(tmp_path, npz, npz / "x" / "y")[command]) == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["dump", "eval", "calibrate"])
def test_an_out_that_may_not_be_written_is_found_first(command, npz, tmp_path, nothing_expensive, monkeypatch, capsys):
    monkeypatch.setattr("os.access", lambda _, mode: mode == os.R_OK)
    assert run(*commands(tmp_path, npz, tmp_path / "x")[command]) == 2
    assert f"cannot write {tmp_path / 'x'}: {tmp_path} is not writable" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["dump", "eval"])
def test_an_out_that_is_a_folder_or_in_none_is_found_first(command, npz, tmp_path, nothing_expensive, capsys):
    assert run(*commands(tmp_path, npz, tmp_path)[command]) == 2
    assert "not a file name" in capsys.readouterr().err
    assert run(*commands(tmp_path, npz, tmp_path / "no" / "x")[command]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_a_folder_of_artifacts_may_be_new_and_deep(npz, tmp_path):
    assert run(*commands(tmp_path, npz, tmp_path / "new" / "deep")["calibrate"]) == 0
    assert (tmp_path / "new" / "deep" / "meta.json").is_file()


@pytest.mark.parametrize("command", ["dump", "eval"])
def test_an_unknown_dtype_is_a_usage_error(command, npz, tmp_path, nothing_expensive, capsys):
    assert run(*commands(tmp_path, npz, tmp_path / "x")[command], "--dtype", "int3") == 2
    error = capsys.readouterr().err
    assert "'int3' is not one of 'auto', 'float16', 'float32'" in error
    assert "--help explains it" in error


def test_a_preset_is_checked_before_calibrating(npz, tmp_path, nothing_expensive, capsys):
    assert run(*commands(tmp_path, npz, tmp_path / "c")["calibrate"], "--preset", "glm") == 4
    assert "preset 'glm' is for" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["compress", "decompress"])
def test_a_file_is_never_written_over_the_one_it_is_made_from(command, npz, capsys):
    before = npz.read_bytes()
    source = ["--npz", npz] if command == "compress" else [npz]
    assert run(command, *source, "--artifacts", npz.parent, "--out", npz.parent / "." / npz.name) == 2
    assert "it is the file to read" in capsys.readouterr().err
    assert npz.read_bytes() == before

"""Models out of wheels: found, converted once into a folder that is complete or not there, and listed everywhere."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import run

from mlxkv import lm
from mlxkv.bundled import gemma3, models, smollm2, wheels
from mlxkv.errors import ModelNotFoundError

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=[smollm2, gemma3], ids=lambda module: module.NAME)
def home(request, tmp_path, monkeypatch):
    """An empty MLXKV_HOME, and a model's conversion that only leaves a note and counts its calls."""
    module = request.param
    monkeypatch.setenv("MLXKV_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(module, "find_gguf", lambda: [] if module is gemma3 else tmp_path / "model.gguf")
    if module is gemma3:
        monkeypatch.setattr(module, "join", lambda parts, whole: whole.write_text("joined"))
    conversions = []

    def convert(gguf, out):
        conversions.append(out)
        (out / "config.json").write_text(f"{gguf.name} {len(conversions)}")

    monkeypatch.setattr(module, "convert", convert)
    return SimpleNamespace(path=tmp_path / "home", conversions=conversions, module=module)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_model_is_converted_once_into_mlxkv_home(home, monkeypatch):
    monkeypatch.delenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", raising=False)
    first, second = home.module.model_path(), home.module.model_path()
    assert first == second == home.path / home.module.NAME == models.model_path(home.module.NAME)
    assert len(home.conversions) == 1
    assert os.environ.pop("TRANSFORMERS_NO_ADVISORY_WARNINGS"), "Transformers would ask for PyTorch"
    assert (first / "config.json").read_text() == "model.gguf 1"
    assert names_in(first) == ["config.json"]
    assert names_in(home.path) == [home.module.NAME], "the work folder was left behind"


def test_a_failed_conversion_leaves_nothing_and_the_next_one_starts_anew(home, monkeypatch):
    def fail(gguf, out):
        (out / "model.safetensors").write_text("half")
        raise RuntimeError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(home.module, "convert", fail)
        with pytest.raises(RuntimeError, match="disk full"):
            home.module.model_path()
    assert list(home.path.iterdir()) == []
    assert (home.module.model_path() / "config.json").is_file()


def test_where_nothing_can_be_locked_the_first_rename_wins(home, monkeypatch):
    convert = home.module.convert

    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    def overtaken(gguf, out):
        convert(gguf, out)
        other = home.path / home.module.NAME
        other.mkdir()
        (other / "config.json").write_text("the other process's")

    monkeypatch.setattr(wheels.fcntl, "flock", no_locks)
    monkeypatch.setattr(home.module, "convert", overtaken)
    path = home.module.model_path()
    assert (path / "config.json").read_text() == "the other process's"
    assert names_in(home.path) == [home.module.NAME]


def test_a_cache_folder_that_cannot_be_written_is_named_with_the_way_out(home, monkeypatch):
    home.path.write_text("a file where the folder should be")
    with pytest.raises(ModelNotFoundError, match=rf"{home.path}.*MLXKV_HOME"):
        home.module.model_path()
    home.path.unlink()

    def full(gguf, out):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(home.module, "convert", full)
    with pytest.raises(ModelNotFoundError, match=rf"{home.path}: No space left.*MLXKV_HOME"):
        home.module.model_path()
    assert list(home.path.iterdir()) == []


CONVERTING = """
import os, signal, sys, time
from pathlib import Path
from mlxkv.bundled import wheels

def convert(work):
    (work / "model.safetensors").write_text("half")
    print("begun", flush=True)
    sys.stdin.readline()
    (work / "config.json").write_text("the child's")

wheels.convert_once("any", "1 MB", convert)
"""


@pytest.fixture
def converting(tmp_path, monkeypatch):
    """Another process in the middle of a conversion."""
    monkeypatch.setenv("MLXKV_HOME", str(tmp_path))
    child = subprocess.Popen(
        [sys.executable, "-c", CONVERTING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert child.stdout.readline() == "begun\n"
    yield child
    child.kill()
    child.communicate()


def test_what_a_killed_conversion_left_is_removed_by_the_next_one(converting, tmp_path):
    os.kill(converting.pid, signal.SIGKILL)
    converting.wait()
    (litter,) = names_in(tmp_path)
    assert litter.startswith(".any-")
    wheels.convert_once("any", "1 MB", lambda work: (work / "config.json").write_text("ours"))
    assert names_in(tmp_path) == ["any"]
    assert (tmp_path / "any" / "config.json").read_text() == "ours"


def test_a_second_process_waits_for_the_first_and_takes_what_it_made(converting, tmp_path):
    waiting = subprocess.Popen(
        [sys.executable, "-c", CONVERTING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    converting.stdin.write("\n")
    converting.stdin.flush()
    said, _ = waiting.communicate()
    assert (said, waiting.returncode) == ("", 0), "it converted again"
    assert names_in(tmp_path) == ["any"]


def test_without_its_wheel_a_model_says_how_to_install_it(monkeypatch, tmp_path):
    def absent(_):
        raise wheels.PackageNotFoundError

    monkeypatch.setenv("MLXKV_HOME", str(tmp_path))
    monkeypatch.setattr(wheels, "distribution", absent)
    for name, module in models.WHEELS.items():
        with pytest.raises(ModelNotFoundError, match=module.INSTALL):
            lm.load(name)
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_without_its_file_is_to_be_installed_again(monkeypatch):
    monkeypatch.setattr(wheels, "distribution", lambda _: SimpleNamespace(files=[]))
    for module in models.WHEELS.values():
        with pytest.raises(ModelNotFoundError, match=f"reinstall it: {module.INSTALL}"):
            module.find_gguf()


def test_doctor_says_of_each_whether_it_can_be_loaded_here(says, tmp_path, monkeypatch):
    def absent():
        raise ModelNotFoundError("none")

    monkeypatch.setenv("MLXKV_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "find_gguf", absent)
    monkeypatch.setattr(gemma3, "find_gguf", lambda: [])
    rows = {row["check"]: row for row in says("doctor")}
    assert (rows[smollm2.NAME]["status"], rows[smollm2.NAME]["advice"]) == ("missing", smollm2.INSTALL)
    assert rows[gemma3.NAME]["status"] == "ok"
    assert "first loaded" in rows[gemma3.NAME]["found"]
    wheels.convert_once(gemma3.NAME, "", lambda work: (work / "config.json").write_text("{}"))
    rows = {row["check"]: row for row in says("doctor")}
    assert rows[gemma3.NAME]["found"] == str(tmp_path / gemma3.NAME)


@pytest.mark.parametrize("name", models.WHEELS)
def test_a_name_that_is_nearly_one_is_told_so_and_any_other_hears_of_both(name, capsys):
    assert run("dump", "--model", name[:-1], "--prompt", "a", "--out", "x") == 2
    assert f"did you mean {name}?" in capsys.readouterr().err
    assert run("dump", "--model", "nothing-like-it", "--prompt", "a", "--out", "x") == 2
    assert name in capsys.readouterr().err

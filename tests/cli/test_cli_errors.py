"""What a command says when it cannot: plain words and a hint for people, one JSON object for programs."""

import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from conftest import run
from synthetic import toy_dump

from mlxkv.cli import _work
from mlxkv.dump import write_dump

MISTAKES = {
    "InputError": (["inspect", "{tmp}/none"], 2),
    "PresetError": (["generate", "--model", "any", "--cache", "int9", "--prompt", "a"], 2),
    "ModelNotFoundError": (["dump", "--model", "{tmp}/none", "--prompt", "a", "--out", "{tmp}/x"], 2),
    "FormatError": (["inspect", "{tmp}/damaged.npz"], 3),
    "no option": (["inspect", "{tmp}/none", "--jsn"], 2),
    "no value": (["inspect", "{tmp}/none", "--json", "--foo"], 2),
    "missing": (["compress", "--npz", "x"], 2),
    "bad value": (["dump", "--model", "x", "--out", "x", "--max-tokens", "many"], 2),
    "bad choice": (["eval", "fidelity", "--model", "x", "--dtype", "int3"], 2),
    "bad list": (["eval", "needle", "--model", "x", "--lengths", "a"], 2),
    "no command": (["comprss"], 2),
    "no evaluation": (["eval", "fidelty", "--model", "x"], 2),
    "both names": (["compress", "--recent", "1", "--w", "2"], 2),
}


@pytest.fixture
def words(request, tmp_path):
    (tmp_path / "damaged.npz").write_bytes(b"PK\3\4" + bytes(40))
    given, code = MISTAKES[request.param]
    return [word.format(tmp=tmp_path) for word in given], code


@pytest.mark.parametrize("words", MISTAKES, indirect=True)
def test_an_error_under_json_is_one_object_with_its_exit_code(words, capsys):
    given, code = words
    assert run(*given, "--json") == code
    out, err = capsys.readouterr()
    failure = json.loads(out)
    assert list(failure) == ["error", "kind", "code", "hint"]
    assert failure["code"] == code
    assert failure["error"] in err  # people see it, too
    assert failure["hint"] is None or failure["hint"] in err


@pytest.mark.parametrize("words", MISTAKES, indirect=True)
def test_an_error_without_json_leaves_standard_output_empty(words, capsys):
    given, code = words
    assert run(*[word for word in given if word != "--json"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert not any(art in err for art in ("╭", "Traceback", "Usage:"))


def test_json_as_the_value_of_an_option_asks_for_no_json(tmp_path, capsys):
    assert run("generate", tmp_path / "none", "--model", "any", "--prompt", "--json") == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        (["dump", "--modle", "x"], "did you mean --model?"),
        (["comprss"], "did you mean compress"),
        (["eval", "fidelty"], "did you mean fidelity?"),
        (["compress"], "mlxkv compress --help explains it"),
        (["compress", "--out"], "mlxkv compress --help explains it"),
        (["--json", "inspect"], "options of a command come after it"),
        (["inspect", "a", "b"], "more words than the command takes"),
    ],
)
def test_a_wrong_command_line_is_told_what_is_near(given, hint, capsys):
    assert run(*given) == 2
    assert hint in capsys.readouterr().err


def test_ctrl_c_says_what_was_being_done(monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlxkv.lm.load", stopped)
    words = ["generate", "--model", "some-model", "--cache", "int8", "--prompt", "a"]
    assert run(*words, "--json") == 130
    out, err = capsys.readouterr()
    assert "error: interrupted while loading some-model" in err
    assert json.loads(out) == {
        "error": "interrupted while loading some-model",
        "kind": "Interrupted",
        "code": 130,
        "hint": None,
    }


def test_what_was_done_in_time_is_not_said_to_be_interrupted():
    _work.begin()
    with _work.working("loading a"):
        pass
    assert _work.interrupted()[0] == "interrupted"
    with pytest.raises(KeyboardInterrupt), _work.working("writing b", "b is as it was"), _work.working("counting"):
        raise KeyboardInterrupt
    assert _work.interrupted() == ("interrupted while counting", "b is as it was")
    _work.begin()


def test_ctrl_c_says_what_is_left_of_a_file(monkeypatch, tmp_path, capsys):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlxkv.lm.load", stopped)
    out = tmp_path / "x.npz"
    assert run("dump", "--model", "some-model", "--prompt", "a", "--out", out) == 130
    error = " ".join(capsys.readouterr().err.split())
    assert error == f"error: interrupted while loading some-model {out} was not written"
    assert not out.exists()


def test_ctrl_c_leaves_the_artifacts_that_were_to_be_replaced(monkeypatch, tmp_path, capsys):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlxkv.codec.calibrate.calibrate", stopped)
    monkeypatch.setattr("mlxkv.codec.artifacts.check_artifacts_folder", lambda *_: None)
    write_dump(tmp_path / "a.npz", toy_dump(length=20))
    words = ["calibrate", "--npz", tmp_path / "a.npz", "--method", "kvtc-4", "--overwrite", "--out", tmp_path / "new"]
    assert run(*words) == 130
    assert f"no artifacts were written to {tmp_path / 'new'}" in capsys.readouterr().err
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "meta.json").write_text("{}")
    assert run(*words) == 130
    assert f"the artifacts in {tmp_path / 'new'} are as they were" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["eval"]])
def test_without_a_command_the_help_is_printed_once(words, capsys):
    assert run(*words) == 2
    assert capsys.readouterr().out.count("Usage: mlxkv") == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--target-kl", "0.1"], "--target-kl needs --model"),
        (["--model", "any"], "--model is for --target-kl"),
        (["--quality", "3", "--model", "any"], "--model is for --target-kl"),
        (["--append", "--target-ratio", "9"], "--append takes no target"),
    ],
)
def test_options_that_do_not_go_together_are_told_one_thing(given, message, capsys):
    assert run("compress", "--npz", "a", "--artifacts", "b", "--out", "c", *given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_to_append_there_has_to_be_a_file(tmp_path, capsys):
    assert run("compress", "--npz", "a", "--artifacts", "b", "--out", str(tmp_path / "c"), "--append", "--json") == 2
    said = json.loads(capsys.readouterr().out)
    assert "to append to" in said["error"]
    assert said["hint"] == "Leave out --append for the first part of a conversation."


@pytest.mark.slow
def test_a_reader_that_stops_gets_no_traceback():
    command = f"{sys.executable} -m mlxkv --help | head -c 10"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.stderr, len(done.stdout)) == ("", 10)


def test_a_command_without_an_output_gets_no_traceback(monkeypatch):
    for name in ("stdout", "stderr"):  # as Python has it after >&- and 2>&-
        monkeypatch.setattr(sys, name, None)
    codes = [run("inspect", "none", "--json"), run("--version")]
    sys.stdout.close()
    sys.stderr.close()
    assert codes == [2, 0]


@pytest.mark.slow
def test_a_package_that_lies_in_the_current_folder_is_not_loaded(tmp_path):
    info = tmp_path / "stray-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stray\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mlxkv.commands]\nstray = stray\n")
    (tmp_path / "stray.py").write_text("open('loaded', 'w')\n")
    default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-m", "mlxkv", "inspect", "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, preexec_fn=default)
    assert done.returncode == 0
    assert not (tmp_path / "loaded").exists()


def test_the_extra_for_evaluations_is_named_alike_everywhere(monkeypatch):
    from mlxkv.errors import MlxkvError
    from mlxkv.evaluate.optional import import_optional

    with pytest.raises(MlxkvError) as raised:
        import_optional("no_such_package")
    assert raised.value.hint == 'pip install "mlxkv[eval]"'
    root = Path(__file__).parents[2]
    texts = [path.read_text() for path in (root / "README.md", *(root / "docs").glob("*.md"))]
    assert {found for text in texts for found in re.findall(r'pip install [^`\n]*\[eval\]"?', text)} == {
        raised.value.hint
    }

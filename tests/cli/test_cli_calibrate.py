"""mlxkv calibrate --model: one command to artifacts that the other commands find."""

import json

import pytest
from conftest import run

from mlxkv.calibration import run as calibration_run
from mlxkv.calibration import training
from mlxkv.cli._output import format_value

WORDS = "The cache of a model keeps the keys and the values of every token that it has read so far. "


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXKV_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLXKV_ARTIFACTS", raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(training, "has_own_process", lambda config: False)  # a second each


@pytest.fixture
def notes(tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.md").write_text(f"# Note {number}\n\n" + WORDS * (4 + number))
    return folder


def test_after_it_a_text_is_compressed_and_read_back_without_naming_artifacts(says, model_dir, notes, tmp_path):
    learnt = says("calibrate", "--model", model_dir, "--text", notes)
    assert [row["quality"] for row in learnt["measured"]] == [25, 35, 45]
    assert learnt["calibration_tokens"] > 500
    file = tmp_path / "a.mlxkv"
    says("compress", "--model", model_dir, "--prompt-file", notes / "1.md", "--out", file)
    assert says("inspect", file)["artifacts"] == learnt["fingerprint"]
    assert says("inspect", learnt["folder"])["measured"] == learnt["measured"]
    says("decompress", file, "--out", tmp_path / "back.npz")


def test_artifacts_of_dumps_are_found_as_well(says, model_dir, notes, tmp_path):
    says("dump", "--model", model_dir, "--prompt-file", notes / "2.md", "--out", tmp_path / "a.npz")
    learnt = says("calibrate", "--npz", tmp_path / "a.npz", "--method", "kvtc-4")
    says("compress", "--model", model_dir, "--prompt-file", notes / "1.md", "--out", tmp_path / "a.mlxkv")
    assert says("inspect", tmp_path / "a.mlxkv")["artifacts"] == learnt["fingerprint"]


def test_people_read_a_table_and_what_to_do_next(model_dir, notes, tmp_path, capsys):
    out = tmp_path / "artifacts"
    assert (
        run("calibrate", "--model", model_dir, "--text", notes / "0.md", notes / "1.md", notes / "2.md", "--out", out)
        == 0
    )
    said = capsys.readouterr()
    assert "Held out" in said.out
    assert "worst kind" in said.out
    assert "GB of memory" in said.err
    assert "next: mlxkv compress" in said.err
    kept = json.loads((out / "meta.json").read_text())["measured"]
    assert format_value("ratio", kept[1]["ratio"]) in said.out


def test_an_interruption_says_how_to_go_on_and_the_same_command_does(model_dir, notes, monkeypatch, capsys, says):
    really = calibration_run.Calibration._dump

    def interrupted(self, stretch, index):
        if index == 1:
            raise KeyboardInterrupt
        return really(self, stretch, index)

    monkeypatch.setattr(calibration_run.Calibration, "_dump", interrupted)
    assert run("calibrate", "--model", model_dir, "--text", notes) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    run_again = []
    monkeypatch.setattr(
        calibration_run.Calibration, "_dump", lambda self, *given: run_again.append(given[1]) or really(self, *given)
    )
    says("calibrate", "--model", model_dir, "--text", notes)
    assert 0 not in run_again
    assert 1 in run_again


def test_ctrl_c_ends_learning_at_once_and_the_same_command_goes_on(model_dir, notes, monkeypatch, capsys, says):
    processes = []

    def interrupted(self):
        processes.append(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "has_own_process", lambda config: True)
        patch.setattr(training.Training, "steps", interrupted)
        assert run("calibrate", "--model", model_dir, "--text", notes) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert processes[0].ended()
    dumped = []
    monkeypatch.setattr(calibration_run.Calibration, "_dump", lambda self, *given: dumped.append(given))
    assert says("calibrate", "--model", model_dir, "--text", notes)["method"] == "kvtc-rd"
    assert dumped == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "give either --model or --npz"),
        (["--model", "m", "--npz", "a.npz"], "give either --model or --npz"),
        (["--npz", "a.npz", "--text", "b", "--out", "c"], "go with --model"),
        (["--npz", "a.npz", "--budget-minutes", "2", "--out", "c"], "go with --model"),
        (["--model", "m", "--text", "missing.txt"], "missing.txt"),
        (["--model", "m", "--method", "direct"], "direct needs no calibration"),
        (["--model", "smollm2-135m", "--budget-minutes", "0"], "minutes above 0"),
        (["--model", "m", "--method", "kvtc-16", "--compression-ratio", "3"], "--compression-ratio or --method"),
    ],
)
def test_wrong_use_is_told_before_any_work(words, told, capsys):
    assert run("calibrate", *words) == 2
    assert told in capsys.readouterr().err

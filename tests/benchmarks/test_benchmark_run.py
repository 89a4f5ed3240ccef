"""Running experiments: what there is, what is settled, and what a result file looks like."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import run, schema
from benchmarks.schema import EXPERIMENTS, RESULTS, Outcome, to_json, write_result

ROOT = Path(__file__).parents[2]
STUDIES = (ROOT / "benchmarks" / "STUDIES.md").read_text(encoding="utf-8")


def test_every_file_of_the_folder_is_an_experiment():
    assert set(run.phases()) == {path.stem for path in EXPERIMENTS.glob("*.py")} - {"__init__"}


@pytest.mark.parametrize("words", [["cr_sweep"], ["--phase", "5"], ["needle", "dp_speed", "--quick"]])
def test_a_settled_study_is_refused_with_how_to_run_it_again(words, capsys, monkeypatch):
    monkeypatch.setattr(run, "one", lambda *_: pytest.fail("it ran"))
    monkeypatch.setattr(run, "several", lambda *_: pytest.fail("it ran"))
    with pytest.raises(SystemExit) as exit_info:
        run.main(words)
    assert exit_info.value.code == 2
    assert f"git worktree add ../mlxkv-studies {run.TAG}" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("words", [["nonsense"], []])
def test_what_does_not_exist_is_refused(words, capsys):
    with pytest.raises(SystemExit) as exit_info:
        run.main(words)
    assert exit_info.value.code == 2
    assert "experiment" in capsys.readouterr().err


def test_a_chapter_and_all_are_what_they_say(monkeypatch):
    ran = []
    monkeypatch.setattr(run, "several", lambda names, quick, model: ran.append((names, quick, model)) or 0)
    for words in (["--phase", "8"], ["--all", "--quick"]):
        with pytest.raises(SystemExit):
            run.main(words)
    assert ran[0] == ([name for name, phase in run.phases().items() if phase == 8], False, schema.MODEL)
    assert ran[1] == (list(run.phases()), True, schema.MODEL)


def test_on_another_model_all_are_those_that_run_on_it(monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(run, "several", lambda *arguments: ran.append(arguments) or 0)
    with pytest.raises(SystemExit):
        run.main(["--all", "--model", "gemma3-270m"])
    assert ran == [
        (
            [
                "live_methods",
                "low_bytes",
                "needle",
                "calibration_tokens",
                "one_command",
                "rate_distortion",
                "uncalibrated",
                "codec_speed",
                "store",
            ],
            False,
            "gemma3-270m",
        )
    ]
    for words, said in (
        (["ruler", "--model", "gemma3-270m"], "only on smollm2-135m"),
        (["needle", "--model", "x"], "choose"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            run.main(words)
        assert exit_info.value.code == 2
        assert said in capsys.readouterr().err


def test_a_result_on_another_model_has_its_own_name_beside_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(schema, "RESULTS", tmp_path)
    monkeypatch.setattr(
        run, "import_module", lambda _: SimpleNamespace(run=lambda quick, model="m": Outcome({}, [], model))
    )
    assert run.one("needle", False) == run.one("needle", False, "gemma3-270m") == 0
    found = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert {name: (result["benchmark"], result["summary"]) for name, result in found.items()} == {
        "needle.json": ("needle", "m"),
        "needle_gemma.json": ("needle_gemma", "gemma3-270m"),
    }


@pytest.mark.parametrize("name", run.STUDIES)
def test_a_settled_study_has_its_report_and_its_result(name):
    assert f"`python -m benchmarks.run {name}`" in STUDIES
    assert (RESULTS / f"{name}.json").is_file()
    assert name not in run.phases()


def test_a_result_has_a_record_a_line_and_its_samples_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(schema, "RESULTS", tmp_path)
    monkeypatch.setattr(schema, "QUICK", tmp_path / "quick")
    summary = {"rows": [{"a": 1, "b": [1, 2]}, {"a": 2, "b": []}], "p": {"x": 0.5}}
    for quick in (False, True):
        path = write_result("any", Outcome({"seed": 0}, [{"x": 1}, {"x": 2}], summary), 1.26, quick)
        lines = path.read_text().splitlines()
        assert '   {"a":1,"b":[1,2]},' in lines
        assert '  "p": {"x":0.5}' in lines
        assert len(lines) == 15
        found = schema.read_result("any", quick=True)
        assert (found["summary"], found["config"], found["seconds"]) == (summary, {"seed": 0}, 1.3)
        assert "samples" not in found
        assert json.loads((path.parent / "samples" / "any.json").read_text())["samples"] == [{"x": 1}, {"x": 2}]
    assert schema.read_result("any")["quick"] is False


def test_without_a_full_result_a_quick_one_counts_only_where_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(schema, "RESULTS", tmp_path)
    monkeypatch.setattr(schema, "QUICK", tmp_path / "quick")
    write_result("any", Outcome({}, [], [1]), 1, quick=True)
    assert schema.read_result("any") is None
    assert schema.read_result("any", quick=True)["quick"] is True


def test_committed_results_are_summaries_as_they_are_written():
    for path in RESULTS.glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        assert result["benchmark"] == path.stem
        assert "samples" not in result, path.name
        assert path.read_text(encoding="utf-8") == to_json(result), path.name


def test_samples_quick_results_and_the_page_are_not_in_git():
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    listed = subprocess.run(["git", "ls-files", "benchmarks"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = listed.stdout.split()
    assert "benchmarks/run.py" in names
    assert not [name for name in names if "/quick/" in name or "/samples/" in name or name.endswith(".html")]


def test_nothing_of_the_library_is_patched_but_metal_where_there_is_none():
    for path in {*(ROOT / "benchmarks").rglob("*.py")} - {ROOT / "benchmarks" / "stubs.py"}:
        text = path.read_text(encoding="utf-8")
        assert not [word for word in ("mock", "setattr(", "monkeypatch") if word in text], path.name

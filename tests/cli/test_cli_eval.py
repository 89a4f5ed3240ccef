"""`mlxkv eval` as its users run it: tables, help, and a run that is killed and goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import mlx.core as mx
import pytest
from conftest import run

from mlxkv.evaluate import evaluations, machine
from mlxkv.evaluate.journal import Journal

NEEDLE = [
    "eval",
    "needle",
    "--lengths",
    "100,120",
    "--depths",
    "0.1,0.5,0.9",
    "--seeds",
    "3",
    "--cache",
    "int8",
]


def test_every_evaluation_has_help_with_an_example_and_its_own_options(capsys):
    assert run("eval", "--help") == 0
    out = capsys.readouterr().out
    for name in evaluations.names():
        assert f" {name} " in out
        assert run("eval", name, "--help") == 0
        own = " ".join(capsys.readouterr().out.split())
        assert f"Example: mlxkv eval {name} " in own
        assert "--limit" in own
        for field in evaluations.get(name).options_class.__dataclass_fields__:
            assert f"--{field.replace('_', '-')}" in own, (name, field)
    assert run("eval", "nonsense", "--model", "any") == 2


def test_a_table_has_a_row_for_each_variant_with_its_deviation_over_seeds(model_dir, capsys):
    assert run(*NEEDLE, "--model", model_dir) == 0
    out = capsys.readouterr().out
    assert "whole" in out
    assert "int8" in out
    assert "±" in out
    assert "18 samples; p: of a difference in found" in " ".join(out.split())


@pytest.mark.slow
def test_tasks_have_rows_of_their_own_under_the_same_heads(model_dir, capsys):
    words = ["--tasks", "fwe,vt", "--lengths", "3000", "--samples", "1", "--cache", "sliding-window-256"]
    assert run("eval", "ruler", "--model", model_dir, *words) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("┃", "│"))]
    assert len({line.count("┃") + line.count("│") for line in lines}) == 1
    rows = [[cell.strip() for cell in line.split("│")[1:3]] for line in lines if line.startswith("│")]
    assert ["whole", "all"] in rows
    assert ["whole", "fwe"] in rows


def test_a_single_sample_has_no_p_and_numbers_have_their_own_units(model_dir, capsys):
    words = ["--context", "64", "--tokens", "2", "--rounds", "1", "--cache", "int8"]
    assert run("eval", "latency", "--model", model_dir, *words) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert "1 sample" in " ".join(out.split())
    heads = " ".join(" ".join(line.split("┃")) for line in lines if line.startswith("┃")).split()
    assert "p" not in heads
    assert [line for line in lines if " ms " in line]


def test_samples_of_a_text_that_has_changed_are_not_gone_on_with(model_dir, tmp_path, monkeypatch, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "out.json"
    words = [
        "eval",
        "perplexity",
        "--model",
        model_dir,
        "--text-file",
        text,
        "--context-tokens",
        50,
        "--eval-tokens",
        20,
        "--out",
        out,
    ]
    text.write_text("A cache that forgets nothing is a memory. " * 20)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("mlxkv.io.atomic.atomic_write", killed)
        assert run(*words) == 130
    text.write_text("One that forgets the right things understands. " * 20)
    capsys.readouterr()
    assert run(*words) == 4
    assert "another files; remove it" in " ".join(capsys.readouterr().err.split())
    text.write_text("A cache that forgets nothing is a memory. " * 20)
    assert run(*words) == 0


def test_samples_of_a_folder_that_has_changed_are_not_gone_on_with(model_dir, tmp_path, monkeypatch, capsys):
    essays = tmp_path / "essays"
    essays.mkdir()
    (essays / "a.txt").write_text("A cache that forgets nothing is a memory. " * 20)
    words = [
        "eval",
        "needle",
        "--model",
        model_dir,
        "--essays",
        essays,
        "--lengths",
        120,
        "--depths",
        "0.5",
        "--out",
        tmp_path / "o",
    ]

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("mlxkv.io.atomic.atomic_write", killed)
        assert run(*words) == 130
    (essays / "a.txt").write_text("One that forgets the right things understands. " * 20)
    capsys.readouterr()
    assert run(*words) == 4
    assert "another files; remove it" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("seeds", "shown"), [(1, False), (2, True)])
def test_p_is_shown_where_it_can_say_something(seeds, shown, model_dir, capsys):
    words = ["--lengths", "100", "--depths", "0.1,0.5,0.9", "--seeds", seeds, "--cache", "int8"]
    assert run("eval", "needle", "--model", model_dir, *words) == 0
    out, err = capsys.readouterr()
    assert f"{3 * seeds} samples" in " ".join(out.split())
    assert ("p: of a difference" in " ".join(out.split())) == shown
    assert ("3 samples cannot show a difference at p < 0.05; 6 or more can" in err) != shown


def test_the_untouched_caches_ratio_on_a_cpu_is_explained(model_dir, capsys):
    words = ["--lengths", "100", "--depths", "0.5", "--cache", "int8"]
    assert run("eval", "needle", "--model", model_dir, *words) == 0
    out, err = capsys.readouterr()
    whole = next(line for line in out.splitlines() if " whole " in line)
    on_a_cpu = mx.default_device() == mx.cpu
    assert (float(whole.split("│")[2].strip(" x")) <= 0.5) == on_a_cpu
    assert ("on a CPU the untouched cache holds float32" in err) == on_a_cpu


@pytest.mark.parametrize("words", [["--lengths", "a"], ["--depths", "0.5,x"]])
def test_a_list_that_is_none_is_a_usage_error(words, capsys):
    assert run("eval", "needle", "--model", "any", *words) == 2
    assert "Invalid value" in capsys.readouterr().err


def test_a_second_run_with_the_same_result_is_refused_before_it_loads_anything(tmp_path, capsys):
    out = tmp_path / "out.json"
    with Journal(tmp_path / "out.json.partial", {}):
        assert run(*NEEDLE, "--model", tmp_path / "absent", "--out", out) == 2
    assert "another run is writing" in " ".join(capsys.readouterr().err.split())
    assert run(*NEEDLE, "--model", tmp_path / "absent", "--out", out) != 0
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has one")
@pytest.mark.parametrize(
    "words", [["presets"], ["presets", "--json"], ["--version"], ["--help"], ["eval", "needle", "--help"]], ids=" ".join
)
def test_output_that_does_not_fit_on_the_disk_is_told_in_one_line(words, capsys, monkeypatch):
    with monkeypatch.context() as patch, open("/dev/full", "w") as full:
        patch.setattr(sys, "stdout", full)
        assert run(*words) == 1
    error = capsys.readouterr().err.strip()
    assert error == "error: cannot write the output: [Errno 28] No space left on device"


def started(model_dir, out):
    command = [sys.executable, "-m", "mlxkv", *NEEDLE, "--model", str(model_dir), "--out", str(out)]
    # A background job may have inherited an ignored SIGINT.
    default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=default)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_stopped_goes_on_and_ends_as_one_that_was_not(stop, model_dir, tmp_path, says, monkeypatch):
    out, partial_file = tmp_path / "needle.json", tmp_path / "needle.json.partial"
    with started(model_dir, out) as process:
        while process.poll() is None and not (partial_file.exists() and partial_file.read_bytes().count(b"\n") > 3):
            time.sleep(0.002)
        process.send_signal(stop)
        _, error = process.communicate(timeout=30)
    assert not out.exists()
    assert "Traceback" not in error
    if stop == signal.SIGINT:
        assert process.returncode == 130
        assert "the same command goes on" in " ".join(error.split())
    finished = partial_file.read_bytes().count(b"\n") - 1
    assert 3 <= finished < 18
    assert run(*NEEDLE, "--model", model_dir, "--out", tmp_path / "needle.json", "--limit", 3) == 4
    with monkeypatch.context() as patch:
        patch.setattr(machine, "commit", lambda: "another commit's code")
        assert run(*NEEDLE, "--model", model_dir, "--out", out) == 4
    resumed = says(*NEEDLE, "--model", model_dir, "--out", out)
    assert os.listdir(tmp_path) == ["needle.json"]
    assert resumed == json.loads(out.read_text())
    assert resumed["samples"] == says(*NEEDLE, "--model", model_dir)["samples"]

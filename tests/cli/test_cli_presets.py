"""Names: what to choose, one explained, all of them; and the nearest ones where a name is wrong."""

import json
from pathlib import Path

import pytest
from conftest import run

from mlxkv.cli import presets
from mlxkv.cli._names import codec_names, family_names, live_names, model_names

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_presets_is_one_screen_that_says_what_to_choose(capsys):
    assert run("presets") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    for name in ("int8", "kvtc-rd", "--all", "--cache", "--method", "--preset"):
        assert any(name in line for line in lines)


def test_its_numbers_are_measured():
    fidelity = json.loads((RESULTS / "live_methods.json").read_text())["summary"]["fidelity"]
    measured = {row["variant"]: row for row in fidelity if row["model"] == "smollm2-135m"}
    measured |= {row["variant"]: row for row in json.loads((RESULTS / "kv_bits.json").read_text())["summary"]}
    for _, name, share, kl in presets.LIVE_CHOICES:
        assert measured[name]["share_of_fp16"] == pytest.approx(share, abs=0.006), name
        assert measured[name]["kl"] == pytest.approx(kl, rel=0.06), name
    long = json.loads((RESULTS / "rate_distortion.json").read_text())["summary"]["long"]
    for _, name, share, kl in presets.FILE_CHOICES:
        (row,) = [row for row in long[name] if row["at"] == 38]
        assert row["cache_bytes"] / row["fp16_bytes"] == pytest.approx(share, abs=0.001)
        assert row["kl"] == pytest.approx(kl, rel=0.06)


def test_all_names_are_listed_and_each_is_explained(capsys, says):
    assert run("presets", "--all") == 0
    out = capsys.readouterr().out
    names = [*live_names(), *codec_names(), *family_names()]
    assert [name for name in names if f" {name} " not in out] == []
    assert {row["preset"] for row in says("presets")} == set(names)


def test_one_preset_shows_what_it_changes_apart_from_the_methods_own_settings(capsys, says):
    row = says("presets", "kivi-4")
    assert row["changed"].items() <= row["settings"].items()
    assert row["changed"] == {"bits": 4}
    assert run("presets", "kivi-4") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "bits" in line]
    assert [line.split("│")[1].strip() for line in lines if "bits 4" in line] == ["changed"]


def test_a_preset_without_changes_shows_no_empty_lines(capsys):
    assert run("presets", "kvtc-rd") == 0
    assert "changed" not in capsys.readouterr().out


def test_a_name_that_is_a_preset_and_a_method_is_suggested_once(capsys):
    assert run("generate", "--model", "any", "--prompt", "a", "--cache", "int9") == 2
    assert "did you mean int8 or int4?" in capsys.readouterr().err


WRONG = [
    (["presets", "int9"], {"int8", "int4"}, {"kvtc-16", "h2o-256"}),
    (["generate", "--model", "any", "--prompt", "a", "--cache", "int9"], {"int8", "int4"}, {"kvtc-16", "h2o-256"}),
    (["generate", "--model", "any", "--prompt", "a", "--cache", "kvtc-32"], {"mlxkv presets --all"}, {"kvtc-16", "kvtc-4"}),
    (["eval", "fidelity", "--model", "any", "--cache", "h2o-255"], {"h2o-256"}, {"int8", "kvtc-16"}),
    (["calibrate", "--npz", "{npz}", "--out", "x", "--method", "kvtc-61"], {"kvtc-16", "kvtc-rd"}, {"int8"}),
    (["calibrate", "--npz", "{npz}", "--out", "x", "--method", "kvtc-4", "--preset", "qwen4"], {"qwen3"}, {"int8"}),
    (["dump", "--model", "any", "--prompt", "a", "--out", "x", "--preset", "lfm3"], {"lfm2"}, {"int8"}),
    (["dump", "--model", "smollm2-135", "--prompt", "a", "--out", "x"], {"smollm2-135m"}, {"qwen3"}),
    (["dump", "--model", "miniature/nothing", "--prompt", "a", "--out", "x"], {"no trained model"}, {"int8"}),
    (["eval", "fidelty"], {"did you mean fidelity?"}, {"needle"}),
    (["eval", "ruler", "--model", "any", "--tasks", "niah_singl_1"], {"did you mean niah_single_1"}, {"fwe"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "near", "far"), WRONG, ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else ""
)
def test_a_wrong_name_is_told_what_is_near_and_allowed(words, near, far, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.npz").write_bytes(b"PK\3\4")
    assert run(*(word.format(npz=tmp_path / "a.npz") for word in words)) == 2
    error = capsys.readouterr().err
    hint = error.partition("\n")[2] if near != {"no trained model"} else error
    assert all(name in hint for name in near), error
    assert not any(name in hint for name in far), error
    assert len(error) < 400


def test_a_wrong_lossless_coding_lists_the_few_there_are(capsys):
    from mlxkv.errors import suggest
    from mlxkv.io.lossless import CODINGS

    assert all(name in suggest("zip", CODINGS) for name in CODINGS)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["generate", "--cache", "int"], {"int4", "int8"}),
        (["eval", "fidelity", "--cache", "smartkv-0"], {"smartkv-0.3"}),
        (["calibrate", "--method", "kvtc"], {"kvtc-16", "kvtc-rd"}),
        (["dump", "--preset", "q"], {"qwen3"}),
        (["dump", "--model", "smol"], {"smollm2-135m"}),
        (["presets", "kivi"], {"kivi-2"}),
    ],
)
def test_names_are_completed(words, names, monkeypatch, capsys):
    monkeypatch.setenv("_MLXKV_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", " ".join(["mlxkv", *words]))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    run(*words)
    assert names <= set(capsys.readouterr().out.split())


def test_models_without_a_hub_are_named():
    assert "smollm2-135m" in model_names()

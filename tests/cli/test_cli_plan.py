"""mlxkv plan: a table with bars, notes and one JSON document; contexts and sizes as people write them."""

import json
import sys
from pathlib import Path

import pytest
from conftest import TINY, run

QWEN3_8B = str(Path(__file__).parents[1] / "fixtures" / "configs" / "qwen3-8b.json")


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", **TINY["llama"]}))
    return str(path)


def test_the_table_fits_80_columns_and_names_bytes_what_fits_and_the_loss(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run("plan", QWEN3_8B, "--context", "32K", "--memory", "32GB") == 0
    out = capsys.readouterr().out
    rows = {
        line.split()[0]: line.split() for line in out.splitlines() if line.startswith(" ") and len(line.split()) > 3
    }
    assert rows["fp16"] == ["fp16", "4.83", "1.00", "█" * 8, "yes", "33,500", "0"]
    assert rows["int4"][1:3] == ["1.33", "0.27"]
    assert rows["h2o-1024"][-2:] == ["any", "-"]
    assert max(map(len, out.split("KL: how far")[0].split("\n\n", 1)[1].splitlines())) <= 80
    assert "…" not in out
    assert "smollm2-135m, 1,024 tokens" in out
    assert "bounded number of tokens" in out
    assert "21.33 GB are for weights and cache" in out


def test_of_presets_that_stop_growing_the_largest_is_shown_and_with_all_every_one(capsys):
    assert run("plan", QWEN3_8B, "--context", "32K") == 0
    short = capsys.readouterr().out
    assert run("plan", QWEN3_8B, "--context", "32K", "--all") == 0
    long = capsys.readouterr().out
    assert "h2o-1024" in short
    assert "h2o-96" not in short
    assert " full " not in short
    assert "fits" not in short
    assert all(name in long for name in ("h2o-1024", "h2o-96", " full "))


@pytest.mark.parametrize(
    ("written", "tokens"), [("32K", 32768), ("128k", 131072), ("1M", 1048576), ("4096", 4096), ("32,768", 32768)]
)
def test_contexts_are_read_as_people_write_them(written, tokens, tiny, says):
    found = says("plan", tiny, "--context", written, "--batch", "2")
    assert (found["context"], found["batch"], found["model"]) == (tokens, 2, tiny)


def test_json_is_one_document_with_every_preset(tiny, says):
    found = says("plan", tiny, "--context", "1K", "--memory", "16GB")
    rows = {row["cache"]: row for row in found["caches"]}
    assert rows["fp16"]["bytes"] == 2 * 2 * 2 * 8 * 2 * 1024
    assert rows["h2o-96"]["fits"] is True
    assert rows["int8"]["kl"] == rows["int8"]["measurement"]["kl"] > 0
    assert found["usable_bytes"] == 16 * 10**9 * 2 // 3
    assert found["layers"] == [{"layers": 2, "window": None, "keys": [2, 8], "values": [2, 8]}]


@pytest.mark.parametrize("context", ["0", "-1", "many", "32 K tokens", "1.5K", "17M", "99999999999"])
def test_a_context_that_is_none_is_refused(context, tiny, capsys):
    assert run("plan", tiny, f"--context={context}") == 2
    assert "context" in capsys.readouterr().err


def test_weights_that_do_not_fit_alone_are_named_with_what_to_do(tmp_path, capsys):
    sizes = {"8GB": "in 4 bits they take about 4.61 GB", "4GB": "do not fit\n", "32GB": ""}
    for memory, said in sizes.items():
        assert run("plan", QWEN3_8B, "--context", "32K", "--memory", memory) == 0
        out = capsys.readouterr().out
        assert said in out
        assert ("the weights alone do not fit" in out) == bool(said)


def test_a_folder_that_is_of_no_model_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("plan", ".", "--context", "1K") == 2
    assert f"{tmp_path} is no folder of a model" in capsys.readouterr().err


@pytest.mark.parametrize("memory", ["lots", "32 GBs", "0", "-5GB", "9999999TB", "16"])
def test_a_memory_that_is_none_is_refused(memory, tiny, capsys):
    assert run("plan", tiny, "--context", "1K", f"--memory={memory}") == 2
    assert "memory" in capsys.readouterr().err


def test_an_unknown_model_and_an_unknown_type_name_near_ones(tiny, capsys):
    assert run("plan", "smollm2-135", "--context", "1K") == 2
    assert "smollm2-135m" in capsys.readouterr().err
    Path(tiny).write_text('{"model_type": "qwen33"}')
    assert run("plan", tiny, "--context", "1K") == 5
    assert "qwen3" in capsys.readouterr().err


def test_a_method_that_a_model_does_not_take_is_named_with_the_reason(tiny, capsys):
    Path(tiny).write_text(json.dumps({"model_type": "gemma2", **TINY["llama"], "head_dim": 8}))
    assert run("plan", tiny, "--context", "1K") == 0
    out = capsys.readouterr().out
    assert "h2o-1024" in out.rsplit("\n\n", 1)[-1]
    assert "outside of mlx-lm's attention function" in out


def test_a_name_of_a_file_cannot_write_to_the_terminal(tmp_path, capsys):
    path = tmp_path / "a\x1b[31mb.json"
    path.write_text(json.dumps({"model_type": "llama", **TINY["llama"]}))
    assert run("plan", str(path), "--context", "64") == 0
    assert "\x1b" not in capsys.readouterr().out


def test_where_mlx_lm_is_imported_already_it_stays_as_it_is():
    import mlx_lm

    from mlxkv.cli._deferred import defer_mlx_lm

    defer_mlx_lm()
    assert sys.modules["mlx_lm"] is mlx_lm

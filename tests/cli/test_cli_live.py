import json

import mlx_lm
import pytest
from conftest import run, tiny_model, tiny_tokens

from mlxkv import lm, make_cache, presets, save_cache
from mlxkv.live import live_methods

TEXT = "The quick brown fox jumps over the lazy dog. Once upon a time in a land far away, nothing happened. "


@pytest.fixture
def text_file(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 3)
    return tmp_path / "text.txt"


@pytest.mark.parametrize("model_dir", ["llama", "lfm2", "glm4_moe_lite", "gpt2"], indirect=True)
def test_generate_says_what_mlx_lm_says_with_the_same_live_cache(model_dir, says):
    model, tokenizer = lm.load(str(model_dir))
    cache = make_cache(model, "streaming-llm-256")
    expected = mlx_lm.generate(model, tokenizer, TEXT * 3, max_tokens=12, prompt_cache=cache)
    options = ["--model", model_dir, "--prompt", TEXT * 3, "--max-tokens", 12]
    record = says("generate", "--cache", "streaming-llm-256", *options)
    assert record["text"] == expected
    assert record["prompt_tokens"] == 3 * len(TEXT)
    assert record["generated_tokens"] == 12
    assert record["cache_bytes"] == sum(layer.nbytes for layer in cache) > 0
    assert record["ratio"] == record["fp16_bytes"] / record["cache_bytes"]


def test_on_a_terminal_the_last_line_of_generate_breaks_between_words(model_dir, monkeypatch, capsys):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "40")
    assert run("generate", "--model", model_dir, "--cache", "int8", "--prompt", TEXT, "--max-tokens", 2) == 0
    facts = capsys.readouterr().out.partition("\n\n")[2].splitlines()
    assert len(facts) > 2
    assert max(map(len, facts)) <= 40


def test_generate_streams_the_text_and_ends_in_one_line(model_dir, capsys):
    words = ["generate", "--model", model_dir, "--cache", "int8", "--prompt", TEXT, "--max-tokens", 5]
    assert run(*words, "--json") == 0
    text = json.loads(capsys.readouterr().out)["text"]
    assert run(*words) == 0
    out = capsys.readouterr().out
    assert out.startswith(text)
    (line,) = out[len(text) :].strip().splitlines()
    for fact in ("prompt tokens per second", "generated tokens 5", "tokens per second", "cache bytes", "ratio"):
        assert fact in line


def test_eval_writes_the_record_of_a_live_cache_that_it_prints(model_dir, text_file, tmp_path, says):
    options = ["--model", model_dir, "--text-file", text_file, "--context-tokens", 200, "--eval-tokens", 20]
    ways = ["--cache", "full", "--cache", "int4", "--cache", "sliding-window-256"]
    result = says("eval", "fidelity", *options, *ways, "--out", tmp_path / "record.json")
    assert result == json.loads((tmp_path / "record.json").read_text())
    whole, full, int4, window = result["summary"]
    assert [row["variant"] for row in result["summary"]] == ["whole", "full", "int4", "sliding-window-256"]
    assert full["kl"] == pytest.approx(whole["kl"], abs=1e-5)
    assert int4["kl"] > 1e-4
    assert window["samples"] == 3
    assert result["variants"]["sliding-window-256"] == {"cache": "sliding-window-256", "recent": 256}
    assert {"ratio", "cache_bytes", "top1_agreement", "perplexity_delta"} <= set(result["samples"][2])


def test_presets_lists_what_cache_takes_with_methods_and_settings(says, capsys):
    rows = {row["preset"]: row for row in says("presets")}
    live = {name for name, row in rows.items() if row["option"] == "--cache"}
    assert live - set(presets.preset_names("methods")) <= set(live_methods.names()) <= live
    assert {rows[name]["method"] for name in live} <= set(live_methods.names())
    assert {rows[name]["option"] for name in presets.preset_names("methods") if name not in live} == {"--method"}
    assert rows["h2o-512"]["method"] == "h2o"
    assert rows["h2o-512"]["settings"] == {"heavy": 256, "recent": 256}
    assert rows["qwen3"]["model_types"] == ["qwen3", "qwen3_moe"]
    assert run("presets", "h2o-512") == 0
    assert "heavy 256" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "{text}", "--cache", "int8", "--prompt", "a"], "either the FILE"),
        (["generate", "--cache", "int8", "--artifacts", "{tmp}", "--prompt", "a"], "--artifacts belongs to"),
        (["generate", "--cache", "int9", "--prompt", "a"], "no preset or live method 'int9'"),
        (["generate", "--cache", "kvtc-16", "--prompt", "a"], "not a live method"),
        (["eval", "fidelity", "--artifacts", "{tmp}/none", "--cache", "int8"], "there is no such folder"),
        (["eval", "fidelity", "--cache", "int9"], "no preset or live method 'int9'"),
        (["eval", "fidelity", "--cache", "kvtc-16"], "not a live method"),
        (["eval", "fidelity", "--cache", "int8", "--recent", "128"], "--recent, --sinks and --dtype"),
        (["eval", "fidelity", "--cache", "int8", "--dtype", "float16"], "--recent, --sinks and --dtype"),
        (["eval", "fidelity", "--text-file", "{tmp}/none"], "cannot read"),
        (["eval", "fidelity", "--eval-tokens", "0"], "eval_tokens must be 1 or more"),
        (["eval", "needle", "--depths", "2"], "depths must lie in 0..1"),
        (["eval", "ruler", "--tasks", "niah"], "unknown RULER tasks niah"),
        (["eval", "longbench", "--folder", "{tmp}/none"], "cannot read"),
        (["eval", "fidelity", "--cache", "int8", "--out", "{tmp}"], "not a file name"),
    ],
)
def test_options_that_do_not_go_together_are_found_before_a_model_is_loaded(
    words, message, text_file, tmp_path, monkeypatch, capsys
):
    def expensive(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("mlxkv.lm.load", expensive)
    assert run(*(word.format(text=text_file, tmp=tmp_path) for word in words), "--model", "any") == 2
    assert message in capsys.readouterr().err


def test_an_empty_prompt_is_refused(model_dir, capsys):
    assert run("generate", "--model", model_dir, "--cache", "int8", "--prompt", "") == 2
    assert "no tokens" in capsys.readouterr().err


def test_inspect_explains_a_saved_live_cache(tmp_path, capsys):
    model = tiny_model("lfm2")
    cache = make_cache(model, "int8")
    lm.prefill(model, tiny_tokens(40), cache)
    save_cache(tmp_path / "x.cache", model, cache)
    assert run("inspect", tmp_path / "x.cache", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["method"], facts["tokens"], facts["live_layers"]) == ("live cache", "int8", 40, 2)

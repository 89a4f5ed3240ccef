"""generate and inspect on every file that holds a cache, and what they say of files that hold none."""

import json

import mlx.core as mx
import mlx_lm
import pytest
from conftest import run, save_model, tiny_config, tiny_model
from mlx_lm.models.cache import make_prompt_cache, save_prompt_cache
from zoo.build import build, configuration
from zoo.configurations import CONFIGURATIONS

from mlxkv import lm, make_cache, save_cache
from mlxkv.cli._output import format_value

TEXT = "The quick brown fox jumps over the lazy dog. Once upon a time in a land far away, nothing happened. "


@pytest.fixture(scope="module", params=["llama", "lfm2"])
def caches(request, tmp_path_factory):
    """A model, and the same text in a dump, a compressed file, a saved live cache and mlx-lm's own file."""
    folder = tmp_path_factory.mktemp("caches")
    model_dir = folder / "model"
    model_dir.mkdir()
    config = tiny_config(request.param, vocab_size=264)
    save_model(tiny_model(request.param, vocab_size=264), config, model_dir)
    assert run("dump", "--model", model_dir, "--prompt", TEXT * 3, "--out", folder / "a.npz") == 0
    assert run("calibrate", "--npz", folder / "a.npz", "--method", "kvtc-4", "--out", folder / "artifacts") == 0
    common = ["--npz", folder / "a.npz", "--artifacts", folder / "artifacts", "--recent", 32]
    assert run("compress", *common, "--out", folder / "a.mlxkv") == 0
    model, tokenizer = lm.load(str(model_dir))
    tokens = tokenizer.encode(TEXT * 3)
    live, plain = make_cache(model, "full"), make_prompt_cache(model)
    lm.prefill(model, tokens, live)
    lm.prefill(model, tokens, plain)
    save_cache(folder / "a.cache", model, live)
    save_prompt_cache(str(folder / "a.safetensors"), plain)
    expected = mlx_lm.generate(model, tokenizer, TEXT * 3 + "And then", max_tokens=12)
    return folder, model_dir, expected, len(tokens)


@pytest.mark.parametrize("name", ["a.npz", "a.cache", "a.safetensors"])
def test_generate_goes_on_from_every_exact_file_as_if_it_had_just_read_the_text(name, caches, says):
    folder, model, expected, tokens = caches
    record = says("generate", folder / name, "--model", model, "--prompt", "And then", "--max-tokens", 12)
    assert (record["text"], record["cached_tokens"]) == (expected, tokens)


@pytest.mark.parametrize("name", ["a.npz", "a.mlxkv", "a.cache", "a.safetensors", "artifacts"])
def test_inspect_explains_every_kind(name, caches, says, capsys):
    facts = says("inspect", caches[0] / name)
    kinds = {"npz": "dump", "mlxkv": "compressed cache", "cache": "live cache", "safetensors": "prompt cache of mlx-lm"}
    assert facts["kind"] == kinds.get(name.rpartition(".")[2] if "." in name else "", "artifacts")
    if name != "artifacts":
        assert facts["tokens"] == caches[3]
    assert run("inspect", caches[0] / name) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("name", ["a.npz", "a.mlxkv", "a.cache", "a.safetensors", "artifacts"])
def test_json_has_numbers_and_lists_as_such(name, caches, says):
    def check(value):
        if isinstance(value, dict):
            assert all(map(check, value.values()))
        elif isinstance(value, list):
            assert all(map(check, value))
        elif isinstance(value, str):
            assert not value.startswith(("(", "[", "{"))
            assert not value.isdigit() or len(value) == 16  # a fingerprint may be all digits
        return True

    assert check(says("inspect", caches[0] / name))


def test_a_prompt_cache_of_mlx_lm_is_said_to_name_no_weights(caches, capsys):
    folder, model, *_ = caches
    assert run("generate", folder / "a.safetensors", "--model", model, "--prompt", "a", "--max-tokens", 1) == 0
    assert "does not say of which weights it is" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.cache", "a.safetensors"])
def test_artifacts_are_refused_where_they_have_no_place(name, caches, capsys):
    folder, model, *_ = caches
    words = ["generate", folder / name, "--artifacts", folder / "artifacts", "--model", model, "--prompt", "a"]
    assert run(*words) == 2
    assert "takes no --artifacts" in capsys.readouterr().err


def test_artifacts_of_a_dump_are_compared_with_it(caches, tmp_path, capsys):
    folder, model, *_ = caches
    words = ["generate", folder / "a.npz", "--model", model, "--prompt", "a", "--max-tokens", 1, "--artifacts"]
    assert run(*words, folder / "artifacts") == 0
    assert "--artifacts is not needed" in capsys.readouterr().err
    (tmp_path / "model").mkdir()
    other = save_model(
        tiny_model("llama", seed=5, vocab_size=264), tiny_config("llama", vocab_size=264), tmp_path / "model"
    )
    assert run("dump", "--model", other, "--prompt", TEXT, "--out", tmp_path / "b.npz") == 0
    assert run("calibrate", "--npz", tmp_path / "b.npz", "--method", "kvtc-4", "--out", tmp_path / "b") == 0
    assert run(*words, tmp_path / "b") == 4
    assert "artifacts of another model" in capsys.readouterr().err
    assert run(*words, tmp_path / "none") == 2


FOREIGN = {
    "notes.txt": (b"A text, and no cache.\n" * 9, 2, "it looks like text"),
    "notes.md": ("Ein Text über nichts".encode(), 2, "it looks like text"),
    "page.mlxkv": (b"<html><body>404 Not Found</body></html>", 2, "it looks like text"),
    "picture.png": (b"\x89PNG\r\n\x1a\n" + bytes(100), 2, "is no file of mlxkv"),
    "empty.npz": (b"", 3, "is empty"),
    "damaged.npz": (b"PK\x03\x05" + bytes(100), 3, "it is damaged"),
    "damaged.mlxkv": (b"\x00" * 100, 3, "it is damaged"),
    "cut.npz": (b"PK\x03\x04" + bytes(100), 3, "not a readable .npz"),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("command", ["inspect", "generate", "calibrate", "decompress"])
def test_what_is_not_ours_is_told_from_what_is_damaged(command, name, tmp_path, capsys):
    content, code, message = FOREIGN[name]
    path = tmp_path / name
    path.write_bytes(content)
    words = {
        "inspect": [path],
        "generate": [path, "--model", tmp_path, "--prompt", "a"],
        "calibrate": ["--npz", path, "--method", "kvtc-4", "--out", tmp_path / "out"],
        "decompress": [path, "--artifacts", tmp_path, "--out", tmp_path / "out"],
    }
    if command == "decompress" and name == "cut.npz":
        code, message = 2, "a compressed cache is needed"
    assert run(command, *words[command]) == code
    assert message in capsys.readouterr().err


def test_weights_are_not_taken_for_a_prompt_cache(tmp_path, capsys):
    mx.save_safetensors(str(tmp_path / "w.safetensors"), {"w": mx.ones(3)}, {"format": "mlx"})
    assert run("inspect", tmp_path / "w.safetensors", "--json") == 2
    assert "is no prompt cache of mlx-lm" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("layers", list(range(30)), "0-29"),
        ("layers", [2, 5, 6, 7, 8, 14], "2, 5-8, 14"),
        ("layers", [0, 1], "0, 1"),
        ("layers", [], "-"),
        ("codings", ["deflate", "raw"], "deflate, raw"),
        ("k_shape", (30, 1, 3, 2048, 64), "30 x 1 x 3 x 2048 x 64"),
        ("caches", {"KVCache": 30}, "KVCache 30"),
        ("groups", {"layers": [0, 1, 2], "k_shape": (3, 1, 2, 12, 16)}, "layers 0-2; k_shape 3 x 1 x 2 x 12 x 16"),
        ("groups", {"window": None, "file_bytes": 5523}, "window -, file_bytes 5,523 B"),
        ("metadata", {"file_bytes": "many", "x": {"y": [1]}}, "file_bytes many, x {'y': [1]}"),
        ("file_bytes", "many", "many"),
        ("cache_bytes", 44032.0, "44,032 B"),
        ("file_bytes", 9_990_000_000, "9,990.00 MB"),
        ("limit_bytes", 2e10, "20.00 GB"),
        ("flag", True, "yes"),
    ],
)
def test_people_get_ranges_and_shapes(key, value, shown):
    assert format_value(key, value) == shown


@pytest.fixture
def saved_model(monkeypatch, tmp_path):
    """A tiny model of any type as a directory that the byte-level tokenizer fits."""

    def save(name):
        monkeypatch.setitem(CONFIGURATIONS, name, {**CONFIGURATIONS[name], "vocab_size": 264})
        (tmp_path / name).mkdir()
        return save_model(build(name), configuration(name), tmp_path / name)

    return save


@pytest.mark.parametrize("name", ["gemma3_text", "deepseek_v32"])
def test_tokens_of_every_kind_of_cache_are_counted(name, saved_model, tmp_path, says):
    model, out = saved_model(name), tmp_path / "a.npz"
    says("dump", "--model", model, "--prompt", TEXT, "--out", out)
    record = says("generate", out, "--model", model, "--prompt", "And then", "--max-tokens", 2)
    assert record["cached_tokens"] == len(TEXT)


def test_people_get_a_line_for_each_group_of_layers(saved_model, tmp_path, capsys):
    out = tmp_path / "a.npz"
    assert run("dump", "--model", saved_model("gemma3_text"), "--prompt", TEXT, "--out", out) == 0
    assert run("inspect", out) == 0
    said = capsys.readouterr().out
    assert "{" not in said
    assert "layers 0, 1, 3, 4; window 12; k shape 4 x 1" in said

"""mlxkv convert: from any kind to any kind, with what it asks for and what it refuses."""

import json

import mlx.core as mx
import mlx_lm
import pytest
from conftest import run, save_model, tiny_config, tiny_model
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache

from mlxkv import lm

TEXT = "The quick brown fox jumps over the lazy dog, and nothing else happens. " * 3
NAMES = {"npz": "a.npz", "mlxkv": "a.mlxkv", "live": "a.cache", "prompt": "a.safetensors", "prompt-0.31": "old"}


@pytest.fixture(scope="module")
def files(model_dir, tmp_path_factory):
    """One text in a file of each kind, all of them made of the dump; and in a file that mlx-lm wrote."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "t.txt").write_text(TEXT)
    assert run("dump", "--model", model_dir, "--prompt", TEXT, "--out", folder / "a.npz") == 0
    for kind in ("mlxkv", "live", "prompt", "prompt-0.31"):
        words = ["--method", "exact"] if kind == "mlxkv" else ["--model", model_dir]
        assert run("convert", folder / "a.npz", folder / NAMES[kind], "--to", kind, *words) == 0
    model, tokenizer = lm.load(str(model_dir))
    cache = make_prompt_cache(model)
    lm.prefill(model, tokenizer.encode(TEXT), cache)
    save_prompt_cache(str(folder / "theirs.safetensors"), cache)
    words = ["convert", folder / "theirs.safetensors", folder / "theirs.cache", "--model", model_dir]
    assert run(*words) == 0
    (folder / "t.json").write_text(json.dumps(tokenizer.encode(TEXT)))
    return folder, mlx_lm.generate(model, tokenizer, TEXT + "And then", max_tokens=12)


@pytest.mark.parametrize("name", [*NAMES.values(), "theirs.safetensors", "theirs.cache"])
def test_every_kind_becomes_the_same_dump_again(name, files, model_dir, says, tmp_path, capsys):
    folder = files[0]
    if name == "a.npz":
        return
    given = {"theirs.safetensors": ["--prompt-file", folder / "t.txt"], "theirs.cache": ["--tokens", folder / "t.json"]}
    text = given.get(name, [])
    words = [] if name == "a.mlxkv" else ["--model", model_dir]
    record = says("convert", folder / name, tmp_path / "b.npz", *words, *text)
    assert (tmp_path / "b.npz").read_bytes() == (folder / "a.npz").read_bytes()
    before, after = ((path / file).stat().st_size for path, file in ((folder, name), (tmp_path, "b.npz")))
    facts = {"from_bytes": before, "to_bytes": after, "ratio": before / after, "tokens": len(TEXT)}
    assert facts.items() <= record.items()
    assert (record["to"], record["values"]) == ("dump", "unchanged")
    assert record["from"].endswith("0.31" if name == "old" else record["from"][-4:])


@pytest.mark.parametrize("name", [*NAMES.values(), "theirs.safetensors"])
def test_generate_goes_on_and_inspect_explains_whichever_kind_was_written(name, files, model_dir, says):
    folder, expected = files
    record = says("generate", folder / name, "--model", model_dir, "--prompt", "And then", "--max-tokens", 12)
    assert (record["text"], record["cached_tokens"]) == (expected, len(TEXT))
    facts = says("inspect", folder / name)
    assert facts["tokens"] == len(TEXT)
    if facts["kind"] == "prompt cache of mlx-lm":
        known = (name != "theirs.safetensors", "0.31" if name == "old" else "0.32")
        assert (facts["token_ids"], facts["layout"]) == known


def test_a_live_cache_is_packed_by_the_preset_and_a_compressed_one_coded_by_the_method(
    files, model_dir, says, tmp_path
):
    record = says("convert", files[0] / "old", tmp_path / "b.cache", "--model", model_dir, "--cache", "int8")
    assert record["values"] == "packed by int8"
    assert says("inspect", tmp_path / "b.cache")["method"] == "int8"
    record = says("convert", tmp_path / "b.cache", tmp_path / "b.mlxkv", "--model", model_dir, "--method", "direct")
    assert record["values"].startswith("coded by direct at quality ")
    assert says("inspect", tmp_path / "b.mlxkv")["method"] == "direct"


def test_a_file_without_an_ending_is_written_as_said(files, model_dir, says, tmp_path):
    assert run("convert", files[0] / "a.npz", tmp_path / "b", "--model", model_dir) == 2
    assert says("convert", files[0] / "a.npz", tmp_path / "b", "--to", "prompt", "--model", model_dir)["to_bytes"]
    assert mx.load(str(tmp_path / "b"), format="safetensors")


def test_people_get_a_table(files, tmp_path, capsys):
    assert run("convert", files[0] / "a.npz", tmp_path / "b.mlxkv", "--method", "exact") == 0
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    found = {cells[1].strip(): cells[2].strip() for cells in rows}
    assert found["from"] == "dump"
    assert found["ratio"].endswith("x")
    assert found["to bytes"].endswith("B")


MISTAKES = {
    "no model": (["a.npz", "b.cache"], 2, "give its model with --model"),
    "no model of a": (["old", "b.npz"], 2, "give its model with --model"),
    "an unknown ending": (["a.npz", "b.bin"], 2, "does not tell what to write"),
    "a dump of a dump": (["a.npz", "b.npz"], 2, "is a dump already"),
    "onto itself": (["a.npz", "a.npz", "--to", "mlxkv"], 2, "it is the file to read"),
    "a preset of nothing live": (["a.npz", "b.mlxkv", "--cache", "int8"], 2, "--cache is for a live cache"),
    "a method of no codec": (["a.mlxkv", "b.npz", "--method", "exact"], 2, "--method is for a compressed cache"),
    "artifacts of nothing": (["a.npz", "b.cache", "--artifacts", "x", "--model", "MODEL"], 2, "--artifacts is for"),
    "an unknown preset": (["a.npz", "b.cache", "--model", "MODEL", "--cache", "int9"], 2, "did you mean"),
    "an unknown method": (["a.npz", "b.mlxkv", "--method", "exakt"], 2, "no codec method 'exakt'"),
    "no tokens": (["theirs.safetensors", "b.npz", "--model", "MODEL"], 2, "does not say which its 213 tokens are"),
    "no tokens of a live one": (["theirs.cache", "b.mlxkv", "--model", "MODEL"], 2, "give the text with --prompt-file"),
    "tokens twice": (["a.safetensors", "b.npz", "--model", "MODEL", "--prompt", "x"], 2, "names its tokens"),
    "tokens of a live one": (["a.cache", "b.npz", "--model", "MODEL", "--prompt", "x"], 2, "names its tokens"),
    "a short text": (
        ["theirs.safetensors", "b.npz", "--model", "MODEL", "--prompt", "x"],
        4,
        "the text has 1 as it is",
    ),
    "another text": (["theirs.safetensors", "b.npz", "--model", "MODEL", "--prompt", "x" * 213], 4, "made of others"),
    "ids of nothing": (
        ["theirs.safetensors", "b.npz", "--model", "MODEL", "--tokens", "t.txt"],
        2,
        "no list of token ids",
    ),
    "few ids": (["theirs.safetensors", "b.npz", "--model", "MODEL", "--tokens", "few.json"], 4, "few.json has 3"),
    "large ids": (["theirs.safetensors", "b.npz", "--model", "MODEL", "--tokens", "large.json"], 2, "ids from 0 to"),
    "other ids": (["theirs.safetensors", "b.npz", "--model", "MODEL", "--tokens", "other.json"], 4, "of other tokens"),
    "another model": (["a.npz", "b.cache", "--model", "OTHER"], 4, "fingerprint"),
    "another model of a prompt": (["a.safetensors", "b.npz", "--model", "OTHER"], 4, "another model or other weights"),
    "attention": (["a.npz", "b.cache", "--model", "MODEL", "--cache", "h2o"], 5, "goes by the attention"),
    "a text": (["t.txt", "b.npz"], 2, "it looks like text"),
}


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    return save_model(tiny_model("llama", seed=5, vocab_size=264), tiny_config("llama", vocab_size=264), folder)


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_named_and_leaves_no_file(case, files, model_dir, other_model, capsys, monkeypatch):
    words, code, reason = MISTAKES[case]
    monkeypatch.chdir(files[0])
    for name, ids in (("few", [1, 2, 3]), ("large", [10**9] * 213), ("other", [7] * 213)):
        (files[0] / f"{name}.json").write_text(json.dumps(ids))
    before = sorted(files[0].iterdir())
    places = {"MODEL": model_dir, "OTHER": other_model}
    assert run("convert", *(places.get(word, word) for word in words)) == code
    assert reason in " ".join(capsys.readouterr().err.split())
    assert sorted(files[0].iterdir()) == before


class Speaking:
    """A tokenizer with a chat template, which refuses one of its forms."""

    has_chat_template = True

    def encode(self, text, add_special_tokens=True):
        return [1] * add_special_tokens + [3 + ord(char) % 90 for char in text]

    def apply_chat_template(self, messages, add_generation_prompt=False, continue_final_message=False):
        if continue_final_message:
            raise ValueError("this template cannot")
        return [2, *self.encode(messages[0]["content"], False), 2, *[1] * add_generation_prompt]


@pytest.mark.parametrize(
    ("before", "after", "way"),
    [
        ([1], [], "as it is"),
        ([], [], "without the tokens that begin texts"),
        ([2], [2], "in the chat template"),
        ([2], [2, 1], "in the chat template, an answer to come"),
    ],
)
def test_a_text_is_found_in_the_cache_as_it_was_put_there(before, after, way):
    from mlxkv.conversion import Content, find_tokens

    model, tokenizer = tiny_model("llama"), Speaking()
    tokens = [*before, *tokenizer.encode("Hello, sailor", False), *after]
    content = Content(cache=make_prompt_cache(model))
    mx.eval(model(mx.array([tokens]), cache=content.cache))
    assert find_tokens(content, model, tokenizer, "Hello, sailor") == (tokens, way)


def test_mlx_lm_loads_a_bundled_model_by_what_is_written_into_a_prompt_cache(tmp_path):
    words = ["--model", "miniature/qwen3", "--prompt", "import os", "--max-tokens", "1"]
    assert run("generate", *words, "--save", tmp_path / "a.safetensors") == 0
    said = load_prompt_cache(str(tmp_path / "a.safetensors"), return_metadata=True)[1]
    assert mlx_lm.load(said["model"])[0].model_type == "qwen3"

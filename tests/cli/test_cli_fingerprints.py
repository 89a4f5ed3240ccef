"""No command goes on with a cache of another model; files of earlier versions, which cannot tell, get a note."""

import json
from dataclasses import replace

import pytest
from conftest import run, save_model, tiny_config, tiny_model

from mlxkv import lm, make_cache, save_cache
from mlxkv.dump import read_dump, write_dump
from mlxkv.sensitivity import sensitivity

TEXT = "The quick brown fox jumps over the lazy dog. Once upon a time in a land far away, nothing happened. "


@pytest.fixture(scope="module")
def files(model_dir, tmp_path_factory):
    """A folder with a dump, artifacts, a compressed file and a live cache of one model, and dump and model of another."""
    folder = tmp_path_factory.mktemp("files")
    own, tokenizer = lm.load(str(model_dir))
    foreign = tiny_model("llama", vocab_size=264)
    foreign.layers[1].self_attn.k_proj.weight[1:] += 1
    (folder / "foreign").mkdir()
    save_model(foreign, tiny_config("llama", vocab_size=264), folder / "foreign")
    tokens = tokenizer.encode(TEXT * 2)
    for name, model in (("own.npz", own), ("foreign.npz", foreign)):
        write_dump(folder / name, replace(lm.dump(model, tokens), sensitivity=sensitivity(model, tokens)))
    dump = read_dump(folder / "own.npz")
    write_dump(folder / "old.npz", replace(dump, fingerprint=dump.fingerprint.partition(".")[0]))
    live = make_cache(own, "int8")
    lm.prefill(own, tokens, live)
    save_cache(folder / "live.cache", own, live)
    for method, out in (("kvtc-8", "artifacts"), ("kvtc-rd", "rd-artifacts")):
        assert run("calibrate", folder / "own.npz", "--method", method, "--out", folder / out) == 0
    compress = ["compress", "--artifacts", folder / "artifacts", "--npz", folder / "own.npz"]
    assert run(*compress, "--out", folder / "own.mlxkv") == 0
    return folder


GENERATE = ["--prompt", "In short:", "--max-tokens", 2]


@pytest.mark.parametrize("file", ["own.npz", "own.mlxkv", "live.cache"])
def test_generate_goes_on_with_the_model_of_the_file_alone(file, files, model_dir, capsys):
    artifacts = ["--artifacts", files / "artifacts"] if file == "own.mlxkv" else []
    assert run("generate", files / file, *artifacts, "--model", model_dir, *GENERATE) == 0
    assert run("generate", files / file, *artifacts, "--model", files / "foreign", *GENERATE) == 4


def test_compress_and_calibrate_refuse_a_foreign_dump(files, tmp_path):
    words = ["compress", "--artifacts", files / "artifacts", "--npz", files / "foreign.npz"]
    assert run(*words, "--out", tmp_path / "file.mlxkv") == 4
    assert (
        run("calibrate", files / "own.npz", files / "foreign.npz", "--method", "kvtc-8", "--out", tmp_path / "a") == 4
    )


def test_a_target_of_kl_is_measured_with_the_model_of_the_dump_alone(files, tmp_path, capsys):
    words = [
        "compress",
        "--artifacts",
        files / "rd-artifacts",
        "--npz",
        files / "own.npz",
        "--out",
        tmp_path / "a.mlxkv",
    ]
    assert run(*words, "--target-kl", 0.1, "--model", files / "foreign") == 2
    assert "needs the model that made the dump" in capsys.readouterr().err


@pytest.mark.filterwarnings("default::mlxkv.errors.WeakFingerprintWarning")
def test_a_file_of_an_earlier_version_is_used_with_a_note(files, model_dir, tmp_path, capsys):
    assert run("generate", files / "old.npz", "--model", model_dir, *GENERATE, "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["cached_tokens"] == 2 * len(TEXT)
    (line,) = said.err.splitlines()
    assert line.startswith("note: ")
    assert "first 64 values of every weight" in line
    assert "make the older file again" in line
    words = ["compress", "--artifacts", files / "artifacts", "--npz", files / "old.npz"]
    assert run(*words, "--out", tmp_path / "file.mlxkv") == 0
    assert "note: two fingerprints agree" in capsys.readouterr().err


def test_inspect_tells_a_models_fingerprint_from_that_of_artifacts(files, says):
    of_model = read_dump(files / "own.npz").fingerprint
    facts = says("inspect", files / "artifacts")
    assert facts["model_fingerprint"] == of_model != facts["fingerprint"]
    for file in ("own.npz", "live.cache"):
        facts = says("inspect", files / file)
        assert facts["model_fingerprint"] == of_model
        assert "fingerprint" not in facts

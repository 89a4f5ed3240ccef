import json
import signal
import subprocess
import sys
import time
from functools import partial

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import run, save_model, tiny_config, tiny_model

from mlxkv import lm, read_dump
from mlxkv.cli import build

TEXT = "The quick brown fox jumps over the lazy dog. Once upon a time in a land far away, nothing happened. "


@pytest.fixture(scope="module")
def work(model_dir, tmp_path_factory):
    """Two dumps, artifacts and a container of one tiny model."""
    folder = tmp_path_factory.mktemp("work")
    for name, prompt in (("a", TEXT * 4), ("b", TEXT[::-1] * 4)):
        assert run("dump", "--model", model_dir, "--prompt", prompt, "--out", folder / f"{name}.npz") == 0
    dumps = [folder / "a.npz", folder / "b.npz"]
    assert run("calibrate", "--npz", *dumps, "--compression-ratio", 4, "--out", folder / "artifacts") == 0
    common = ["--npz", dumps[0], "--artifacts", folder / "artifacts"]
    assert run("compress", *common, "--recent", 32, "--out", folder / "a.mlxkv") == 0
    return folder


@pytest.mark.parametrize("model_dir", ["llama", "lfm2_moe", "glm4_moe_lite", "gpt2"], indirect=True)
def test_a_cache_travels_through_every_command(model_dir, tmp_path, says):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(TEXT * 3)
    dumped = says("dump", "--model", model_dir, "--prompt-file", prompt, "--max-tokens", 5, "--out", tmp_path / "x.npz")
    assert dumped["tokens"] == len(TEXT) * 3 + 5
    calibrated = says("calibrate", "--npz", tmp_path / "x.npz", "--method", "kvtc-4", "--out", tmp_path / "arts")
    assert calibrated["calibration_tokens"] == dumped["tokens"] - 4
    files = ["--artifacts", tmp_path / "arts", "--out"]
    compressed = says("compress", "--npz", tmp_path / "x.npz", "--recent", 16, *files, tmp_path / "x.mlxkv")
    assert compressed["file_bytes"] == (tmp_path / "x.mlxkv").stat().st_size < compressed["fp16_bytes"]
    restored = says("decompress", tmp_path / "x.mlxkv", *files, tmp_path / "y.npz")
    assert restored["k_shape"] == dumped["k_shape"]
    assert all(type(number) is int for number in dumped["k_shape"] + dumped["layers"])
    with np.load(tmp_path / "x.npz") as x, np.load(tmp_path / "y.npz") as y:
        assert set(x) == set(y)
        assert np.array_equal(x["k"][..., :4, :], y["k"][..., :4, :])
        assert np.array_equal(x["k"][..., -16:, :], y["k"][..., -16:, :])
        assert 0 < np.square(x["k"] - y["k"]).sum() < 0.2 * np.square(x["k"]).sum()


def test_sensitivity_is_measured_when_asked_for(model_dir, tmp_path, says):
    common = ["dump", "--model", model_dir, "--prompt", TEXT, "--out"]
    assert says(*common, tmp_path / "plain.npz")["sensitivity"] is None
    assert says(*common, tmp_path / "with.npz", "--sensitivity")["sensitivity"] == "measured"
    assert says("inspect", tmp_path / "with.npz")["sensitivity"] == "measured"
    assert set(read_dump(tmp_path / "with.npz").sensitivity) == {"k", "v", "k.energy", "v.energy"}
    assert read_dump(tmp_path / "plain.npz").sensitivity == {}


def test_the_lossless_coding_is_chosen_by_name_and_read_from_the_file(work, says, tmp_path):
    common = ["--npz", work / "a.npz", "--artifacts", work / "artifacts", "--out", tmp_path / "x.mlxkv"]
    says("compress", *common, "--recent", 32, "--lossless", "rans")
    assert says("inspect", tmp_path / "x.mlxkv")["codings"] == ["rans", "raw"]
    assert says("inspect", work / "a.mlxkv")["codings"] == ["deflate", "raw"]
    for name in ("a.mlxkv", "x.mlxkv"):
        source = tmp_path / name if name[0] == "x" else work / name
        says("decompress", source, "--artifacts", work / "artifacts", "--out", tmp_path / f"{name}.npz")
    with np.load(tmp_path / "a.mlxkv.npz") as plain, np.load(tmp_path / "x.mlxkv.npz") as other:
        assert np.array_equal(plain["k"], other["k"])
    assert run("compress", *common, "--lossless", "zip") == 2


def test_inspect_explains_all_three_kinds(work, says):
    assert says("inspect", work / "a.npz")["layers"] == [0, 1]
    assert "int" in says("inspect", work / "artifacts")["k_plan"]
    container = says("inspect", work / "a.mlxkv")
    assert container["recent"] == 32
    parts = ("coded_bytes", "sink_and_window_bytes", "other_bytes", "header_bytes")
    assert sum(container[part] for part in parts) == container["file_bytes"]


def test_eval_writes_the_record_it_prints(work, model_dir, tmp_path, says):
    (tmp_path / "text.txt").write_text(TEXT * 3)
    where = ["--artifacts", work / "artifacts", "--out", tmp_path / "record.json"]
    options = [
        "--model",
        model_dir,
        "--text-file",
        tmp_path / "text.txt",
        "--context-tokens",
        200,
        "--eval-tokens",
        20,
        "--recent",
        64,
    ]
    result = says("eval", "fidelity", *options, *where)
    assert result == json.loads((tmp_path / "record.json").read_text())
    assert {"model", "fingerprint", "quantization", "options", "variants", "summary", "samples", "machine"} <= set(
        result
    )
    whole, record, *_ = result["samples"]
    assert (whole["variant"], record["variant"]) == ("whole", str(work / "artifacts"))
    assert record["predicted_tokens"] == 20
    assert record["kl"] > 0 == whole["kl"]
    assert len(record["k_layer_mse"]) == 2
    assert (record["recent"], record["sinks"]) == (64, 4)
    assert {"ratio", "ratio_middle", "artifact_bytes", "perplexity_delta"} <= set(record)


def test_generate_goes_on_as_if_the_text_had_been_read_just_now(work, model_dir, says):
    model, tokenizer = lm.load(str(model_dir))
    options = ["--model", model_dir, "--prompt", "And then", "--max-tokens", 12]
    fresh = mlx_lm.generate(model, tokenizer, TEXT * 4 + "And then", max_tokens=12)
    assert says("generate", work / "a.npz", *options)["text"] == fresh
    coded = says("generate", work / "a.mlxkv", "--artifacts", work / "artifacts", *options)
    assert coded["cached_tokens"] == 4 * len(TEXT)
    assert coded["generated_tokens"] <= 12


def test_presets_lists_models_and_methods(says):
    assert {"model", "method"} == {row["kind"] for row in says("presets")}


def test_doctor_reports_device_and_matrix_speed(capsys):
    run("doctor", "--json")
    checks = {row["check"]: row for row in json.loads(capsys.readouterr().out)}
    assert {"mlx", "mlx-lm", "device", "matrix product", "presets"} <= set(checks)
    assert "GFLOP/s" in checks["matrix product"]["found"]


@pytest.mark.parametrize(
    ("platform", "advice"), [("linux", "apt-get install libopenblas0"), ("darwin", "arm64 Python")]
)
def test_doctor_advises_when_products_are_slow(platform, advice, monkeypatch, capsys):
    monkeypatch.setattr("mlxkv.cli.doctor.SLOW_GFLOPS", 1e9)
    monkeypatch.setattr("sys.platform", platform)
    assert run("doctor", "--json") == 1
    (problem,) = [row for row in json.loads(capsys.readouterr().out) if row["status"] == "problem"]
    assert advice in problem["advice"]
    assert ("apt-get" in problem["advice"]) == (platform == "linux")


def test_doctor_without_mlx_says_how_to_get_it():
    code = "import sys; sys.modules['mlx'] = sys.modules['mlx.core'] = None\n"
    code += "from mlxkv.cli import main; main(['doctor', '--json'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert done.returncode == 1
    checks = {row["check"]: row for row in json.loads(done.stdout)}
    assert "pip install" in checks["mlx"]["advice"]
    assert not {"device", "matrix product"} & set(checks)


def test_doctor_lists_models_of_the_hugging_face_cache(tmp_path, monkeypatch, says):
    def found():
        return next(row for row in says("doctor") if row["check"] == "models")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    none = found()
    assert none["found"].startswith("none")
    assert none["advice"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    types = ["qwen3", "gemma3", "gpt_oss", "mistral", "qwen3_5_moe", "lfm2-vl"]
    configs = {f"m{i}": json.dumps({"model_type": kind}) for i, kind in enumerate(types)}
    for name, config in {
        **configs,
        "bert": '{"model_type": "bert"}',
        "broken": "{",
        "list": "[]",
        "path": '{"model_type": "../x"}',
    }.items():
        snapshot = tmp_path / f"models--org--{name}" / "snapshots" / ("0" * 40)
        blob = snapshot.parents[1] / "blobs" / "b"
        snapshot.mkdir(parents=True)
        blob.parent.mkdir()
        blob.write_text(config)
        (snapshot / "config.json").symlink_to(blob)
    assert found() == {
        "check": "models",
        "status": "ok",
        "found": "6: org/m0, org/m1, org/m2, org/m3, org/m4, ...",
        "advice": "",
    }


def test_calibrate_tells_unspent_bits_and_what_limits_them(work, tmp_path, says):
    common = ["calibrate", "--npz", work / "a.npz", "--compression-ratio", 4, "--out", tmp_path / "c", "--overwrite"]
    free = says(*common)
    assert free["k_bit_budget"] == free["v_bit_budget"] == 16 * 32 // 4
    assert free["k_unspent_bits"] == free["k_bit_budget"] - free["k_bits_per_token"]
    assert "advice" not in free
    assert says(*common, "--max-bit-budget", 100)["k_bit_budget"] == 100
    capped = says(*common, "--rank", 1)
    assert capped["k_unspent_bits"] > 60
    assert capped["advice"].startswith("raise --rank")
    most = says(*common, "--rank", 32, "--compression-ratio", 1)  # every component there is
    assert "advice" not in most


def test_a_record_tells_the_type_of_the_stored_weights(tmp_path):
    model = tiny_model("llama", vocab_size=264)
    assert lm.quantization(model) == "float32"
    model.set_dtype(mx.bfloat16)
    loaded, _ = lm.load(str(save_model(model, tiny_config("llama", vocab_size=264), tmp_path)))
    assert lm.quantization(loaded) == "bfloat16"


def test_tables_are_for_people(work, capsys):
    assert run("inspect", work / "a.mlxkv") == 0
    out = capsys.readouterr().out
    assert "ratio middle" in out
    assert "kB" not in out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["dump", "--model", "{model}", "--out", "{tmp}/x.npz"], 2, "either --prompt or --prompt-file"),
        (["dump", "--model", "{model}", "--prompt", "", "--out", "{tmp}/x.npz"], 2, "no tokens"),
        (["dump", "--model", "{model}", "--prompt-file", "{tmp}/none", "--out", "{tmp}/x.npz"], 2, "cannot read"),
        (["dump", "--model", "{tmp}/none", "--prompt", "a", "--out", "{tmp}/x.npz"], 2, "no model directory"),
        (["dump", "--model", "{model}", "--prompt", "a", "--out", "{tmp}/no/x.npz"], 2, "cannot write"),
        (["dump", "--model", "{model}", "--prompt", "a", "--preset", "glm", "--out", "{tmp}/x.npz"], 4, "preset 'glm' is for"),
        (["dump", "--model", "{model}", "--prompt", "a", "--preset", "no", "--out", "{tmp}/x.npz"], 2, "no preset 'no' of a model family"),
        (["dump", "--model", "{model}", "--prompt", "a", "--dtype", "int3", "--out", "{tmp}/x.npz"], 2, "int3"),
        (["calibrate", "--out", "{tmp}/a", "--compression-ratio", "4"], 2, "give either --model or --npz"),
        (["calibrate", "--out", "{tmp}/a", "--npz", "{work}/a.npz"], 2, "either --compression-ratio or --method"),
        (["calibrate", "--out", "{tmp}/a", "--npz", "{work}/a.npz", "--compression-ratio", "-1"], 2, "at least 0.01"),
        (["calibrate", "--out", "{tmp}/a", "--npz", "{work}/a.npz", "--compression-ratio", "4", "--rank", "0"], 2, "rank must be 1"),
        (["calibrate", "--out", "{tmp}/a", "--npz", "{work}/a.npz", "--compression-ratio", "9999"], 2, "cannot code a single"),
        (["calibrate", "--out", "{tmp}/a", "--npz", "{work}/a.mlxkv", "--compression-ratio", "4"], 2, "is a compressed cache, and a dump"),
        (["compress", "--npz", "{work}/a.npz", "--artifacts", "{tmp}", "--out", "{tmp}/x"], 2, "no calibration artifacts"),
        (["compress", "--npz", "{tmp}/none", "--artifacts", "{work}/artifacts", "--out", "{tmp}/x"], 2, "cannot read"),
        (["decompress", "{work}/a.npz", "--artifacts", "{work}/artifacts", "--out", "{tmp}/x"], 2, "is a dump (.npz), and a compressed cache"),
        (["inspect", "{tmp}/none"], 2, "cannot read"),
        (["generate", "{work}/a.mlxkv", "--model", "{model}", "--prompt", "a"], 4, "mlxkv artifacts import"),
        (["generate", "{work}/a.npz", "--model", "{model}", "--prompt", ""], 2, "no tokens"),
        (["inspect", "{model}/config.json"], 2, "it looks like text"),
        (["eval", "fidelity", "--model", "{model}", "--text-file", "{model}/config.json", "--artifacts", "{work}/artifacts", "--context-tokens", "99999"], 2, "are needed"),
    ],
)  # fmt: skip
def test_a_users_mistake_gets_one_line_and_an_exit_code(words, code, message, model_dir, work, tmp_path, capsys):
    words = [word.format(model=model_dir, work=work, tmp=tmp_path) for word in words]
    assert run(*words) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_wrong_flag_is_a_usage_error():
    assert run("dump", "--modle", "x") == 2


def test_another_models_artifacts_are_refused(work, tmp_path, capsys):
    (tmp_path / "qwen3").mkdir()
    config = tiny_config("qwen3", vocab_size=264)
    other = save_model(tiny_model("qwen3", vocab_size=264), config, tmp_path / "qwen3")
    assert run("dump", "--model", other, "--prompt", TEXT * 2, "--out", tmp_path / "q.npz") == 0
    assert run("compress", "--npz", tmp_path / "q.npz", "--artifacts", work / "artifacts", "--out", tmp_path / "q") == 4
    assert (
        run("calibrate", "--npz", tmp_path / "q.npz", work / "a.npz", "--compression-ratio", 4, "--out", tmp_path / "c")
        == 4
    )
    assert not (tmp_path / "q").exists()
    assert "was dumped from" in capsys.readouterr().err


def test_a_damaged_container_exits_with_3(work, tmp_path, capsys):
    blob = bytearray((work / "a.mlxkv").read_bytes())
    blob[100] ^= 4
    (tmp_path / "bad").write_bytes(blob)
    for command in (
        ["inspect", tmp_path / "bad"],
        ["decompress", tmp_path / "bad", "--artifacts", work / "artifacts", "--out", tmp_path / "x"],
    ):
        assert run(*command) == 3
        assert "checksum does not match" in capsys.readouterr().err


def test_npz_may_be_one_flag_with_several_files_or_repeated(work, tmp_path, says):
    files = [work / "a.npz", work / "b.npz"]
    common = ["--compression-ratio", 4, "--out", tmp_path / "c", "--overwrite"]
    once = says("calibrate", "--npz", *files, *common)
    assert once == says("calibrate", "--npz", files[0], "--npz", files[1], *common)
    assert once["calibration_tokens"] == 2 * (4 * len(TEXT) - 4)


def test_every_command_has_an_example_in_its_help(capsys):
    for command in build().registered_commands:
        assert run(command.name, "--help") == 0
        assert f"Example: mlxkv {command.name}" in capsys.readouterr().out


@pytest.mark.slow
def test_ctrl_c_exits_with_130_and_leaves_no_file(model_dir, tmp_path):
    command = [sys.executable, "-m", "mlxkv", "dump", "--model", str(model_dir), "--prompt-file", "-"]
    command += ["--out", str(tmp_path / "x.npz")]
    # A background job may have inherited an ignored SIGINT.
    default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=default
    ) as process:
        process.stdin.write(TEXT * 4000)  # hours of prefill; more than a pipe holds, so that it is read by now
        process.stdin.close()
        time.sleep(2)  # the model is loaded meanwhile
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        error = process.stderr.read()
    assert process.returncode == 130
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []

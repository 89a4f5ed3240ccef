"""Bytes and divergence as asked for, in whole files, or a refusal that says what stands in the way."""

import math
from dataclasses import replace

import mlx.core as mx
import pytest
from conftest import run, tiny_model, tiny_tokens
from synthetic import PLAIN, rd_artifacts, toy_artifacts, toy_dump

from mlxkv import lm
from mlxkv.codec.calibrate import calibrate
from mlxkv.codec.methods.kvtc_rd import KVTCRDConfig
from mlxkv.codec.session import CacheCodec
from mlxkv.dump import read_dump, write_dump
from mlxkv.errors import InputError
from mlxkv.evaluate.metrics import kl_divergence
from mlxkv.evaluate.targets import compress_to_bytes, quality_for_kl
from mlxkv.sensitivity import sensitivity

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return CacheCodec(rd_artifacts(tmp_path_factory.mktemp("targets")), recent=16)


@pytest.mark.parametrize("length", [300, 2300])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_bytes_are_met_within_two_percent_of_the_whole_file(codec, length, share):
    dump = toy_dump(PLAIN, length=length, seed=7)
    least, most = (len(codec.with_quality(quality).compress_dump(dump)) for quality in (15, 60))
    target = least + share * (most - least)
    chosen, blob = compress_to_bytes(codec, dump, target)
    assert abs(len(blob) / target - 1) <= 0.02
    assert blob == chosen.compress_dump(dump)


def test_a_few_blocks_stand_for_a_long_cache(codec):
    dump = toy_dump(PLAIN, length=2300, seed=7)
    few, all_of_them = codec.coded_bytes(dump, 2), codec.coded_bytes(dump, 6)
    assert few == pytest.approx(all_of_them, rel=0.1)


@pytest.mark.parametrize("target", [10, 3000])
def test_bytes_out_of_reach_are_refused_before_any_work_with_what_is_there_anyway(codec, target, monkeypatch):
    monkeypatch.setattr(CacheCodec, "compress_dump", lambda *_: pytest.fail("compressed in vain"))
    with pytest.raises(InputError, match="fewer recent tokens make smaller files"):
        compress_to_bytes(codec, toy_dump(PLAIN, length=300), target)


@pytest.mark.parametrize("target", [10**6, 10**8, 1e30])
def test_a_file_that_is_smaller_than_asked_at_the_best_quality_is_made(codec, target):
    dump = toy_dump(PLAIN, length=300)
    chosen, blob = compress_to_bytes(codec, dump, target)
    assert chosen.quality == 100
    assert blob == chosen.compress_dump(dump)


@pytest.mark.parametrize("target", [0, -1, math.nan, math.inf, True, "8", None])
def test_a_target_that_is_no_number_above_0_is_refused_before_any_work(codec, target):
    for call in (lambda: compress_to_bytes(codec, None, target), lambda: quality_for_kl(codec, None, [], target)):
        with pytest.raises(InputError, match="a finite number above 0"):
            call()


def test_a_divergence_that_the_lowest_quality_keeps_below_is_met_by_it(learnt):
    assert quality_for_kl(learnt[1], learnt[0], learnt[2], 50.0) == 10


def test_a_method_of_one_ratio_meets_no_target(tmp_path):
    published = CacheCodec(toy_artifacts(tmp_path, PLAIN))
    for call in (
        lambda: compress_to_bytes(published, toy_dump(PLAIN), 1000),
        lambda: quality_for_kl(published, None, [], 1),
    ):
        with pytest.raises(InputError, match="a method with one ratio"):
            call()


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """A model, a codec for it, and a text."""
    model, folder = tiny_model("llama"), tmp_path_factory.mktemp("learnt")
    files = [folder / f"{seed}.npz" for seed in range(2)]
    for seed, path in enumerate(files):
        tokens = tiny_tokens(200, seed=seed + 2)
        write_dump(path, replace(lm.dump(model, tokens), sensitivity=sensitivity(model, tokens, seed=seed)))
    return model, CacheCodec(calibrate(files, KVTCRDConfig()), recent=4), tiny_tokens(300, seed=9)


def test_a_divergence_is_met_and_a_smaller_one_needs_a_higher_quality(learnt):
    model, codec, tokens = learnt
    dump, following = lm.dump(model, tokens[:171]), mx.array([tokens[171:-1]])
    exact = model(following, cache=lm.restore(model, dump))[0]
    qualities = []
    for target in (1e-1, 1e-3):
        quality = quality_for_kl(codec, model, tokens, target)
        back = codec.decompress_dump(codec.with_quality(quality).compress_dump(dump))
        found = float(kl_divergence(exact, model(following, cache=lm.restore(model, back))[0]).mean())
        assert target / 3 < found < 1.5 * target
        qualities.append(quality)
    assert qualities == sorted(set(qualities))


def test_a_divergence_that_no_quality_reaches_is_refused(learnt):
    with pytest.raises(InputError, match="still diverges by"):
        quality_for_kl(learnt[1], learnt[0], learnt[2], 1e-12)


TEXT = "The quick brown fox jumps over the lazy dog. Once upon a time in a land far away, nothing happened. "


@pytest.mark.slow
def test_the_commands_take_targets_parts_and_appending(model_dir, tmp_path, says):
    a, b, arts = tmp_path / "a.npz", tmp_path / "b.npz", tmp_path / "arts"
    for path, prompt in ((a, TEXT * 6), (b, TEXT * 7)):
        says("dump", "--model", model_dir, "--prompt", prompt, "--sensitivity", "--out", path)
    made = says("calibrate", "--npz", a, b, "--method", "kvtc-rd", "--basis-bytes", 74_000, "--out", arts)
    assert made["method"] == "kvtc-rd"
    assert made["artifact_bytes"] <= 74_000
    assert says("inspect", arts)["k_components"] == made["k_components"] > 0
    common = ["compress", "--npz", a, "--artifacts", arts, "--recent", 16, "--out", tmp_path / "a.mlxkv"]
    fine = says(*common, "--quality", 60)
    assert fine["quality"] == 60
    assert says(*common)["file_bytes"] < fine["file_bytes"]
    goal = says(*common, "--target-bytes", fine["file_bytes"] - 2000)
    assert abs(goal["file_bytes"] / (fine["file_bytes"] - 2000) - 1) <= 0.02
    ratio = says(*common, "--target-ratio", goal["ratio"])
    assert abs(ratio["ratio"] / goal["ratio"] - 1) <= 0.02
    assert "note" not in goal | ratio
    better = says(*common, "--target-ratio", 1.01)
    assert better["quality"] == 100
    assert better["ratio"] > 1.1
    assert "makes a smaller file than asked" in better["note"]
    lax = says(*common, "--target-kl", 30, "--model", model_dir)
    assert "diverges less than asked" in lax["note"]
    close = says(*common, "--target-kl", 5e-4, "--model", model_dir)
    assert 10 < close["quality"] < 90
    exact, coded = says(*common, "--quality", 45, "--raw-window"), says(*common, "--quality", 45)
    assert exact["sink_and_window_bytes"] > 1.5 * coded["sink_and_window_bytes"]
    assert says("inspect", tmp_path / "a.mlxkv")["window_quality"] == 75
    grown = says(
        "compress",
        "--npz",
        b,
        "--artifacts",
        arts,
        "--recent",
        16,
        "--out",
        tmp_path / "a.mlxkv",
        "--quality",
        45,
        "--append",
    )
    assert grown["tokens"] == len(TEXT) * 7
    says("compress", "--npz", b, "--artifacts", arts, "--recent", 16, "--out", tmp_path / "b.mlxkv", "--quality", 45)
    assert (tmp_path / "a.mlxkv").read_bytes() == (tmp_path / "b.mlxkv").read_bytes()
    back = ["decompress", tmp_path / "a.mlxkv", "--artifacts", arts, "--out", tmp_path / "part.npz"]
    assert says(*back, "--tokens", "100:250")["tokens"] == 150
    assert says("inspect", tmp_path / "part.npz")["start"] == 100
    assert read_dump(tmp_path / "part.npz").start == 100
    assert says(*back, "--tokens", ":20")["tokens"] == 20
    assert says(*back, "--tokens", "690:")["tokens"] == len(TEXT) * 7 - 690
    for wrong in ("5", "a:b", "9:3", "0:99999", "-1:4", ":"[:0], "1:2:3"):
        assert run(*back, "--tokens", wrong) == 2
    for wrong in (
        ["--quality", 45, "--target-bytes", 5000], ["--quality", 101], ["--target-kl", 0.01], ["--model", model_dir],
        ["--target-ratio", 0], ["--target-ratio", -3], ["--append", "--target-bytes", 5000], ["--target-bytes", 10],
    ):  # fmt: skip
        assert run(*common, *wrong) == 2, wrong
    assert run("generate", "--model", model_dir, "--cache", tmp_path / "part.npz", "--prompt", "x") != 0
    assert run("calibrate", "--npz", tmp_path / "part.npz", "--compression-ratio", 4, "--out", tmp_path / "x") == 2
    assert run("calibrate", "--npz", a, "--method", "kvtc-rd", "--rank", 4, "--out", tmp_path / "x") == 2

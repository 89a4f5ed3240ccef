"""Calibration on few tokens: it says so, and what is learnt from them degrades gently."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from synthetic import PLAIN, toy_dump, toy_sensitivity

from mlxkv.codec.calibrate import calibrate, calibration_warning, learn
from mlxkv.codec.methods.kvtc import KVTCConfig
from mlxkv.codec.methods.kvtc_rd import KVTCRD, KVTCRDConfig, QuickKVTCRD
from mlxkv.codec.methods.kvtc_weighted import KVTCWeightedConfig
from mlxkv.codec.samples import Samples
from mlxkv.codec.session import CacheCodec
from mlxkv.codec.stages import basis, shrinkage, weighting
from mlxkv.codec.stages.dead_zone import dequantize, quantize
from mlxkv.dump import write_dump
from mlxkv.errors import InputError
from mlxkv.spec import STREAMS

CONFIGS = {"kvtc": KVTCConfig(16.0), "kvtc-weighted": KVTCWeightedConfig(16.0), "kvtc-rd": KVTCRDConfig()}
HEADS, DIM = 6, 8


def busy_dump(length, seed):
    """A cache whose heads vary in all their dims, some together with dims of other heads."""
    mixing, random = np.random.default_rng(0), np.random.default_rng(seed)
    mix = np.eye(HEADS * DIM) + 0.3 * mixing.standard_normal((HEADS * DIM, HEADS * DIM)) / np.sqrt(DIM)
    arrays = {}
    for name in STREAMS:
        rows = random.standard_normal((length, HEADS * DIM)) @ mix
        arrays[name] = rows.reshape(1, length, 3, 2, DIM).transpose(2, 0, 3, 1, 4).astype(np.float16)
    dump = replace(toy_dump(PLAIN, length), **arrays)
    return replace(dump, sensitivity=toy_sensitivity(dump))


def learnt(folder, config, length, count=1):
    files = [folder / f"{seed}-{length}.npz" for seed in range(count)]
    for seed, path in enumerate(files):
        write_dump(path, busy_dump(length, seed))
    return calibrate(files, config)


def test_directions_that_no_token_took_are_coded_as_well(tmp_path):
    dump = busy_dump(150, seed=9)
    for quality, most in ((35, 0.3), (60, 0.01)):
        codec = CacheCodec(learnt(tmp_path, KVTCRDConfig(), 30), quality=quality)  # 26 tokens for 48 dims
        back = codec.decompress_dump(codec.compress_dump(dump))
        for name in STREAMS:
            error = np.square(back.stream(name).astype(np.float32) - dump.stream(name)).sum()
            assert error < most * np.square(dump.stream(name).astype(np.float32)).sum()


def test_directions_of_heads_are_orthonormal_and_the_strongest_first():
    rows = np.random.default_rng(0).standard_normal((20, HEADS * DIM)).astype(np.float32) * np.arange(1, 49)
    own = shrinkage.head_products(rows, DIM) / np.float32(len(rows))
    directions, spread = (found.reshape(HEADS, DIM, -1) for found in shrinkage.head_directions(own, own / 4))
    np.testing.assert_allclose(directions @ directions.swapaxes(1, 2), np.tile(np.eye(DIM), (HEADS, 1, 1)), atol=1e-5)
    assert (np.diff(spread[..., 0], axis=1) <= 0).all()


@pytest.mark.parametrize("tokens", [4, 20, 47])
def test_heads_code_what_components_of_few_rows_leave(tokens):
    rows = np.random.default_rng(0).standard_normal((tokens, HEADS * DIM)).astype(np.float32)
    assert basis.learn_basis(rows.copy(), 1e-4, None, 0).rank == tokens - 1
    found = basis.learn_basis(rows.copy(), 1e-4, None, 0, DIM)
    assert (found.whole, found.rank) == (tokens // 3, tokens // 3 + HEADS * DIM)
    others = mx.array(np.random.default_rng(1).standard_normal((50, HEADS * DIM)).astype(np.float32))
    for step in (1.0, 0.1):
        codes = quantize(found.project(others, found.rank, step=step), step)
        error = others - found.reconstruct(dequantize(codes, step))
        assert mx.square(error).mean().item() < 0.2 * step**2
    assert found.project(others, found.whole, step=1.0).shape == (50, found.whole)


def test_components_of_few_rows_fit_a_budget_together_with_their_heads():
    rows = np.random.default_rng(0).standard_normal((40, HEADS * DIM)).astype(np.float32)
    loose, tight = (basis.learn_basis(rows.copy(), 1e-5, budget, 0, DIM) for budget in (None, 1600))
    assert tight.codes.nbytes + 8 * tight.rank <= 1600 < loose.codes.nbytes
    assert tight.rank - tight.whole == HEADS * DIM
    with pytest.raises(InputError, match="raise basis_bytes"):
        basis.learn_basis(rows.copy(), 1e-5, 100, 0, DIM)


def test_artifacts_of_few_tokens_are_no_larger_than_those_of_many(tmp_path):
    few, many = (learnt(tmp_path, KVTCRDConfig(), length) for length in (30, 400))
    assert few.nbytes <= many.nbytes


def test_a_dim_of_keys_that_hardly_varies_makes_no_gains():
    random = np.random.default_rng(0)
    keys = random.standard_normal((400, 4, 16)).astype(np.float32)
    keys[..., 3] *= 1e-5
    energy = random.gamma(1, 1, (400, 4)).astype(np.float32) * np.exp(keys[..., 0])
    attention = weighting.learn_attention_predictor(keys, energy)
    decoded = keys.copy()
    decoded[..., 3] += 0.1 * random.standard_normal((400, 4))
    exact, found = (np.log(weighting.attention_gains(each, attention)) for each in (keys, decoded))
    assert exact.std() > 0.05
    assert np.abs(found - exact).max() < 0.05


def test_predictions_of_attention_are_trusted_as_far_as_tokens_go():
    random = np.random.default_rng(0)
    keys = random.standard_normal((2000, 2, 8)).astype(np.float32)
    energy = np.exp(keys.sum(axis=2) / 2)
    strengths = [
        np.log(weighting.attention_gains(keys, weighting.learn_attention_predictor(keys[:n], energy[:n]))).std()
        for n in (30, 100, 200)
    ]
    assert strengths == sorted(strengths)
    assert strengths[0] < 0.4 * strengths[-1]


def test_attention_that_keys_do_not_tell_is_not_predicted():
    random = np.random.default_rng(0)
    keys = random.standard_normal((120, 20, 32)).astype(np.float32)
    energy = random.gamma(0.3, 3, (120, 20)).astype(np.float32)
    attention = weighting.learn_attention_predictor(keys, energy)
    assert attention[:, :-1].any(axis=1).mean() < 0.5
    gains = np.log(weighting.attention_gains(random.standard_normal((500, 20, 32)).astype(np.float32), attention))
    assert (np.abs(gains) >= weighting.MAX_LOG_GAIN).mean() < 0.02
    slopes = random.standard_normal((20, 32)).astype(np.float32) / 4
    told = np.exp((keys * slopes).sum(axis=-1))
    assert weighting.learn_attention_predictor(keys, told)[:, :-1].any(axis=1).all()


def test_fisher_information_of_few_tokens_is_nearer_to_the_truth_when_shrunk():
    random = np.random.default_rng(0)
    half = random.standard_normal((10, 16, 16)) / 4 + np.eye(16)
    truth, errors = half @ half.swapaxes(1, 2), []
    for tokens in (8, 40, 160):
        gradients = np.einsum("tnd,ned->tne", random.standard_normal((tokens, 10, 16)), half)
        found = np.einsum("tnd,tne->nde", gradients, gradients) / tokens
        shrunk = shrinkage.shrink_fisher(found, np.square(gradients).sum(axis=-1))
        np.testing.assert_allclose(np.trace(shrunk, axis1=1, axis2=2), np.trace(found, axis1=1, axis2=2), rtol=1e-6)
        errors.append([np.square(f - truth).sum() for f in (found, shrunk)])
    assert errors[0][1] < 0.7 * errors[0][0]
    assert errors[1][1] < errors[1][0]
    assert errors[2][1] == errors[2][0]  # as many tokens as directions


@pytest.mark.parametrize("method", CONFIGS)
def test_too_few_tokens_are_told_with_the_number_needed_and_measured(tmp_path, method):
    few, many = (learnt(tmp_path, CONFIGS[method], length, count=2) for length in (24, 400))
    needed = 48 if method == "kvtc-rd" else 24
    assert few.meta["calibration_tokens_needed"] == many.meta["calibration_tokens_needed"] == needed
    warning = calibration_warning({**few.meta, "calibration_tokens": needed - 1})
    assert f"{needed - 1} tokens are few to learn {needed} directions" in warning
    assert (calibration_warning(few.meta) is None) is (needed <= 40)
    assert calibration_warning(many.meta) is None
    for artifacts in (few, many):
        held, trained = artifacts.meta["held_out_error"], artifacts.meta["trained_error"]
        assert set(held) == set(trained) == {"k", "v"}
    gaps = [meta["held_out_error"]["k"] / meta["trained_error"]["k"] for meta in (few.meta, many.meta)]
    assert gaps[0] > gaps[1]
    assert gaps[1] == pytest.approx(1, abs=0.4)


def test_tokens_that_are_held_out_are_the_last_and_not_trained_on(tmp_path):
    files = [tmp_path / f"{i}.npz" for i in range(2)]
    for seed, path in enumerate(files):
        write_dump(path, busy_dump(100, seed))
    samples = Samples(files, sinks=4)
    rows = samples.rows("k")
    assert samples.tokens == 2 * 96
    assert len(rows) == 2 * 90
    expected = np.concatenate(
        [busy_dump(100, seed).k[:, 0, :, -6:].transpose(2, 0, 1, 3).reshape(6, -1) for seed in (0, 1)]
    )
    np.testing.assert_array_equal(samples.held_out["k"], expected.astype(np.float32))
    assert len(samples.trained["k"]) == 12
    assert not any((row == rows).all(axis=1).any() for row in samples.held_out["k"])
    assert all((row == rows).all(axis=1).any() for row in samples.trained["k"])


@pytest.mark.parametrize("meta", [{}, {"calibration_tokens": "x", "calibration_tokens_needed": 3}])
def test_artifacts_that_do_not_tell_are_not_warned_of(meta):
    assert calibration_warning(meta) is None


def test_the_command_warns_and_says_what_was_measured(tmp_path, says):
    write_dump(tmp_path / "a.npz", busy_dump(40, 0))
    made = says("calibrate", "--npz", tmp_path / "a.npz", "--method", "kvtc-rd", "--out", tmp_path / "out")
    assert (made["calibration_tokens"], made["calibration_tokens_needed"]) == (36, 48)
    assert "36 tokens are few to learn 48 directions" in made["warning"]
    assert made["k_held_out_error"] > 0 < made["v_trained_error"]
    assert {"predicted_heads", "saturated_gains"} <= set(made)
    assert made["attention_tokens"] < made["attention_tokens_needed"] == 24 * 9
    write_dump(tmp_path / "b.npz", busy_dump(60, 0))
    assert "warning" not in says(
        "calibrate", "--npz", tmp_path / "b.npz", "--method", "kvtc-16", "--out", tmp_path / "b"
    )


def test_quick_training_loses_no_direction_and_codes_about_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr(QuickKVTCRD, "most_components", 16)
    monkeypatch.setattr(QuickKVTCRD, "attention_tokens", 4)
    monkeypatch.setattr(basis, "CHUNK_ROWS", 100)
    write_dump(tmp_path / "a.npz", busy_dump(900, 0))
    dump, found = busy_dump(300, seed=9), []
    for method in (KVTCRD(), QuickKVTCRD()):
        artifacts = learn(method, Samples([tmp_path / "a.npz"], 4), KVTCRDConfig())
        codec = CacheCodec(artifacts, recent=0)
        blob = codec.compress_dump(dump)
        back = codec.decompress_dump(blob)
        error = sum(np.square(back.stream(n).astype(np.float32) - dump.stream(n)).sum() for n in STREAMS)
        found.append((len(blob), error, artifacts))
    (size, error, full), (quick_size, quick_error, quick) = found
    assert full.k.basis.rank == full.k.width
    assert (quick.k.basis.whole, quick.k.basis.rank) == (16, 16 + quick.k.width)
    assert quick.meta["attention_tokens"] == 4 * (DIM + 1)
    assert quick_error < 1.3 * error
    assert quick_size < 1.3 * size

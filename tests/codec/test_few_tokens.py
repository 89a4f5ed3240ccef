"""Calibration on few tokens: it says so, and what is learnt from them degrades gently."""

from dataclasses import replace

import numpy as np
import pytest
from synthetic import PLAIN, toy_dump, toy_sensitivity

from mlxkv.codec.calibrate import calibrate, calibration_warning
from mlxkv.codec.methods.kvtc import KVTCConfig
from mlxkv.codec.methods.kvtc_rd import KVTCRDConfig
from mlxkv.codec.methods.kvtc_weighted import KVTCWeightedConfig
from mlxkv.codec.samples import Samples
from mlxkv.codec.session import CacheCodec
from mlxkv.codec.stages import basis, shrinkage, weighting
from mlxkv.dump import write_dump
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


def test_rows_of_heads_mix_their_covariance_in_with_the_share():
    rows = np.random.default_rng(0).standard_normal((40, HEADS * DIM)).astype(np.float32)
    rows -= rows.mean(axis=0)
    whole = rows.T @ rows / len(rows)
    apart = whole * np.kron(np.eye(HEADS), np.ones((DIM, DIM)))
    for share in (0.0, 0.2, 0.7):
        every = np.concatenate([rows, shrinkage.head_rows(rows, DIM, share)])
        mixed = every.T @ every * (1 - share) / len(rows)
        np.testing.assert_allclose(mixed, (1 - share) * whole + share * apart, atol=0.01)


def test_a_stream_too_wide_gets_the_strongest_directions_that_fit(monkeypatch):
    rows = np.random.default_rng(0).standard_normal((30, HEADS * DIM)).astype(np.float32) * np.arange(1, 49)
    monkeypatch.setattr(shrinkage, "MAX_SIDE", 40)
    made = shrinkage.head_rows(rows - rows.mean(axis=0), DIM, 0.5)
    assert made.shape == (10, HEADS * DIM)
    assert np.square(made[:, 40:]).sum() > np.square(made[:, :40]).sum()
    monkeypatch.setattr(shrinkage, "MAX_SIDE", 20)
    assert shrinkage.head_rows(rows, DIM, 0.5).shape == (0, HEADS * DIM)


def test_the_share_of_heads_alone_falls_with_tokens_and_is_larger_where_heads_are_apart():
    random = np.random.default_rng(0)
    common = random.standard_normal((3000, 4)) @ random.standard_normal((4, HEADS * DIM))
    together = (common + random.standard_normal(common.shape)).astype(np.float32)
    apart = random.standard_normal(common.shape).astype(np.float32)
    shares = [shrinkage.covariance_share(together[:count], DIM) for count in (12, 24, 40, 48, 3000)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.1
    assert shares[-2:] == [0, 0]  # as many tokens as directions
    for count in (12, 24, 40):
        assert shrinkage.covariance_share(apart[:count], DIM) > shrinkage.covariance_share(together[:count], DIM)


def test_a_basis_with_a_share_has_every_component_and_without_only_those_of_its_rows():
    rows = np.random.default_rng(0).standard_normal((20, HEADS * DIM)).astype(np.float32)
    assert basis.learn_basis(rows.copy(), 1e-4, None, 0).rank == 19
    full = basis.learn_basis(rows.copy(), 1e-4, None, 0, DIM, 0.3)
    assert full.rank == HEADS * DIM
    np.testing.assert_allclose(np.array(full.matrix @ full.matrix.T), np.eye(HEADS * DIM), atol=0.02)
    assert (np.diff(full.spread) <= 1e-5).all()


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
    write_dump(tmp_path / "b.npz", busy_dump(60, 0))
    assert "warning" not in says(
        "calibrate", "--npz", tmp_path / "b.npz", "--method", "kvtc-16", "--out", tmp_path / "b"
    )

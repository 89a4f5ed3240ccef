"""The rate-distortion codec: quality is the knob, and weights decide where errors go."""

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_tokens
from forging import forge, header_of
from synthetic import DUAL, LATENT, PLAIN, rd_artifacts, toy_artifacts, toy_dump, toy_sensitivity

from mlxkv import lm
from mlxkv.codec.calibrate import calibrate
from mlxkv.codec.methods import kvtc_weighted
from mlxkv.codec.methods.kvtc import KVTCConfig as Published
from mlxkv.codec.methods.kvtc_rd import KVTCRDConfig
from mlxkv.codec.session import CacheCodec
from mlxkv.codec.stages import weighting
from mlxkv.dump import write_dump
from mlxkv.errors import FormatError, InputError
from mlxkv.evaluate.metrics import kl_divergence, relative_error
from mlxkv.io.container import Reader
from mlxkv.sensitivity import sensitivity
from mlxkv.spec import STREAMS


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    return rd_artifacts(tmp_path_factory.mktemp("rd"))


def held_out(spec=PLAIN, length=200, **options):
    return toy_dump(spec, length=length, seed=9, **options)


# The knob


@pytest.mark.parametrize("spec", [DUAL, PLAIN, LATENT], ids=["dual", "plain", "mla"])
@pytest.mark.parametrize("batch", [2])
def test_ten_points_of_quality_about_halve_the_error_and_cost_bytes(tmp_path, spec, batch):
    learnt, dump = rd_artifacts(tmp_path, spec), held_out(spec, batch=batch)
    errors, sizes = [], []
    for quality in (20, 30, 40, 50):
        codec = CacheCodec(learnt, recent=8, quality=quality, raw_window=True)
        blob = codec.compress_dump(dump)
        back = codec.decompress_dump(blob)
        assert np.array_equal(back.k[..., :4, :], dump.k[..., :4, :])
        assert np.array_equal(back.k[..., -8:, :], dump.k[..., -8:, :])
        errors.append(
            [math.sqrt(relative_error(dump.stream(n), back.stream(n))) for n in STREAMS if dump.stream(n).size]
        )
        sizes.append(len(blob))
    assert sizes == sorted(sizes)
    steps = np.array(errors[:-1]) / np.array(errors[1:])
    assert (steps > 1.25).all()
    assert (steps < 2.8).all()
    assert np.array(errors[-1]).max() < 0.15


def test_a_file_decodes_with_the_quality_it_was_written_with(artifacts):
    dump = held_out()
    blob = CacheCodec(artifacts, quality=42.5).compress_dump(dump)
    found = [CacheCodec(artifacts, quality=quality).decompress_dump(blob) for quality in (0, 42.5, 100)]
    assert all(np.array_equal(each.k, found[1].k) and np.array_equal(each.v, found[1].v) for each in found)
    with Reader(blob) as reader:
        assert reader.header["quality"] == 42.5


@pytest.mark.parametrize("wrong", [-0.1, 100.5, math.nan, math.inf, "35", True])
def test_another_quality_is_refused_when_asked_for_and_when_read(artifacts, wrong):
    with pytest.raises(InputError, match="from 0 to 100"):
        CacheCodec(artifacts, quality=wrong)
    header, body = header_of(CacheCodec(artifacts).compress_dump(held_out()))
    with pytest.raises(FormatError, match="from 0 to 100"):
        CacheCodec(artifacts).decompress_dump(forge({**header, "quality": wrong}, body))


def test_a_method_of_one_ratio_has_no_quality(tmp_path):
    with pytest.raises(InputError, match="no quality 35"):
        CacheCodec(toy_artifacts(tmp_path), quality=35)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
def test_values_without_bound_are_refused(artifacts, value):
    dump = held_out(dtype=np.float32)
    dump.k[1, 0, 1, 50, 3] = value
    with pytest.raises(InputError, match="NaN, infinite or enormous"):
        CacheCodec(artifacts).compress_dump(dump)


def test_one_codec_gives_the_same_bytes_again(artifacts):
    codec, dump = CacheCodec(artifacts), held_out()
    assert codec.compress_dump(dump) == codec.compress_dump(dump) == CacheCodec(artifacts).compress_dump(dump)


# The weights


def test_errors_go_where_the_model_does_not_notice(tmp_path):
    files, matter = [tmp_path / f"{seed}.npz" for seed in range(3)], np.zeros((8, 8), np.float32)
    matter[0, 0] = 1.0
    for seed, path in enumerate(files):
        dump = toy_dump(PLAIN, seed=seed)
        found = toy_sensitivity(dump) | {
            name: np.broadcast_to(matter + 1e-4 * np.eye(8, dtype=np.float32), (3, 2, 8, 8)) for name in STREAMS
        }
        write_dump(path, replace(dump, sensitivity=found))
    codec, dump = CacheCodec(calibrate(files, KVTCRDConfig()), recent=8, quality=20), held_out()
    back = codec.decompress_dump(codec.compress_dump(dump))
    for name in STREAMS:
        error = np.square(back.stream(name) - dump.stream(name).astype(np.float32)).mean(axis=(0, 1, 2, 3))
        assert error[0] < 0.95 * error[1:].min(), name


def test_values_of_tokens_that_will_be_attended_to_are_kept_better(artifacts):
    codec, dump = CacheCodec(artifacts, recent=8, quality=25), held_out(length=400)
    back = codec.decompress_dump(codec.compress_dump(dump))
    middle = slice(4, 392)
    gains = weighting.attention_gains(
        dump.k[:, 0, :, middle].astype(np.float32).transpose(2, 0, 1, 3).reshape(388, 6, 8), artifacts.v.attention
    )
    error = (
        np.square((back.v - dump.v.astype(np.float32))[:, 0, :, middle]).sum(axis=-1).transpose(2, 0, 1).reshape(388, 6)
    )
    for head in range(6):
        order = np.argsort(gains[:, head])
        assert gains[order[-1], head] > 1.5 * gains[order[0], head]
        assert error[order[-100:], head].mean() < 0.8 * error[order[:100], head].mean()


def test_attention_is_learnt_from_keys():
    random = np.random.default_rng(0)
    keys = (random.standard_normal((4000, 3, 8)) * random.uniform(0.5, 3, 8)).astype(np.float32) + 2
    slopes, bias = random.standard_normal((3, 8)) / 3, np.array([-1.0, 0.5, 3.0])
    expected = np.exp((keys * slopes).sum(axis=-1) + bias)
    energy = (expected * random.gamma(2, 0.5, expected.shape)).astype(np.float32)
    found = weighting.learn_attention_predictor(keys, energy) / (weighting.TEMPER / 2)
    np.testing.assert_allclose(found[:, :-1], slopes, atol=0.12)
    logs = (keys * found[:, :-1]).sum(axis=-1) + found[:, -1]
    assert np.abs(logs - np.log(expected)).mean() < 0.35  # a penalty holds slopes back


def test_weights_are_the_softened_root_of_the_fisher_information():
    half = np.random.default_rng(0).standard_normal((5, 8, 8))
    fisher = half @ half.swapaxes(1, 2)
    mean = float(np.trace(fisher, axis1=1, axis2=2).mean() / 8)
    weights = weighting.head_weights(fisher, mean)
    traces = np.trace(fisher, axis1=1, axis2=2)[:, None, None] / 8
    softened = (fisher + weighting.RIDGE * traces * np.eye(8)) / mean
    for got, wanted in zip(weights, softened):
        values, vectors = np.linalg.eigh(wanted)
        np.testing.assert_allclose(got @ got, vectors * values**weighting.POWER @ vectors.T, rtol=1e-3)
    np.testing.assert_allclose(weights, weights.swapaxes(1, 2), atol=1e-12)


def test_dumps_without_a_sensitivity_alone_are_refused_and_beside_others_used(tmp_path):
    plain = tmp_path / "plain.npz"
    write_dump(plain, toy_dump(PLAIN, seed=5))
    with pytest.raises(InputError, match="none of these dumps has a sensitivity"):
        calibrate([plain], KVTCRDConfig())
    rd_artifacts(tmp_path)
    both = calibrate([tmp_path / "measured0.npz", plain], KVTCRDConfig())
    alone = calibrate([tmp_path / "measured0.npz"], KVTCRDConfig())
    assert both.meta["calibration_tokens"] == 2 * alone.meta["calibration_tokens"]
    assert np.corrcoef(both.k.weights.ravel(), alone.k.weights.ravel())[0, 1] > 0.9999


def test_a_sensitivity_of_zero_is_refused(tmp_path):
    dump = toy_dump(PLAIN)
    write_dump(tmp_path / "a.npz", replace(dump, sensitivity={k: 0 * v for k, v in toy_sensitivity(dump).items()}))
    with pytest.raises(InputError, match="zero everywhere"):
        calibrate([tmp_path / "a.npz"], KVTCRDConfig())


def test_weighting_helps_the_fixed_rate_choice_too(tmp_path):
    rd_artifacts(tmp_path)
    files, dump = [tmp_path / f"measured{seed}.npz" for seed in range(3)], held_out()
    costs = []
    for settings in (Published(8.0), kvtc_weighted.KVTCWeightedConfig(8.0)):
        codec = CacheCodec(calibrate(files, settings), recent=8)
        back = codec.decompress_dump(codec.compress_dump(dump))
        fisher, cost = toy_sensitivity(dump), 0.0
        for name in STREAMS:
            error = (back.stream(name) - dump.stream(name).astype(np.float32))[:, 0]
            cost += float(np.einsum("lhtd,lhde,lhte->", error, fisher[name], error))
        costs.append(cost)
    assert costs[1] < 0.85 * costs[0]


# Models


def test_a_model_goes_on_from_it_and_notices_less_at_a_higher_quality(tiny, tmp_path):
    files = [tmp_path / f"{seed}.npz" for seed in range(2)]
    for seed, path in enumerate(files):
        tokens = tiny_tokens(150, seed=seed + 2)
        write_dump(path, replace(lm.dump(tiny, tokens), sensitivity=sensitivity(tiny, tokens, seed=seed)))
    codec = CacheCodec(calibrate(files, KVTCRDConfig()), recent=8)
    tokens = tiny_tokens(120, seed=9)
    dump, following = lm.dump(tiny, tokens[:90]), mx.array([tokens[90:]])
    exact = tiny(following, cache=lm.restore(tiny, dump))[0]
    kl = []
    for quality in (15, 45, 75):
        back = codec.decompress_dump(codec.with_quality(quality).compress_dump(dump))
        kl.append(float(kl_divergence(exact, tiny(following, cache=lm.restore(tiny, back))[0]).mean()))
    assert kl[0] > 3 * kl[1] > 9 * kl[2]

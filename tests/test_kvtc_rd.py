"""The rate-distortion codec: quality is the knob, weights decide where errors go, nothing damaged is believed."""

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_tokens
from forging import forge, header_of
from synthetic import DUAL, LATENT, PLAIN, rd_artifacts, toy_artifacts, toy_dump, toy_sensitivity

from mlxkv import lm
from mlxkv.cache import STREAMS
from mlxkv.codec import basis, entropy, kvtc_rd, kvtc_weighted, weighting
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.calibrate import calibrate
from mlxkv.codec.codec import KVTCCacheCodec
from mlxkv.codec.kvtc import Settings as Published
from mlxkv.codec.kvtc_rd import Settings
from mlxkv.container import Reader, digest
from mlxkv.errors import ChecksumError, FormatError, InputError, MismatchError, MlxkvError
from mlxkv.files import write_dump
from mlxkv.metrics import kl_divergence, relative_error
from mlxkv.sensitivity import sensitivity


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    return rd_artifacts(tmp_path_factory.mktemp("rd"))


def held_out(spec=PLAIN, length=200, **options):
    return toy_dump(spec, length=length, seed=9, **options)


# The knob


@pytest.mark.parametrize("spec", [DUAL, PLAIN, LATENT], ids=["dual", "plain", "mla"])
@pytest.mark.parametrize("batch", [1, 2])
def test_ten_points_of_quality_about_halve_the_error_and_cost_bytes(tmp_path, spec, batch):
    learnt, dump = rd_artifacts(tmp_path, spec), held_out(spec, batch=batch)
    errors, sizes = [], []
    for quality in (20, 30, 40, 50):
        codec = KVTCCacheCodec(learnt, w=8, quality=quality)
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
    blob = KVTCCacheCodec(artifacts, quality=42.5).compress_dump(dump)
    found = [KVTCCacheCodec(artifacts, quality=quality).decompress_dump(blob) for quality in (0, 42.5, 100)]
    assert all(np.array_equal(each.k, found[1].k) and np.array_equal(each.v, found[1].v) for each in found)
    with Reader(blob) as reader:
        assert reader.header["quality"] == 42.5


@pytest.mark.parametrize("wrong", [-0.1, 100.5, math.nan, math.inf, "35", True])
def test_another_quality_is_refused_when_asked_for_and_when_read(artifacts, wrong):
    with pytest.raises(InputError, match="from 0 to 100"):
        KVTCCacheCodec(artifacts, quality=wrong)
    header, body = header_of(KVTCCacheCodec(artifacts).compress_dump(held_out()))
    with pytest.raises(FormatError, match="from 0 to 100"):
        KVTCCacheCodec(artifacts).decompress_dump(forge({**header, "quality": wrong}, body))


def test_a_method_of_one_ratio_has_no_quality(tmp_path):
    with pytest.raises(InputError, match="no quality 35"):
        KVTCCacheCodec(toy_artifacts(tmp_path), quality=35)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
def test_values_without_bound_are_refused(artifacts, value):
    dump = held_out(dtype=np.float32)
    dump.k[1, 0, 1, 50, 3] = value
    with pytest.raises(InputError, match="NaN, infinite or enormous"):
        KVTCCacheCodec(artifacts).compress_dump(dump)


def test_one_codec_gives_the_same_bytes_again(artifacts):
    codec, dump = KVTCCacheCodec(artifacts), held_out()
    assert codec.compress_dump(dump) == codec.compress_dump(dump) == KVTCCacheCodec(artifacts).compress_dump(dump)


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
    codec, dump = KVTCCacheCodec(calibrate(files, Settings()), w=8, quality=20), held_out()
    back = codec.decompress_dump(codec.compress_dump(dump))
    for name in STREAMS:
        error = np.square(back.stream(name) - dump.stream(name).astype(np.float32)).mean(axis=(0, 1, 2, 3))
        assert error[0] < 0.9 * error[1:].min(), name


def test_values_of_tokens_that_will_be_attended_to_are_kept_better(artifacts):
    codec, dump = KVTCCacheCodec(artifacts, w=8, quality=25), held_out(length=400)
    back = codec.decompress_dump(codec.compress_dump(dump))
    middle = slice(4, 392)
    gains = weighting.gains(
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
    found = weighting.learn_attention(keys, energy) / (weighting.TEMPER / 2)
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
        calibrate([plain], Settings())
    rd_artifacts(tmp_path)
    both = calibrate([tmp_path / "measured0.npz", plain], Settings())
    alone = calibrate([tmp_path / "measured0.npz"], Settings())
    assert both.meta["calibration_tokens"] == 2 * alone.meta["calibration_tokens"]
    assert np.corrcoef(both.k.weights.ravel(), alone.k.weights.ravel())[0, 1] > 0.9999


def test_a_sensitivity_of_zero_is_refused(tmp_path):
    dump = toy_dump(PLAIN)
    write_dump(tmp_path / "a.npz", replace(dump, sensitivity={k: 0 * v for k, v in toy_sensitivity(dump).items()}))
    with pytest.raises(InputError, match="zero everywhere"):
        calibrate([tmp_path / "a.npz"], Settings())


def test_weighting_helps_the_fixed_rate_choice_too(tmp_path):
    rd_artifacts(tmp_path)
    files, dump = [tmp_path / f"measured{seed}.npz" for seed in range(3)], held_out()
    costs = []
    for settings in (Published(8.0), kvtc_weighted.Settings(8.0)):
        codec = KVTCCacheCodec(calibrate(files, settings), w=8)
        back = codec.decompress_dump(codec.compress_dump(dump))
        fisher, cost = toy_sensitivity(dump), 0.0
        for name in STREAMS:
            error = (back.stream(name) - dump.stream(name).astype(np.float32))[:, 0]
            cost += float(np.einsum("lhtd,lhde,lhte->", error, fisher[name], error))
        costs.append(cost)
    assert costs[1] < 0.8 * costs[0]


# The basis


def rows_of(width, tokens=400, seed=0):
    random = np.random.default_rng(seed)
    mixed = np.linalg.qr(random.standard_normal((width, width)))[0]
    rows = random.standard_normal((tokens, width)) * 0.9 ** np.arange(width) @ mixed
    return (rows - rows.mean(axis=0)).astype(np.float32)


@pytest.mark.parametrize("width", [48, 50])
def test_a_basis_stays_within_its_bound_and_uses_it(width):
    rows, heads = rows_of(width), width // 2
    errors = []
    for budget in (500, 900, 1600, 2600, 10_000):
        found = basis.learn(rows.copy(), heads, budget, 0)
        held = found.V8.nbytes + found.V4.nbytes + found.scale.nbytes + found.spread.nbytes
        assert 0.8 * min(budget, (found.V8.shape[1] == width and held) or budget) < held <= budget
        back = np.array(found.rows(found.project(mx.array(rows), found.rank)))
        errors.append(np.square(back - rows).sum() / np.square(rows).sum())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4
    assert basis.learn(rows.copy(), heads, None, 0).V8.shape == (width, width)


def test_weak_components_do_not_take_up_strong_ones():
    rows = rows_of(64) * np.float32(100)
    found = basis.learn(rows.copy(), 4, 3200, 0)
    assert found.V4.shape[1] > 20
    exact = basis.learn(rows.copy(), 4, None, 0)
    together, alone = np.array(found.project(mx.array(rows), 64)), np.array(exact.project(mx.array(rows), 64))
    weak = slice(found.V8.shape[1], found.rank)
    leaked = np.array(mx.array(rows) @ found.matrix.T)[:, weak] - alone[:, weak]
    assert np.square(together[:, weak] - alone[:, weak]).sum() < 0.3 * np.square(leaked).sum()


@pytest.mark.parametrize("budget", [2200, None])
def test_refined_coefficients_make_up_for_the_rounding_of_the_basis(budget):
    rows = rows_of(48)
    found = basis.learn(rows.copy(), 4, budget, 0)
    left = [rows - np.array(found.rows(found.project(mx.array(rows), 48, refined))) for refined in (False, True)]
    assert np.square(left[1]).sum() < 0.1 * np.square(left[0]).sum()


def test_components_that_no_step_reaches_are_left_out():
    found = basis.learn(rows_of(48), 4, None, 0)
    spread = found.spread.astype(float)
    for least in (0.0, 0.05, 0.3, 10.0):
        count = found.reaching(least)
        assert (spread[count:] < least).all()
        assert count == 0 or spread[count - 1] >= least
    assert found.project(mx.array(rows_of(48)), 0).shape == (400, 0)


def test_a_bound_that_nothing_fits_is_refused(tmp_path):
    with pytest.raises(InputError, match="hold no component"):
        basis.learn(rows_of(48), 4, 20, 0)
    with pytest.raises(InputError, match="raise basis_bytes"):
        rd_artifacts(tmp_path, basis_bytes=30_000)
    limit = 75_000
    assert rd_artifacts(tmp_path, basis_bytes=limit).nbytes <= limit


@pytest.mark.parametrize(
    "wrong", [{"basis_bytes": 0}, {"basis_bytes": 1.5}, {"samples_per_file": 0}, {"s": -1}, {"seed": None}]
)
def test_settings_of_another_type_or_range_are_refused(wrong):
    with pytest.raises(InputError):
        Settings(**wrong)


# Files


def test_artifacts_come_back_from_their_folder(artifacts, tmp_path):
    artifacts.save(tmp_path)
    again = CalibrationArtifacts.from_dir(tmp_path)
    assert again.fingerprint == artifacts.fingerprint
    assert again.nbytes == artifacts.nbytes
    blob = KVTCCacheCodec(artifacts).compress_dump(held_out())
    assert np.array_equal(
        KVTCCacheCodec(again).decompress_dump(blob).k, KVTCCacheCodec(artifacts).decompress_dump(blob).k
    )
    for name in ("k_V8", "v_attention", "k_tables", "v_weights", "k_spread"):
        path = tmp_path / f"{name}.npy"
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(ChecksumError, match=name):
            CalibrationArtifacts.from_dir(tmp_path)
        path.write_bytes(data)


@pytest.mark.parametrize(
    "change",
    [
        {"mu": np.zeros(47, np.float32)},
        {"mu": np.zeros(48)},
        {"V8": np.zeros((48, 3), np.int8)},
        {"V4": np.zeros((24, 2), np.uint8)},
        {"scale": np.zeros((5, 48), np.float16)},
        {"scale": np.full((6, 48), np.inf, np.float16)},
        {"spread": np.zeros(3, np.float16)},
        {"weights": np.zeros((6, 8, 7), np.float16)},
        {"weights": np.full((6, 8, 8), np.nan, np.float16)},
        {"attention": np.zeros((5, 9), np.float32)},
        {"tables": np.zeros((63, 256), np.uint16)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_artifacts_that_do_not_fit_each_other_are_refused(artifacts, change):
    with pytest.raises(FormatError):
        replace(artifacts.v, **change)


def test_weights_without_an_inverse_are_refused(artifacts):
    flat = replace(artifacts.k, weights=np.zeros((6, 8, 8), np.float16))
    codec = KVTCCacheCodec(replace(artifacts, k=flat))
    with pytest.raises(FormatError, match="no inverse"):
        codec.compress_dump(held_out())


def test_other_artifacts_and_another_method_are_refused(artifacts, tmp_path):
    other, published = rd_artifacts(tmp_path, seeds=(3, 4)), toy_artifacts(tmp_path, PLAIN)
    blob = KVTCCacheCodec(artifacts).compress_dump(held_out())
    with pytest.raises(MismatchError, match="needs artifacts"):
        KVTCCacheCodec(other).decompress_dump(blob)
    with pytest.raises(FormatError, match="coded by method 'kvtc-rd'; these artifacts are of 'kvtc'"):
        KVTCCacheCodec(published).decompress_dump(blob)


def test_every_damaged_byte_is_refused(artifacts):
    codec, random = KVTCCacheCodec(artifacts, w=3), np.random.default_rng(0)
    blob = codec.compress_dump(held_out(length=60))
    for _ in range(300):
        damaged = bytearray(blob)
        damaged[random.integers(len(blob))] ^= 1 << random.integers(8)
        with pytest.raises(FormatError):
            codec.decompress_dump(bytes(damaged))


def test_forged_sections_are_refused_or_decode_to_the_right_shapes(artifacts):
    """With checksums that fit: the entropy coder's own checks are all there is."""
    codec, random, refused = KVTCCacheCodec(artifacts, w=3), np.random.default_rng(1), 0
    header, body = header_of(codec.compress_dump(held_out(length=60)))
    starts = np.cumsum([0, *(row[3] for row in header["sections"])])
    for index, row in enumerate(header["sections"]):
        if row[0] not in ("k.0", "v.0"):
            continue
        for _ in range(60):
            data = bytearray(body[starts[index] : starts[index + 1]])
            if random.random() < 0.3:
                data = data[: random.integers(len(data))]
            else:
                data[random.integers(len(data))] ^= 1 << random.integers(8)
            rows = [list(each) for each in header["sections"]]
            rows[index][2:] = [len(data), len(data), digest(bytes(data)).hex()]
            forged = forge(
                {**header, "sections": rows}, body[: starts[index]] + bytes(data) + body[starts[index + 1] :]
            )
            try:
                assert codec.decompress_dump(forged).length == 60
            except MlxkvError:
                refused += 1
    assert refused > 90


def test_a_section_too_small_for_its_tokens_is_refused_before_anything_is_allocated(artifacts):
    codec = KVTCCacheCodec(artifacts, w=3)
    header, body = header_of(codec.compress_dump(held_out(length=60)))
    header["layout"]["length"], header["layout"]["block"] = 40_007, 40_000
    with pytest.raises(FormatError, match=r"k\.0 of 40000 tokens has"):
        codec.decompress_dump(forge(header, body))


def test_a_conversation_is_appended_to_and_a_part_of_it_restored(artifacts, tmp_path):
    codec, dump, path = KVTCCacheCodec(artifacts, w=8), held_out(length=1400), tmp_path / "a.mlxkv"
    short = replace(dump, k=dump.k[..., :1100, :], v=dump.v[..., :1100, :], tokens=dump.tokens[:, :1100])
    path.write_bytes(codec.compress_dump(short))
    with pytest.raises(MismatchError, match="another quality"):
        codec.at(50).append_dump(path, dump)
    codec.append_dump(path, dump)
    assert path.read_bytes() == codec.compress_dump(dump)
    whole, part = codec.decompress_dump(path), codec.decompress_dump(path, tokens=(500, 1030))
    assert np.array_equal(part.v, whole.v[..., 500:1030, :])


# Models


def test_a_model_goes_on_from_it_and_notices_less_at_a_higher_quality(tiny, tmp_path):
    files = [tmp_path / f"{seed}.npz" for seed in range(2)]
    for seed, path in enumerate(files):
        tokens = tiny_tokens(150, seed=seed + 2)
        write_dump(path, replace(lm.dump(tiny, tokens), sensitivity=sensitivity(tiny, tokens, seed=seed)))
    codec = KVTCCacheCodec(calibrate(files, Settings()), w=8)
    tokens = tiny_tokens(120, seed=9)
    dump, following = lm.dump(tiny, tokens[:90]), mx.array([tokens[90:]])
    exact = tiny(following, cache=lm.restore(tiny, dump))[0]
    kl = []
    for quality in (15, 45, 75):
        back = codec.decompress_dump(codec.at(quality).compress_dump(dump))
        kl.append(float(kl_divergence(exact, tiny(following, cache=lm.restore(tiny, back))[0]).mean()))
    assert kl[0] > 3 * kl[1] > 9 * kl[2]


# Bytes from elsewhere


def test_steps_are_powers_that_every_machine_agrees_on():
    assert kvtc_rd.step_of(30, "k") == 1.5
    assert kvtc_rd.step_of(30, "v") == 1 / 1.5
    assert kvtc_rd.step_of(50, "k") == 0.375


def test_integers_do_not_depend_on_the_machine(artifacts):
    """What floating point decides is only the values that integers stand for."""
    coder, dump = KVTCCacheCodec(artifacts).coder, held_out(length=64)
    codec = KVTCCacheCodec(artifacts, w=0, s=0, quality=40)
    with Reader(codec.compress_dump(dump)) as reader:
        payload = reader.read("k.0")
    integers = entropy.decode(payload, artifacts.k.tables, 64, artifacts.k.basis.rank)
    assert coder.pack("k", integers) == payload

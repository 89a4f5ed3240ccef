import dataclasses

import mlx.core as mx
import numpy as np
import pytest
from synthetic import DUAL, LATENT, PE, PLAIN, ROPE, toy_artifacts, toy_dump

from mlxkv.codec.session import CacheCodec
from mlxkv.errors import FormatError, InputError, MismatchError
from mlxkv.io.container import Reader

SPECS = {"dual": DUAL, "latent": LATENT}


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    return {name: toy_artifacts(tmp_path_factory.mktemp(name), spec) for name, spec in SPECS.items()}


@pytest.fixture
def codec(calibrated):
    return CacheCodec(calibrated["dual"])


@pytest.fixture(params=SPECS)
def either(request, calibrated):
    return CacheCodec(calibrated[request.param])


def layers(dump, kind=np.array):
    return [kind(layer) for layer in dump.k], [kind(layer) for layer in dump.v]


def relative_error(found, expected):
    found, expected = np.stack(found).astype(np.float64), np.asarray(expected, np.float64)
    return np.sqrt(np.square(found - expected).sum() / np.square(expected - expected.mean()).sum())


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_sinks_and_window_are_bit_exact(either, dtype):
    dump = toy_dump(either.artifacts.spec, dtype=dtype, seed=9)
    k, v = either.decompress(either.compress(*layers(dump)))
    for found, expected in ((np.stack(k), dump.k), (np.stack(v), dump.v)):
        assert found.dtype == dtype
        assert found.shape == expected.shape
        assert found[..., :4, :].tobytes() == expected[..., :4, :].tobytes()
        assert found[..., -128:, :].tobytes() == expected[..., -128:, :].tobytes()


def test_bfloat16_sinks_and_window_are_exact(codec):
    k, v = layers(toy_dump(dtype=np.float32, seed=9), lambda x: mx.array(x).astype(mx.bfloat16))
    for found, expected in zip(codec.decompress(codec.compress(k, v)), (k, v)):
        wide = np.stack([np.array(layer.astype(mx.float32)) for layer in expected])
        assert np.stack(found).dtype == np.float32
        assert np.array_equal(np.stack(found)[..., :4, :], wide[..., :4, :])
        assert np.array_equal(np.stack(found)[..., -128:, :], wide[..., -128:, :])
        assert relative_error(found, wide) < 0.1


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_mlx_and_numpy_arrays_give_the_same_bytes(either, dtype):
    dump = toy_dump(either.artifacts.spec, dtype=dtype)
    assert either.compress(*layers(dump, mx.array)) == either.compress(*layers(dump))


def test_compressing_twice_gives_the_same_bytes(either):
    dump = toy_dump(either.artifacts.spec)
    assert either.compress(*layers(dump)) == either.compress(*layers(dump))


def test_the_middle_comes_back_almost_as_it_was(either):
    dump = toy_dump(either.artifacts.spec, seed=9)
    k, v = either.decompress(either.compress(*layers(dump)))
    assert 0 < relative_error(k, dump.k) < 0.1
    assert v[0].size == 0 or 0 < relative_error(v, dump.v) < 0.1


def test_the_error_falls_with_the_ratio(tmp_path):
    dump, errors, sizes = toy_dump(seed=9), [], []
    for ratio in (16, 8, 4, 2):
        (tmp_path / str(ratio)).mkdir()
        codec = CacheCodec(toy_artifacts(tmp_path / str(ratio), ratio=ratio), recent=0)
        blob = codec.compress(*layers(dump))
        errors.append(relative_error(codec.decompress(blob)[0], dump.k))
        sizes.append(len(blob))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 10
    assert sizes == sorted(sizes)


def test_rotation_costs_nothing_because_it_is_undone(tmp_path):
    errors = []
    for spec in (DUAL, PLAIN):
        (tmp_path / str(spec == DUAL)).mkdir()
        codec = CacheCodec(toy_artifacts(tmp_path / str(spec == DUAL), spec, ratio=8), recent=0)
        dump = toy_dump(spec, seed=9, dtype=np.float32)
        errors.append(relative_error(codec.decompress(codec.compress(*layers(dump)))[0], dump.k))
    assert errors[0] == pytest.approx(errors[1], rel=0.1)


def test_a_batch_of_two_is_two_caches(either):
    dump = toy_dump(either.artifacts.spec, batch=2, seed=9, dtype=np.float32)
    together = either.decompress(either.compress(*layers(dump)))
    for row in range(2):
        alone = either.decompress(
            either.compress([x[row : row + 1] for x in dump.k], [x[row : row + 1] for x in dump.v])
        )
        for whole, single in zip(together, alone):
            difference = np.abs(np.stack(whole)[:, row : row + 1] - np.stack(single))
            assert difference.size == 0 or (difference > 1e-5).mean() < 0.01


@pytest.mark.parametrize("length", [1, 4, 131, 132, 133, 140, 512 + 132 + 1])
def test_every_length_works_and_short_caches_are_exact(either, length):
    dump = toy_dump(either.artifacts.spec, length=length, batch=2, seed=9)
    blob = either.compress(*layers(dump))
    k, v = either.decompress(blob)
    with Reader(blob) as reader:
        blocks = sum(name.startswith("k.") and name[2:].isdigit() for name in reader.sections)
    assert blocks == -(-max(0, length - 132) // 256)  # 512 rows, two of them a token
    exact = [np.array_equal(np.stack(k), dump.k), np.array_equal(np.stack(v), dump.v) and bool(dump.v.size)]
    assert exact == [length <= 132, length <= 132 and bool(dump.v.size)]
    assert relative_error(k, dump.k) < 0.1


@pytest.mark.parametrize(("s", "w"), [(0, 0), (0, 7), (9, 0), (1, 400), (400, 1)])
def test_a_blob_decodes_with_its_own_sinks_and_window(calibrated, s, w):
    dump = toy_dump(seed=9)
    writer, reader = (
        CacheCodec(calibrated["dual"], recent=w, sinks=s),
        CacheCodec(calibrated["dual"], recent=33, sinks=2),
    )
    blob = writer.compress(*layers(dump))
    for found, expected in zip(reader.decompress(blob), writer.decompress(blob)):
        assert np.array_equal(found, expected)
    k = np.stack(reader.decompress(blob)[0])
    assert np.array_equal(k[..., :s, :], dump.k[..., :s, :])
    assert np.array_equal(k[..., max(0, 300 - w) :, :], dump.k[..., max(0, 300 - w) :, :])


def test_a_blob_decodes_from_a_file_too(codec, tmp_path):
    blob = codec.compress(*layers(toy_dump()))
    (tmp_path / "cache.mlxkv").write_bytes(blob)
    for a, b in zip(codec.decompress(tmp_path / "cache.mlxkv"), codec.decompress(blob)):
        assert np.array_equal(a, b)


def test_other_artifacts_are_refused_by_both_fingerprints(codec, tmp_path):
    other = CacheCodec(toy_artifacts(tmp_path, ratio=5.0))
    with pytest.raises(MismatchError) as refused:
        other.decompress(codec.compress(*layers(toy_dump())))
    assert codec.artifacts.fingerprint in str(refused.value)
    assert other.artifacts.fingerprint in str(refused.value)
    assert codec.artifacts.fingerprint != other.artifacts.fingerprint


@pytest.mark.parametrize(
    "damage",
    [
        lambda k, v: (k[:2], v),
        lambda k, v: (k, v + v[:1]),
        lambda k, v: ([], []),
        lambda k, v: ([x[:, :1] for x in k], v),
        lambda k, v: (k, [x[..., :4] for x in v]),
        lambda k, v: ([x[0] for x in k], v),
        lambda k, v: ([x.astype(np.float32) for x in k], v),
        lambda k, v: ([k[0].astype(np.float32), *k[1:]], v),
        lambda k, v: ([x.astype(np.float64) for x in k], [x.astype(np.float64) for x in v]),
        lambda k, v: ([x.astype(np.int32) for x in k], [x.astype(np.int32) for x in v]),
        lambda k, v: ([x[:, :, :-1] for x in k], v),
        lambda k, v: ([k[0][:, :, :-1], *k[1:]], v),
        lambda k, v: ([np.repeat(x, 2, axis=0) for x in k], v),
        lambda k, v: ([x[:, :, :0] for x in k], [x[:, :, :0] for x in v]),
        lambda k, v: ([x[:0] for x in k], [x[:0] for x in v]),
    ],
)
def test_a_cache_of_another_geometry_is_refused(codec, damage):
    with pytest.raises(MismatchError):
        codec.compress(*damage(*layers(toy_dump())))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("name", ["k", "v"])
def test_values_that_cannot_be_coded_are_refused(codec, name, value):
    dump = toy_dump(dtype=np.float32)
    getattr(dump, name)[1, 0, 1, 100, 3] = value
    with pytest.raises(InputError, match="NaN, infinite or enormous"):
        codec.compress(*layers(dump))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_sinks_may_hold_anything(codec, dtype):
    dump = toy_dump(dtype=dtype)
    dump.k[0, 0, 0, 0, :4] = [np.nan, np.inf, -np.inf, -0.0]
    k, _ = codec.decompress(codec.compress(*layers(dump)))
    assert k[0][..., :4, :].tobytes() == dump.k[0][..., :4, :].tobytes()


def test_negative_sinks_or_window_are_refused(calibrated):
    for numbers in ({"recent": -1}, {"sinks": -1}):
        with pytest.raises(InputError, match="0 or more"):
            CacheCodec(calibrated["dual"], **numbers)


def test_a_statement_about_the_rope_is_checked(calibrated):
    for name, right in (("dual", ROPE), ("latent", dataclasses.replace(PE, offset=20))):
        CacheCodec(calibrated[name], rope_cfg=right)
        CacheCodec(calibrated[name], rope_cfg={"base": 10000.0, "dims": right.dims})
        with pytest.raises(MismatchError, match="500000"):
            CacheCodec(calibrated[name], rope_cfg={"base": 500000.0})
        with pytest.raises(MismatchError, match="traditional"):
            CacheCodec(calibrated[name], rope_cfg=dataclasses.replace(right, traditional=not right.traditional))


def test_a_statement_about_the_mode_is_checked(calibrated):
    CacheCodec(calibrated["latent"], mode="single_stream")
    with pytest.raises(MismatchError, match="are single_stream, not dual_stream"):
        CacheCodec(calibrated["latent"], mode="dual_stream")


def test_a_dump_comes_back_whole(either):
    dump = toy_dump(either.artifacts.spec, states=True, seed=9, batch=2)
    again = either.decompress_dump(either.compress_dump(dump))
    assert np.array_equal(again.tokens, dump.tokens)
    assert again.tokens.dtype == np.int32
    assert again.states.keys() == {"0.0"}
    assert again.states["0.0"].tobytes() == dump.states["0.0"].tobytes()
    assert (again.model, again.fingerprint, again.dtype) == ("a/toy", "f00d.cafe", "float16")
    assert again.spec == dump.spec
    assert relative_error(again.k, dump.k) < 0.1


def test_a_container_without_tokens_is_no_dump(codec):
    with pytest.raises(FormatError, match="no tokens"):
        codec.decompress_dump(codec.compress(*layers(toy_dump())))


def test_arrays_that_would_lose_bits_are_refused_as_extras(codec):
    dump = toy_dump()
    for array in (np.array([0.1]), np.array([1j]), np.array(["text"])):
        with pytest.raises(InputError, match=str(array.dtype)):
            codec.compress(*layers(dump), extras={"tokens": array})


def test_a_dump_of_another_model_is_refused(codec):
    with pytest.raises(MismatchError, match="beef"):
        codec.compress_dump(toy_dump(fingerprint="beef"))
    with pytest.raises(MismatchError, match="rotation"):
        codec.compress_dump(toy_dump(PLAIN))


def test_progress_counts_the_coded_tokens(codec):
    done = []
    blob = codec.compress(*layers(toy_dump(length=800)), progress=done.append)
    assert done == [512, 800 - 132 - 512]
    codec.decompress(blob, progress=done.append)
    assert sum(done) == 2 * (800 - 132)

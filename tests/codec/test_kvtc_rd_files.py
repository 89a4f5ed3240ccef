"""Files and artifacts of kvtc-rd: nothing damaged, forged or of another calibration is believed."""

from dataclasses import replace

import numpy as np
import pytest
from forging import forge, header_of
from synthetic import PLAIN, rd_artifacts, toy_artifacts, toy_dump

from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.methods import kvtc_rd
from mlxkv.codec.session import CacheCodec
from mlxkv.codec.stages import entropy
from mlxkv.errors import ChecksumError, FormatError, MismatchError, MlxkvError
from mlxkv.io.container import Reader, digest


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    return rd_artifacts(tmp_path_factory.mktemp("rd"))


def held_out(spec=PLAIN, length=200, **options):
    return toy_dump(spec, length=length, seed=9, **options)


def test_artifacts_come_back_from_their_folder(artifacts, tmp_path):
    artifacts.save(tmp_path)
    again = CalibrationArtifacts.from_dir(tmp_path)
    assert again.fingerprint == artifacts.fingerprint
    assert again.nbytes == artifacts.nbytes
    blob = CacheCodec(artifacts).compress_dump(held_out())
    assert np.array_equal(CacheCodec(again).decompress_dump(blob).k, CacheCodec(artifacts).decompress_dump(blob).k)
    for name in ("k_codes", "v_attention", "k_tables", "v_weights", "k_spread"):
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
        {"codes": np.zeros(3, np.uint8)},
        {"scale": np.zeros(48, np.float16)},
        {"scale": np.full(48, np.inf, np.float32)},
        {"spread": np.zeros(3, np.float32)},
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


@pytest.mark.parametrize("shape", [(6, 8), (6, 10), (0, 9)])
def test_attention_of_other_keys_is_refused(artifacts, shape):
    other = replace(artifacts, v=replace(artifacts.v, attention=np.zeros(shape, np.float32)))
    with pytest.raises(FormatError, match="not of the keys' 6 heads of 8"):
        CacheCodec(other)
    with pytest.raises(FormatError, match="not of the keys'"):
        CacheCodec(replace(artifacts, k=replace(artifacts.k, attention=artifacts.v.attention)))


def test_weights_without_an_inverse_are_refused(artifacts):
    flat = replace(artifacts.k, weights=np.zeros((6, 8, 8), np.float16))
    codec = CacheCodec(replace(artifacts, k=flat))
    with pytest.raises(FormatError, match="no inverse"):
        codec.compress_dump(held_out())


def test_other_artifacts_and_another_method_are_refused(artifacts, tmp_path):
    other, published = rd_artifacts(tmp_path, seeds=(3, 4)), toy_artifacts(tmp_path, PLAIN)
    blob = CacheCodec(artifacts).compress_dump(held_out())
    with pytest.raises(MismatchError, match="needs artifacts"):
        CacheCodec(other).decompress_dump(blob)
    with pytest.raises(FormatError, match="coded by method 'kvtc-rd'; these artifacts are of 'kvtc'"):
        CacheCodec(published).decompress_dump(blob)


def test_every_damaged_byte_is_refused(artifacts):
    codec, random = CacheCodec(artifacts, recent=3), np.random.default_rng(0)
    blob = codec.compress_dump(held_out(length=60))
    for _ in range(300):
        damaged = bytearray(blob)
        damaged[random.integers(len(blob))] ^= 1 << random.integers(8)
        with pytest.raises(FormatError):
            codec.decompress_dump(bytes(damaged))


def test_forged_sections_are_refused_or_decode_to_the_right_shapes(artifacts):
    """With checksums that fit: the entropy coder's own checks are all there is."""
    codec, random, refused = CacheCodec(artifacts, recent=3), np.random.default_rng(1), 0
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
    codec = CacheCodec(artifacts, recent=3)
    header, body = header_of(codec.compress_dump(held_out(length=60)))
    header["layout"]["length"], header["layout"]["block"] = 40_007, 40_000
    with pytest.raises(FormatError, match=r"k\.0 of 40000 tokens has"):
        codec.decompress_dump(forge(header, body))


def test_a_conversation_is_appended_to_and_a_part_of_it_restored(artifacts, tmp_path):
    codec, dump, path = CacheCodec(artifacts, recent=8), held_out(length=1400), tmp_path / "a.mlxkv"
    short = replace(dump, k=dump.k[..., :1100, :], v=dump.v[..., :1100, :], tokens=dump.tokens[:, :1100])
    path.write_bytes(codec.compress_dump(short))
    with pytest.raises(MismatchError, match="another quality"):
        codec.with_quality(50).append_dump(path, dump)
    codec.append_dump(path, dump)
    assert path.read_bytes() == codec.compress_dump(dump)
    whole, part = codec.decompress_dump(path), codec.decompress_dump(path, tokens=(500, 1030))
    assert np.array_equal(part.v, whole.v[..., 500:1030, :])


def test_steps_are_powers_that_every_machine_agrees_on():
    assert kvtc_rd.step_size(30, "k") == 1.5
    assert kvtc_rd.step_size(30, "v") == 1 / 1.5
    assert kvtc_rd.step_size(50, "k") == 0.375


def test_integers_do_not_depend_on_the_machine(artifacts):
    """What floating point decides is only the values that integers stand for."""
    coder, dump = CacheCodec(artifacts).coder, held_out(length=64)
    codec = CacheCodec(artifacts, recent=0, sinks=0, quality=40)
    with Reader(codec.compress_dump(dump)) as reader:
        payload = reader.read("k.0")
    [integers] = entropy.decode([entropy.Section(payload, artifacts.k.tables, 64, artifacts.k.basis.rank)])
    assert coder.pack("k", integers) == payload

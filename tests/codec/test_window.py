"""The window of a method with a quality: coded at a higher one, or raw where that is asked for."""

from dataclasses import replace

import numpy as np
import pytest
from forging import forge, header_of
from synthetic import LATENT, PLAIN, rd_artifacts, toy_artifacts, toy_dump

from mlxkv.codec import writing
from mlxkv.codec.session import CacheCodec
from mlxkv.codec.summary import summary
from mlxkv.errors import FormatError, MismatchError
from mlxkv.io.container import Reader


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    return rd_artifacts(tmp_path_factory.mktemp("rd"))


def header(blob):
    with Reader(blob) as reader:
        return {**reader.header, "names": list(reader.sections), "summary": summary(reader)}


def squared(found, dump, tokens):
    return sum(
        np.square(a[..., tokens, :] - b[..., tokens, :]).sum() for a, b in ((found.k, dump.k), (found.v, dump.v))
    )


def widened(dump):
    return replace(dump, k=dump.k.astype(np.float32), v=dump.v.astype(np.float32))


@pytest.mark.parametrize("spec", [PLAIN, LATENT], ids=["plain", "mla"])
def test_the_window_is_nearly_exact_and_takes_fewer_bytes_than_raw(tmp_path, spec):
    codec = CacheCodec(rd_artifacts(tmp_path, spec), recent=60, sinks=4, quality=30)
    exact = CacheCodec(codec.artifacts, recent=60, sinks=4, quality=30, raw_window=True)
    dump = widened(toy_dump(spec, length=200, seed=9))
    blob, raw = codec.compress_dump(dump), exact.compress_dump(dump)
    found, kept = widened(codec.decompress_dump(blob)), exact.decompress_dump(raw)
    assert np.array_equal(kept.k[..., 140:, :], dump.k[..., 140:, :])
    assert 0 < squared(found, dump, slice(140, None)) / 60 < squared(found, dump, slice(4, 140)) / 136 / 10
    assert np.array_equal(found.k[..., :140, :], kept.k[..., :140, :])
    assert header(blob)["summary"]["sink_and_window_bytes"] < 0.6 * header(raw)["summary"]["sink_and_window_bytes"]
    assert header(blob)["window_quality"] == 60
    assert "window_quality" not in header(raw)


def test_bytes_of_a_coded_window_are_counted_with_the_window(artifacts):
    dump = toy_dump(PLAIN, length=200, seed=9)
    coded, raw, none = (
        header(CacheCodec(artifacts, **options).compress_dump(dump))["summary"]
        for options in ({"recent": 60}, {"recent": 60, "raw_window": True}, {"recent": 0})
    )
    assert coded["coded_bytes"] == raw["coded_bytes"] < none["coded_bytes"]
    assert coded["ratio_middle"] == raw["ratio_middle"]
    assert raw["sink_and_window_bytes"] > coded["sink_and_window_bytes"] > none["sink_and_window_bytes"] > 0
    for each in (coded, raw, none):
        parts = ("coded_bytes", "sink_and_window_bytes", "other_bytes", "header_bytes")
        assert sum(each[part] for part in parts) == each["file_bytes"]


def test_a_method_of_one_ratio_has_a_raw_window(tmp_path):
    found = header(CacheCodec(toy_artifacts(tmp_path), recent=60).compress_dump(toy_dump(length=200)))
    assert "window_quality" not in found
    assert {"k.window", "v.window"} <= found["raw"].keys()


@pytest.mark.parametrize(("quality", "of_window"), [(0, 30), (55.5, 85.5), (90, 100)])
def test_the_window_is_30_points_finer_up_to_100(artifacts, quality, of_window):
    codec = CacheCodec(artifacts, recent=10).with_quality(quality)
    assert header(codec.compress_dump(toy_dump(PLAIN, length=40, seed=9)))["window_quality"] == of_window


@pytest.mark.parametrize(
    ("length", "recent", "names"),
    [
        (40, 0, ["k.0", "v.0", "k.1", "v.1", "k.2", "v.2"]),
        (40, 20, ["k.0", "v.0", "k.window.0", "v.window.0", "k.window.1", "v.window.1"]),
        (20, 100, ["k.window.0", "v.window.0"]),
        (4, 3, []),
        (1, 0, []),
    ],
)
def test_a_window_longer_than_a_block_is_in_pieces(artifacts, monkeypatch, length, recent, names):
    monkeypatch.setattr(writing, "BLOCK_ROWS", 16)
    codec, dump = CacheCodec(artifacts, recent=recent, sinks=4), toy_dump(PLAIN, length=length, seed=9)
    blob = codec.compress_dump(dump)
    assert header(blob)["names"] == ["k.sink", "v.sink", *names, "tokens"]
    whole = codec.decompress_dump(blob)
    for first, last in ((0, length), (length - 1, length), (length // 2, length), (0, length // 2 + 1)):
        part = codec.decompress_dump(blob, tokens=(first, last))
        assert np.array_equal(part.k, whole.k[..., first:last, :])
        assert np.array_equal(part.v, whole.v[..., first:last, :])


def test_a_file_with_a_raw_window_is_not_appended_to_with_a_coded_one(artifacts, tmp_path):
    path, dump = tmp_path / "a.mlxkv", toy_dump(PLAIN, length=60, seed=9)
    short = replace(dump, k=dump.k[..., :40, :], v=dump.v[..., :40, :], tokens=dump.tokens[:, :40])
    raw, coded = (CacheCodec(artifacts, recent=8, raw_window=raw) for raw in (True, False))
    for first, other in ((raw, coded), (coded, raw)):
        path.write_bytes(first.compress_dump(short))
        with pytest.raises(MismatchError, match="another window_quality"):
            other.append_dump(path, dump)
        first.append_dump(path, dump)
        assert path.read_bytes() == first.compress_dump(dump)


@pytest.mark.parametrize("wrong", ["60", -1, 100.5, float("nan"), True, [60]])
def test_another_quality_of_the_window_is_refused_when_read(artifacts, wrong):
    codec = CacheCodec(artifacts, recent=10)
    found, body = header_of(codec.compress_dump(toy_dump(PLAIN, length=40, seed=9)))
    with pytest.raises(FormatError):
        codec.decompress_dump(forge({**found, "window_quality": wrong}, body))


def test_a_window_that_is_missing_or_claimed_raw_is_refused(artifacts):
    codec = CacheCodec(artifacts, recent=10)
    found, body = header_of(codec.compress_dump(toy_dump(PLAIN, length=40, seed=9)))
    with pytest.raises(FormatError, match=r"k\.window"):
        codec.decompress_dump(forge({key: found[key] for key in found if key != "window_quality"}, body))
    rows = [["k.other", *row[1:]] if row[0] == "k.window.0" else row for row in found["sections"]]
    with pytest.raises(FormatError, match=r"k\.window\.0 of 10 tokens is missing"):
        codec.decompress_dump(forge({**found, "sections": rows}, body))


def test_what_a_file_takes_is_estimated_with_its_window(artifacts):
    codec, dump = CacheCodec(artifacts, recent=60, sinks=4), toy_dump(PLAIN, length=200, seed=9)
    estimated = codec.fixed_bytes(dump) + codec.coded_bytes(dump, 4)
    assert estimated == pytest.approx(len(codec.compress_dump(dump)), rel=0.05)

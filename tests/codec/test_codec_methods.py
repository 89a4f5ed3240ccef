"""The interface of codec methods: one from another package works everywhere, and foreign settings and artifacts are refused."""

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import pytest
from synthetic import DUAL, LATENT, PLAIN, rd_artifacts, toy_artifacts, toy_dump

from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.calibrate import calibrate
from mlxkv.codec.methods import codec_methods
from mlxkv.codec.methods.base import BlockCoder, CodecConfig, CodecMethod, StreamArtifacts, checked_streams
from mlxkv.codec.methods.kvtc import KVTC, KVTCConfig
from mlxkv.codec.methods.kvtc_rd import KVTCRD, KVTCRDConfig
from mlxkv.codec.methods.kvtc_weighted import KVTCWeighted, KVTCWeightedConfig
from mlxkv.codec.samples import Samples
from mlxkv.codec.session import CacheCodec
from mlxkv.config import integer
from mlxkv.dump import write_dump
from mlxkv.errors import FormatError, InputError, MismatchError
from mlxkv.io.container import Reader

SPECS = {"dual": DUAL, "latent": LATENT}


@dataclass(frozen=True, kw_only=True)
class RoundingConfig(CodecConfig):
    """Settings of a method that rounds rows to so many levels."""

    levels: int = integer(100, least=2)


@dataclass(frozen=True)
class Levels:
    """A field that is neither array nor plan."""

    count: int

    def to_json(self):
        return {"count": self.count}

    @classmethod
    def from_json(cls, data):
        if type(data.get("count")) is not int:
            raise FormatError("not levels")
        return cls(data["count"])


@dataclass(frozen=True)
class RoundingStream(StreamArtifacts):
    mu: np.ndarray
    scale: np.ndarray
    levels: Levels

    @property
    def width(self):
        return self.mu.size


class RoundingCoder(BlockCoder):
    uses_lossless_stage = True

    def __init__(self, streams):
        self.streams = streams

    def check_quality(self, quality):
        if quality is not None:
            raise InputError("no quality")

    def encode(self, rows, quality):
        return {
            name: np.array(mx.clip(mx.round((x - self.streams[name].mu) / self.streams[name].scale), -127, 127))
            for name, x in rows.items()
        }

    def pack(self, name, codes):
        return codes.astype(np.int8).tobytes()

    def estimate(self, name, codes):
        return float(codes.size)

    def is_size(self, name, tokens, size, coding):
        return size == tokens * self.streams[name].width

    def unpack(self, blocks, tokens):
        return [
            {name: np.frombuffer(data, np.int8).reshape(count, -1) for name, data in block.items()}
            for block, count in zip(blocks, tokens)
        ]

    def decode(self, codes, tokens, quality):
        return {
            name: mx.array(q.astype(np.float32)) * self.streams[name].scale + self.streams[name].mu
            for name, q in codes.items()
        }


class Rounding(CodecMethod):
    config_class = RoundingConfig
    artifacts_class = RoundingStream

    def train(self, samples, config):
        streams = {}
        for name in "kv":
            if samples.spec.stream(name).width:
                rows = samples.rows(name)
                scale = np.ptp(rows, axis=0) / np.float32(config.levels)
                streams[name] = RoundingStream(rows.mean(axis=0), scale, Levels(config.levels))
            else:
                none = np.zeros(0, np.float32)
                streams[name] = RoundingStream(none, none, Levels(config.levels))
        return streams

    def coder(self, streams):
        return RoundingCoder(checked_streams(RoundingStream, streams))

    def facts(self, streams):
        return {"levels": streams["k"].levels.count}

    def explain(self, streams, meta):
        return {"levels": meta["levels"]}


@pytest.fixture
def rounding(monkeypatch):
    """The method, registered as another package would do it, for one test."""
    codec_methods.names()  # looks at its folder
    monkeypatch.setattr(codec_methods, "_things", dict(codec_methods._things))
    codec_methods.register("test-rounding")(Rounding)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_method_of_another_package_works_everywhere(rounding, tmp_path, spec):
    write_dump(tmp_path / "a.npz", toy_dump(spec))
    calibrate([tmp_path / "a.npz"], RoundingConfig()).save(tmp_path / "artifacts")
    artifacts = CalibrationArtifacts.from_dir(tmp_path / "artifacts")
    assert artifacts.method_name == "test-rounding"
    assert artifacts.v.levels == Levels(100)
    assert artifacts.explain() == {"levels": 100}
    codec, dump = CacheCodec(artifacts, recent=8), toy_dump(spec, seed=9)
    found = codec.decompress_dump(codec.compress_dump(dump))
    for name in "kv":
        error = found.stream(name).astype(np.float64) - dump.stream(name)
        assert np.abs(error).max(initial=0) < 0.1
    path = tmp_path / "a.mlxkv"
    short = replace(dump, k=dump.k[..., :100, :], v=dump.v[..., :100, :], tokens=dump.tokens[:, :100])
    path.write_bytes(codec.compress_dump(short))
    codec.append_dump(path, dump)
    assert path.read_bytes() == codec.compress_dump(dump)
    (tmp_path / "artifacts" / "k_levels.json").write_text('{"count": 99}')
    with pytest.raises(FormatError, match=r"k_levels\.json"):
        CalibrationArtifacts.from_dir(tmp_path / "artifacts")


def test_files_of_a_method_that_is_not_installed_are_refused_by_its_name(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        codec_methods.names()
        patch.setattr(codec_methods, "_things", {**codec_methods._things, "test-rounding": Rounding})
        write_dump(tmp_path / "a.npz", toy_dump())
        calibrate([tmp_path / "a.npz"], RoundingConfig()).save(tmp_path / "artifacts")
    with pytest.raises(FormatError, match="'test-rounding', which this mlxkv does not have"):
        CalibrationArtifacts.from_dir(tmp_path / "artifacts")


@pytest.mark.parametrize(
    ("method", "config"),
    [(KVTC, KVTCRDConfig()), (KVTCRD, KVTCConfig(4)), (KVTCWeighted, KVTCConfig(4)), (KVTC, RoundingConfig())],
)
def test_settings_of_another_method_are_refused(tmp_path, method, config):
    write_dump(tmp_path / "a.npz", toy_dump())
    with pytest.raises(MismatchError, match=f"expected settings of {method.config_class.__name__}"):
        method().train(Samples([tmp_path / "a.npz"], sinks=4), config)


def test_settings_of_no_method_are_refused(tmp_path):
    write_dump(tmp_path / "a.npz", toy_dump())
    with pytest.raises(InputError, match="no settings of a codec method"):
        calibrate([tmp_path / "a.npz"], RoundingConfig())


@pytest.mark.parametrize("method", [KVTC, KVTCRD, KVTCWeighted])
def test_artifacts_of_another_method_are_refused(tmp_path, method):
    none = np.zeros(0, np.float32)
    streams = dict.fromkeys("kv", RoundingStream(none, none, Levels(2)))
    for use in (method().coder, method().facts, lambda streams: method().explain(streams, {})):
        with pytest.raises(MismatchError, match=f"no {method.artifacts_class.__name__}"):
            use(streams)


def test_artifacts_that_are_no_dataclass_are_refused():
    class Plain(StreamArtifacts):
        width = 48

    with pytest.raises(MismatchError, match="no dataclass"):
        _ = CalibrationArtifacts(Plain(), Plain(), DUAL, {}).nbytes


def test_what_a_file_takes_is_estimated_for_plain_kvtc_too(tmp_path):
    codec, dump = CacheCodec(toy_artifacts(tmp_path), recent=8), toy_dump(length=3000, seed=9)
    blob = codec.compress_dump(dump)
    with Reader(blob) as reader:
        plain = sum(s.size for name, s in reader.sections.items() if name[2:].isdigit())
        stored = sum(s.stored for name, s in reader.sections.items() if name[2:].isdigit())
    for blocks in (1, 3, 100):
        assert codec.coded_bytes(dump, blocks) == pytest.approx(plain, rel=1e-6)
    assert stored <= plain
    assert codec.fixed_bytes(dump) == pytest.approx(len(blob) - stored, rel=0.05)


def test_estimates_of_weighted_kvtc_are_its_payloads(tmp_path):
    rd_artifacts(tmp_path, PLAIN)  # leaves dumps with a sensitivity
    files = [tmp_path / f"measured{seed}.npz" for seed in range(3)]
    codec, dump = CacheCodec(calibrate(files, KVTCWeightedConfig(4)), recent=8), toy_dump(PLAIN, length=600, seed=9)
    with Reader(codec.compress_dump(dump)) as reader:
        plain = sum(s.size for name, s in reader.sections.items() if name[2:].isdigit())
    assert codec.coded_bytes(dump, 100) == pytest.approx(plain, rel=1e-6)

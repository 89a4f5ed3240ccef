"""Methods without calibration: files open from what their header says, come back as they should, and nothing forged is believed."""

from contextlib import suppress
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from forging import forge, header_of
from synthetic import DUAL, GROUPED, LATENT, PLAIN, grouped_dump, toy_artifacts, toy_dump

from mlxkv.codec import writing
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.calibrate import calibrate, codec_config, read_uncalibrated, uncalibrated
from mlxkv.codec.session import CacheCodec
from mlxkv.codec.stages.rows import to_rows
from mlxkv.errors import FormatError, InputError, MismatchError, MlxkvError
from mlxkv.io.container import Reader, digest
from mlxkv.spec import STREAMS, CacheSpec, Slot

METHODS = ("direct", "exact")
SPECS = {"dual": DUAL, "latent": LATENT, **GROUPED}


def codec_of(spec, method, **settings):
    return CacheCodec(uncalibrated(spec, fingerprint="f00d.cafe", method=method), **settings)


def dump_of(spec, length=120, **options):
    return grouped_dump(spec, length, **options) if spec in GROUPED.values() else toy_dump(spec, length, **options)


def arrays_of(dump):
    return [dump.k, dump.v, *dump.others.values()]


def opened(blob):
    """A codec made of the file alone."""
    with Reader(blob) as reader:
        found = read_uncalibrated(reader)
    assert found is not None
    return CacheCodec(found)


# Artifacts


@pytest.mark.parametrize("method", METHODS)
def test_artifacts_follow_from_the_description_alone(method, tmp_path):
    made = uncalibrated(GROUPED["window"], model="a", fingerprint="b", method=method)
    assert made.fingerprint == uncalibrated(GROUPED["window"], method=method).fingerprint
    assert made.nbytes < 200
    others = [uncalibrated(spec, method=each) for spec in (DUAL, GROUPED["window"]) for each in METHODS]
    assert len({each.fingerprint for each in others}) == 4
    made.save(tmp_path / "kept")
    assert CalibrationArtifacts.from_dir(tmp_path / "kept").fingerprint == made.fingerprint


def test_a_calibrated_method_has_no_artifacts_without_calibration():
    with pytest.raises(InputError, match="calibrated first"):
        uncalibrated(DUAL, method="kvtc-rd")
    with pytest.raises(InputError, match="no codec method"):
        uncalibrated(DUAL, method="nothing")


@pytest.mark.parametrize("method", METHODS)
def test_calibrating_a_method_that_needs_none_is_refused(method, tmp_path):
    with pytest.raises(InputError, match=f"{method} needs no calibration"):
        calibrate([tmp_path / "none.npz"], codec_config(method))


def test_artifacts_of_another_version_are_refused():
    made = uncalibrated(DUAL)
    other = replace(made.k, kind=np.frombuffer(b"direct 9", np.uint8))
    with pytest.raises(FormatError, match="direct 9"):
        CacheCodec(replace(made, k=other, v=other))
    for change in ({"kind": np.zeros(3, np.int32)}, {"shape": np.array([1, 2], np.int32)}, {"shape": np.array([1, -1, 2], np.int32)}):  # fmt: skip
        with pytest.raises(FormatError):
            replace(made.k, **change)


# Files


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("method", METHODS)
def test_a_file_opens_from_its_header_alone(method, spec):
    codec, dump = codec_of(spec, method, recent=8), dump_of(spec, batch=2, states=True)
    blob = codec.compress_dump(dump)
    found, again = codec.decompress_dump(blob), opened(blob).decompress_dump(blob)
    assert (again.spec, again.fingerprint, again.model) == (spec, dump.fingerprint, dump.model)
    for first, second, array in zip(arrays_of(found), arrays_of(again), arrays_of(dump)):
        assert np.array_equal(first, second)
        error = np.square(first.astype(np.float64) - array).sum()
        assert error <= (0.02 if method == "direct" else 0) * np.square(array.astype(np.float64)).sum()
    assert np.array_equal(again.states["0.0"], dump.states["0.0"])


@pytest.mark.parametrize("spec", [PLAIN, LATENT, *GROUPED.values()], ids=["plain", "latent", *GROUPED])
@pytest.mark.parametrize("method", METHODS)
def test_an_appended_file_is_the_one_that_compressing_makes_without_calibration(method, spec, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "BLOCK_ROWS", 16)
    codec, path = codec_of(spec, method, recent=3, sinks=2), tmp_path / "a.mlxkv"
    shorter, longer = (
        (grouped_dump(spec, length, of=60) for length in (37, 60))
        if spec in GROUPED.values()
        else (_beginning(toy_dump(spec, 60), length) for length in (37, 60))
    )
    path.write_bytes(codec.compress_dump(shorter))
    opened(path).quality  # noqa: B018  # it opens
    codec.append_dump(path, longer)
    assert path.read_bytes() == codec.compress_dump(longer)


def _beginning(dump, length):
    return replace(dump, k=dump.k[..., :length, :], v=dump.v[..., :length, :], tokens=dump.tokens[:, :length])


def test_a_calibrated_file_says_nothing_of_its_cache(tmp_path):
    blob = CacheCodec(toy_artifacts(tmp_path)).compress_dump(toy_dump(length=20))
    assert "uncalibrated" not in header_of(blob)[0]
    with Reader(blob) as reader:
        assert read_uncalibrated(reader) is None


# direct


@pytest.mark.parametrize("length", [1, 5, 6, 7, 40])
@pytest.mark.parametrize("value", [0.0, 1.0, -65504.0])
def test_a_constant_cache_comes_back(length, value):
    dump = toy_dump(length=length)
    constant = replace(dump, k=np.full_like(dump.k, value), v=np.full_like(dump.v, value))
    codec = codec_of(PLAIN, "direct", recent=1)
    found = codec.decompress_dump(codec.compress_dump(replace(constant, spec=PLAIN)))
    np.testing.assert_allclose(found.k.astype(float), constant.k.astype(float), rtol=2e-3)


def test_ten_points_of_quality_halve_the_error():
    dump, errors, sizes = toy_dump(PLAIN, length=300), [], []
    for quality in (20, 30, 40, 50):
        codec = codec_of(PLAIN, "direct", quality=quality, raw_window=True)
        blob = codec.compress_dump(dump)
        errors.append(np.sqrt(np.square(codec.decompress_dump(blob).k.astype(float) - dump.k).mean()))
        sizes.append(len(blob))
    assert sizes == sorted(sizes)
    np.testing.assert_allclose(np.array(errors[1:]) / errors[:-1], 0.5, atol=0.15)


@pytest.mark.parametrize("quality", [-1, 101, "35", True, np.nan])
def test_a_quality_is_a_number_from_0_to_100_and_exact_has_none(quality):
    with pytest.raises(InputError, match="quality"):
        codec_of(DUAL, "direct", quality=quality)
    with pytest.raises(InputError, match="no quality"):
        codec_of(DUAL, "exact", quality=quality)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 1e30])
def test_values_that_are_no_numbers_are_refused(wrong):
    dump = toy_dump(PLAIN, length=20, dtype=np.float32)
    dump.v[0, 0, 0, 10, 0] = wrong
    with pytest.raises(InputError, match="NaN, infinite or enormous"):
        codec_of(PLAIN, "direct", recent=0).compress_dump(dump)


# exact


@pytest.mark.parametrize("kind", ["float16", "float32", "bfloat16", "not finite"])
def test_exact_returns_every_bit(kind):
    dump = toy_dump(length=90, dtype=np.float16 if kind == "float16" else np.float32)
    k = dump.k.copy()
    if kind == "bfloat16":
        k = (k.view(np.uint32) & 0xFFFF0000).view(np.float32)
    if kind == "not finite":
        k[..., 20, :], k[..., 21, :] = np.nan, -np.inf
    k[..., 30, 0] = -0.0
    dump = replace(dump, k=k)
    codec = codec_of(DUAL, "exact", recent=2)
    found = codec.decompress_dump(codec.compress_dump(dump))
    for name in STREAMS:
        assert found.stream(name).dtype == dump.stream(name).dtype
        assert found.stream(name).tobytes() == dump.stream(name).tobytes()


def test_exact_takes_mlx_arrays_of_bfloat16():
    dump = toy_dump(length=40)
    layers = {name: [mx.array(x).astype(mx.bfloat16) for x in dump.stream(name)] for name in STREAMS}
    codec = codec_of(DUAL, "exact", recent=2)
    for name, found in zip(STREAMS, codec.decompress(codec.compress(layers["k"], layers["v"]))):
        for array, layer in zip(found, layers[name]):
            assert np.array_equal(array, np.array(layer.astype(mx.float32)))


# Forged files


def _without(header, key):
    return {name: value for name, value in header.items() if name != key}


def _wider(header):
    data = header["uncalibrated"]["spec"]
    kinds = [[{**slot, "heads": 2**14, "dim": 2**14} for slot in kind] for kind in data["kinds"]]
    return {**header, "uncalibrated": {"spec": {**data, "kinds": kinds}}}


@pytest.mark.parametrize(
    "change",
    [
        lambda h: {**h, "uncalibrated": {}},
        lambda h: {**h, "uncalibrated": []},
        lambda h: {**h, "uncalibrated": {"spec": 3}},
        lambda h: {**h, "uncalibrated": {"spec": {}}},
        lambda h: {**h, "uncalibrated": {**h["uncalibrated"], "more": 1}},
        lambda h: {**h, "method": "kvtc-rd"},
        lambda h: {**h, "method": ["direct"]},
        lambda h: {**h, "artifacts": "0" * 32},
        lambda h: _without(h, "meta"),
        lambda h: {**h, "uncalibrated": {"spec": {**h["uncalibrated"]["spec"], "model_type": "other"}}},
        _wider,
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_a_header_that_does_not_describe_its_cache_is_refused(method, change):
    header, body = header_of(codec_of(DUAL, method).compress_dump(toy_dump(length=20)))
    with pytest.raises(MlxkvError), Reader(forge(change(header), body)) as reader:
        read_uncalibrated(reader)


@pytest.mark.parametrize("method", METHODS)
def test_a_file_that_describes_another_cache_than_its_artifacts_is_refused(method):
    codec = codec_of(DUAL, method)
    header, body = header_of(codec.compress_dump(toy_dump(length=20)))
    for changed in (_without(header, "uncalibrated"), _wider(header)):
        with pytest.raises(FormatError, match="describes another cache"):
            codec.decompress_dump(forge(changed, body))
    other = codec_of(replace(DUAL, model_type="other"), method)
    with pytest.raises(MismatchError, match="needs artifacts"):
        other.decompress_dump(forge(header, body))


@pytest.mark.parametrize("method", METHODS)
def test_a_cache_that_is_wide_in_the_description_alone_costs_no_memory(method):
    spec = CacheSpec("toy", ((Slot("keys", 2**14, 2**12), Slot("values", 1, 8)),))
    made = uncalibrated(spec, method=method)
    header, body = header_of(codec_of(PLAIN, method, recent=0, sinks=0).compress_dump(toy_dump(PLAIN, length=20)))
    header |= {"uncalibrated": made.recipe, "artifacts": made.fingerprint}
    for name, stream in (("k.sink", "k"), ("v.sink", "v"), ("k.window", "k"), ("v.window", "v")):
        if name in header["raw"]:
            found = spec.stream(stream)
            header["raw"][name][1] = [found.layers, 1, found.heads, 0, found.dim]
    with pytest.raises(MlxkvError):
        opened(forge(header, body)).decompress(forge(header, body))


def _with_section(codec, blob, data):
    """A file whose first coded section is another."""
    header, body = header_of(blob)
    row, size = header["sections"][2], header["sections"][2][3]
    assert (row[0], [each[3] for each in header["sections"][:2]]) == ("k.0", [0, 0])
    table = [*header["sections"][:2], [*row[:2], len(data), len(data), digest(data).hex()], *header["sections"][3:]]
    return forge({**header, "sections": table}, data + body[size:]), body[:size]


@pytest.mark.parametrize("method", METHODS)
def test_sections_that_are_cut_or_changed_are_refused_or_read(method):
    random, codec = np.random.default_rng(0), codec_of(PLAIN, method, recent=0, sinks=0)
    blob = codec.compress_dump(toy_dump(PLAIN, length=30))
    _, data = _with_section(codec, blob, b"")
    for length in (0, 1, 5, 6, 9, 10, 40, len(data) - 1):
        with pytest.raises(MlxkvError):
            codec.decompress(_with_section(codec, blob, data[:length])[0])
    with pytest.raises(MlxkvError):
        codec.decompress(_with_section(codec, blob, data + b"\0")[0])
    for _ in range(40):
        changed = bytearray(data)
        changed[random.integers(len(data) if random.integers(2) else 12)] = random.integers(256)
        with suppress(MlxkvError):
            codec.decompress(_with_section(codec, blob, bytes(changed))[0])


@pytest.mark.parametrize(
    "change",
    [
        {"exponents": np.full(6, 400, np.int16), "means": np.full(48, 2**31 - 1, np.int32)},
        {"exponents": np.full(6, 401, np.int16)},
        {"exponents": np.full(6, -400, np.int16)},
        {"vectors": np.eye(30, 30, dtype=np.int8) * 127},
        {"vectors": np.triu(np.full((30, 30), -128), 1).astype(np.int8)},
        {"vectors": np.zeros((31, 30), np.int8)},
        {"integers": np.full((30, 48), 2**31 - 1, np.int32)},
    ],
    ids=["scales", "scale beyond", "no scale", "reflections", "other reflections", "reflections beyond", "integers"],
)
def test_whatever_a_block_of_direct_says_is_finite_or_refused(change):
    codec = codec_of(PLAIN, "direct", recent=0, sinks=0)
    dump = toy_dump(PLAIN, length=30)
    rows = {name: to_rows(PLAIN.stream(name), list(dump.stream(name)), 0, 30) for name in STREAMS}
    coded = codec.coder.encode(rows, codec.quality)["k"]._replace(**change)
    forged, _ = _with_section(codec, codec.compress_dump(dump), codec.coder.pack("k", coded))
    refused = ("exponents" in change and change["exponents"][0] > 400) or len(change.get("vectors", ())) > 30
    if refused:
        with pytest.raises(FormatError):
            codec.decompress(forged)
    else:
        assert all(np.isfinite(array).all() for arrays in codec.decompress(forged) for array in arrays)


def test_reflections_of_values_are_refused_since_the_keys_have_them():
    codec, dump = codec_of(PLAIN, "direct", recent=0, sinks=0), toy_dump(PLAIN, length=30)
    rows = {name: to_rows(PLAIN.stream(name), list(dump.stream(name)), 0, 30) for name in STREAMS}
    coded = codec.coder.encode(rows, codec.quality)
    data = {name: codec.coder.pack("k", each) for name, each in coded.items()}
    codec.coder.decode(next(iter(codec.coder.unpack([{"k": data["k"]}], [30]))), 30, codec.quality)
    with pytest.raises(FormatError, match="reflections"):
        list(codec.coder.unpack([{"v": data["k"]}], [30]))

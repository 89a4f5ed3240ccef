"""Parts of a cache, one container each: any tokens of a text, in all layers, in files that know their positions."""

import threading
import tracemalloc
from dataclasses import replace
from hashlib import blake2b
from itertools import pairwise
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from conftest import DIFFERENT, tiny_model, tiny_tokens
from forging import forge, header_of
from synthetic import DUAL, GROUPED, LATENT, by_rope, grouped_artifacts, stream_values

from mlxkv import lm
from mlxkv.codec import pieces
from mlxkv.codec.calibrate import read_uncalibrated, uncalibrated
from mlxkv.codec.methods.kvtc import KVTCConfig
from mlxkv.codec.methods.kvtc_rd import KVTCRDConfig
from mlxkv.codec.methods.kvtc_weighted import KVTCWeightedConfig
from mlxkv.codec.parts import CachePart, PartCodec, StoredPart, check_part, decode_parts, read_positions, read_tokens
from mlxkv.codec.session import CacheCodec
from mlxkv.dump import KVDump, stream_key
from mlxkv.errors import FormatError, InputError, MismatchError, MlxkvError
from mlxkv.io.container import Reader
from mlxkv.spec import STREAMS

CONFIGS = {"kvtc": KVTCConfig(4.0), "kvtc-weighted": KVTCWeightedConfig(4.0), "kvtc-rd": KVTCRDConfig()}
METHODS = (*CONFIGS, "direct", "exact")
SPECS = {**GROUPED, "dual": DUAL, "latent": LATENT}
LEARNT_KINDS = ("window", "latent and keys")
META = {"model": "a/toy", "fingerprint": "f00d.cafe", "note": ["kept", 1]}


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """Artifacts of each method and kind of cache, made once."""
    made = {}

    def get(method, kind):
        if (method, kind) not in made:
            if method in CONFIGS:
                folder = tmp_path_factory.mktemp("parts")
                made[method, kind] = grouped_artifacts(folder, SPECS[kind], CONFIGS[method], seeds=(0,), length=120)
            else:
                made[method, kind] = uncalibrated(SPECS[kind], fingerprint="f00d.cafe", method=method)
        return made[method, kind]

    return get


def text(spec, length, start=0):
    """Keys and values `[L, 1, H, T, D]` float16 of all groups, of the last tokens of a text that begins at `start`."""
    streams = {}
    for index, group in enumerate(spec.groups):
        for name in STREAMS:
            values = stream_values(group.stream(name), 1, length, 9 + 2000 * index + 1000 * (name == "v"))
            if start:
                x = [
                    layer if r is None else np.array(r.rotate(mx.array(layer), start))
                    for r, layer in zip(group.stream(name).ropes, values)
                ]
            else:
                x = by_rope(group.stream(name), values)
            streams[stream_key(index, name)] = np.stack(x).astype(np.float16)
    return streams


def part_of(streams, start, stop, firsts=None, first=0, dtype="float16"):
    """The part of a text whose streams begin at position `first`."""
    firsts = firsts or {}

    def rows(key, layer):
        group = int(key.split(".")[0]) if "." in key else 0
        return layer[:, :, firsts.get(group, start) - first : stop - first]

    cut = {key: [rows(key, layer) for layer in array] for key, array in streams.items()}
    return CachePart(start, stop, np.arange(start, stop, dtype=np.int32), cut, firsts, dtype)


def encoded(codec, streams, cuts, **options):
    return [codec.encode(part_of(streams, a, b, **options), META) for a, b in pairwise(cuts)]


def joined(blobs, artifacts, stop, dtype="float16"):
    """Each stream's arrays in one, and the position of its first token."""
    found, firsts = {}, {}
    for piece in decode_parts([StoredPart(Reader(blob), artifacts) for blob in blobs], stop, dtype):
        key = stream_key(piece.group, piece.name)
        before = found.setdefault(key, [])
        assert piece.first == firsts.setdefault(key, piece.first) + sum(x.shape[3] for x in before), "without a gap"
        assert str(piece.array.dtype) == f"mlx.core.{dtype}"
        before.append(np.array(piece.array.astype(mx.float32)))
    return {key: np.concatenate(arrays, axis=3) for key, arrays in found.items()}, firsts


def expected(spec, streams, stop):
    """What the layers hold of a text at a position."""
    held = {}
    for index, group in enumerate(spec.groups):
        for name in STREAMS:
            if group.stream(name).width:
                held[stream_key(index, name)] = streams[stream_key(index, name)][..., stop - group.rows(stop) : stop, :]
    return held


def relative_error(found, array):
    difference = found.astype(np.float64) - array
    return float(np.square(difference).sum() / max(np.square(array, dtype=np.float64).sum(), 1e-30))


def changed(blob, **fields):
    """The part with other fields in its header; None leaves one out."""
    header, body = header_of(blob)
    return forge({key: value for key, value in {**header, **fields}.items() if value is not None}, body)


# What comes back


@pytest.mark.parametrize(
    ("method", "kind"), [(m, kind) for m in METHODS for kind in (LEARNT_KINDS if m in CONFIGS else SPECS)]
)
def test_a_part_decodes_as_a_file_of_the_same_tokens_does(learnt, method, kind):
    artifacts, recent = learnt(method, kind), 5
    spec = artifacts.spec
    streams = text(spec, 23)
    tokens = np.arange(23, dtype=np.int32)
    k, v, *others = (streams[stream_key(i, name)] for i in range(len(spec.groups)) for name in STREAMS)
    named = dict(zip([key for key in streams if "." in key], others))
    dump = KVDump(k, v, spec, tokens[None], "a/toy", "f00d.cafe", "float16", others=named)
    file = CacheCodec(artifacts, recent=recent, sinks=3)
    whole = file.decompress_dump(file.compress_dump(dump))
    (blob,) = encoded(PartCodec(artifacts, recent=recent, sinks=3), streams, [0, 23])
    found, _ = joined([blob], artifacts, 23)
    for key in expected(spec, streams, 23):
        group, _, name = key.rpartition(".")
        assert np.array_equal(found[key], whole.stream(name, int(group or 0)))
    with Reader(blob) as reader:
        assert np.array_equal(read_tokens(reader), tokens)
        assert reader.header["meta"] == META


@pytest.mark.parametrize("kind", SPECS)
def test_exact_parts_cut_anywhere_are_what_the_layers_hold(learnt, kind):
    artifacts, cuts = learnt("exact", kind), [0, 1, 2, 47, 48, 90]
    streams = text(artifacts.spec, 90)
    blobs = encoded(PartCodec(artifacts), streams, cuts)
    for stop in (90, cuts[-2] + 1):
        found, firsts = joined(blobs, artifacts, stop)
        held = expected(artifacts.spec, streams, stop)
        assert found.keys() == held.keys()
        for key, array in held.items():
            assert np.array_equal(found[key], array)
            assert firsts[key] == stop - array.shape[3]


@pytest.mark.parametrize("kind", LEARNT_KINDS)
@pytest.mark.parametrize("method", ["kvtc", "kvtc-rd", "direct"])
def test_parts_cut_anywhere_err_as_little_as_one(learnt, method, kind):
    artifacts = learnt(method, kind)
    streams = text(artifacts.spec, 90)
    codec = PartCodec(artifacts)
    one, many = (joined(encoded(codec, streams, cuts), artifacts, 90)[0] for cuts in ([0, 90], [0, 7, 60, 90]))
    for key, array in expected(artifacts.spec, streams, 90).items():
        assert relative_error(many[key], array) < max(1.5 * relative_error(one[key], array), 1e-3)
        if method == "kvtc-rd":  # whose tokens do not depend on each other
            np.testing.assert_allclose(many[key], one[key], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("quality", [75, 100])
@pytest.mark.parametrize("tokens", [1, 40])
def test_rows_that_do_not_differ_are_coded_at_every_quality(learnt, quality, tokens):
    streams = {key: np.repeat(x[..., :1, :], tokens, axis=-2) for key, x in text(DUAL, 1).items()}
    artifacts = learnt("direct", "dual")
    blobs = encoded(PartCodec(artifacts, quality=quality, recent=32, sinks=0), streams, [0, tokens])
    found, _ = joined(blobs, artifacts, tokens)
    assert all(relative_error(found[key], x) < 2**-9 for key, x in expected(DUAL, streams, tokens).items())


@pytest.mark.parametrize("start", [512, 1_000_003])
@pytest.mark.parametrize("kind", ["dual", "latent", "window"])
def test_keys_are_turned_by_their_positions(learnt, kind, start):
    artifacts = learnt("kvtc-rd", kind)
    streams = text(artifacts.spec, 20, start)
    (blob,) = encoded(PartCodec(artifacts), streams, [start, start + 20], first=start)
    found, firsts = joined([blob], artifacts, start + 20)
    assert set(firsts.values()) == {start}
    for key, array in found.items():
        assert relative_error(array, streams[key]) < 0.03  # another position: about 1


def test_rows_that_a_window_had_lost_are_missing(learnt):
    artifacts = learnt("exact", "window")
    streams = text(artifacts.spec, 60)
    codec = PartCodec(artifacts)
    first = codec.encode(part_of(streams, 0, 30, {1: 30}), META)  # none of them
    second = codec.encode(part_of(streams, 30, 60, {1: 45}), META)
    found, firsts = joined([first, second], artifacts, 60)
    assert firsts == {"k": 0, "v": 0, "1.k": 45, "1.v": 45}
    assert np.array_equal(found["1.k"], streams["1.k"][..., 45:60, :])
    assert joined([first], artifacts, 30)[0].keys() == {"k", "v"}


@pytest.mark.parametrize("name", [*DIFFERENT, "windows"])
@pytest.mark.parametrize("method", ["exact", "direct"])
def test_caches_of_models_come_back(name, method):
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8} if name == "windows" else {}
    model = tiny_model("llama" if layers else name, **layers)
    dump = lm.dump(model, tiny_tokens(30))
    artifacts = uncalibrated(dump.spec, method=method)
    made = []
    for start, stop in ((0, 11), (11, 30)):
        firsts = {i: min(stop, max(start, 22)) for i, group in enumerate(dump.spec.groups) if group.window}
        streams = {}
        for index in range(len(dump.spec.groups)):
            for each in STREAMS:
                array = dump.stream(each, index)
                lost = 30 - array.shape[3]
                rows = slice(max(0, firsts.get(index, start) - lost), max(0, stop - lost))
                streams[stream_key(index, each)] = [layer[:, :, rows] for layer in array]
        tokens = np.ascontiguousarray(dump.tokens[0, start:stop])
        made.append(PartCodec(artifacts).encode(CachePart(start, stop, tokens, streams, firsts, dump.dtype), META))
    found, _ = joined(made, artifacts, 30, dump.dtype)
    for index, group in enumerate(dump.spec.groups):
        for each in STREAMS:
            if group.stream(each).width:
                key, array = stream_key(index, each), dump.stream(each, index)
                assert (
                    np.array_equal(found[key], array) if method == "exact" else relative_error(found[key], array) < 0.01
                )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_bfloat16_comes_back_as_it_was_and_other_types_as_near_as_they_are(learnt, dtype):
    artifacts = learnt("exact", "dual")
    wide = {k: np.array(mx.array(x).astype(mx.bfloat16).astype(mx.float32)) for k, x in text(DUAL, 20).items()}
    blobs = encoded(PartCodec(artifacts), wide, [0, 9, 20], dtype="bfloat16")
    found, _ = joined(blobs, artifacts, 20, dtype)
    for key, array in wide.items():
        assert np.array_equal(found[key], array.astype(np.float16) if dtype == "float16" else array)


@pytest.mark.parametrize("method", ["direct", "exact"])
def test_a_part_without_calibration_says_how_to_read_it(learnt, method):
    artifacts = learnt(method, "window")
    (blob,) = encoded(PartCodec(artifacts), text(artifacts.spec, 20), [0, 20])
    again = read_uncalibrated(Reader(blob))
    assert again.fingerprint == artifacts.fingerprint
    assert joined([blob], again, 20)[0].keys() == {"k", "v", "1.k", "1.v"}
    assert again.meta["model_fingerprint"] == "f00d.cafe"


def test_parts_of_several_codings_follow_each_other(learnt):
    streams = text(DUAL, 40)
    made = [(learnt(method, "dual"), a) for method, a in (("exact", 0), ("kvtc-rd", 10), ("direct", 20), ("exact", 30))]
    stored = [StoredPart(Reader(encoded(PartCodec(art), streams, [a, a + 10])[0]), art) for art, a in made]
    keys = [piece for piece in decode_parts(stored, 40, "float32") if piece.name == "k"]
    assert [piece.first for piece in keys] == [0, 4, 10, 20, 30]
    assert np.array_equal(np.array(keys[-1].array), streams["k"][..., 30:40, :])


def test_the_newest_tokens_of_a_part_can_be_finer(learnt):
    artifacts = learnt("kvtc-rd", "dual")
    streams = text(DUAL, 40)
    found, _ = joined(encoded(PartCodec(artifacts, quality=20, recent=8), streams, [0, 40]), artifacts, 40)
    old, new = (relative_error(found["k"][..., t, :], streams["k"][..., t, :]) for t in (slice(4, 32), slice(32, 40)))
    assert 0 < new < old / 10


def test_where_kernels_run_all_is_decoded_in_one_thread(learnt, monkeypatch):
    artifacts = learnt("kvtc-rd", "window")
    streams = text(artifacts.spec, 60)
    blobs = encoded(PartCodec(artifacts), streams, [0, 20, 40, 60])
    before, _ = joined(blobs, artifacts, 60)
    monkeypatch.setattr(pieces, "metal", SimpleNamespace(available=lambda: True))
    monkeypatch.setattr(pieces, "ThreadPoolExecutor", None)
    after, _ = joined(blobs, artifacts, 60)
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_an_iterator_that_is_given_up_leaves_no_thread(learnt):
    artifacts = learnt("direct", "dual")
    blobs = encoded(PartCodec(artifacts), text(DUAL, 60), [0, 20, 40, 60])
    running = threading.active_count()
    found = decode_parts([StoredPart(Reader(blob), artifacts) for blob in blobs], 60, "float16")
    next(found)
    found.close()
    assert threading.active_count() == running


# What is refused


@pytest.fixture(scope="module")
def intact(learnt):
    artifacts = learnt("kvtc-rd", "window")
    return encoded(PartCodec(artifacts), text(artifacts.spec, 60), [0, 60])[0]


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": None}, {"kind": "cache"}, {"kind": 1},
        {"start": None}, {"start": -1}, {"start": 1}, {"start": "0"}, {"start": True}, {"start": 2**40},
        {"stop": None}, {"stop": 0}, {"stop": 59}, {"stop": 61}, {"stop": 513}, {"stop": 2**31}, {"stop": 60.0},
        {"firsts": []}, {"firsts": {"0": 5}}, {"firsts": {"1": 61}}, {"firsts": {"1": -1}}, {"firsts": {"1": "0"}},
        {"firsts": {"7": 5}}, {"firsts": {"x": 5}}, {"firsts": {"1": 10}}, {"firsts": {"1": 60}}, {"firsts": {"²": 5}},
        {"sinks": None}, {"sinks": -1}, {"sinks": 5}, {"sinks": 2**40}, {"recent": None}, {"recent": 8}, {"recent": "0"},
        {"quality": None}, {"quality": 101}, {"quality": "38"}, {"window_quality": -1}, {"window_quality": [1]},
        {"method": "kvtc"}, {"method": None}, {"artifacts": "0" * 32}, {"artifacts": 5}, {"uncalibrated": {"spec": {}}},
        {"raw": None}, {"raw": {}}, {"raw": {"tokens": ["int32", [60]]}}, {"raw": {"tokens": 1, "k.0": 1}},
    ],
    ids=str,
)  # fmt: skip
def test_a_forged_header_is_a_typed_error_in_little_memory(learnt, intact, fields):
    artifacts, blob = learnt("kvtc-rd", "window"), intact
    forged = changed(blob, **fields)
    tracemalloc.start()
    with pytest.raises((FormatError, MismatchError, InputError)):
        joined([forged], artifacts, 60)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert used < 2**24  # tables of the entropy coder


@pytest.mark.parametrize("method", ["kvtc", "kvtc-rd", "direct", "exact"])
def test_damaged_sections_are_typed_errors_or_other_numbers(learnt, method):
    artifacts = learnt(method, "window")
    (blob,) = encoded(PartCodec(artifacts), text(artifacts.spec, 60), [0, 60])
    header, body = header_of(blob)
    random = np.random.default_rng(0)
    for _ in range(6):
        at, sections = int(random.integers(len(body))), [list(row) for row in header["sections"]]
        spoilt = body[:at] + bytes([body[at] ^ int(random.integers(1, 256))]) + body[at + 1 :]
        with pytest.raises(FormatError, match="checksum"):
            check_part(Reader(forge(header, spoilt)), artifacts.spec)
        position = 0
        for row in sections:
            row[4] = blake2b(spoilt[position : position + row[3]], digest_size=16).hexdigest()
            position += row[3]
        try:
            found, _ = joined([forge({**header, "sections": sections}, spoilt)], artifacts, 60)
        except MlxkvError:
            continue
        assert found["k"].shape == (2, 1, 2, 60, 8)


def test_an_error_in_a_later_part_comes_after_what_was_intact(learnt):
    artifacts = learnt("direct", "dual")
    blobs = encoded(PartCodec(artifacts), text(DUAL, 60), [0, 20, 40, 60])
    header, body = header_of(blobs[2])
    blobs[2] = forge(header, body[:-9] + bytes([body[-9] ^ 1]) + body[-8:])
    found = decode_parts([StoredPart(Reader(blob), artifacts) for blob in blobs], 60, "float16")
    assert next(found).first == 0
    with pytest.raises(FormatError, match="checksum"):
        list(found)


def test_parts_follow_each_other_and_reach_the_end(learnt):
    artifacts = learnt("exact", "dual")
    a, b, c = (
        StoredPart(Reader(blob), artifacts) for blob in encoded(PartCodec(artifacts), text(DUAL, 60), [0, 20, 40, 60])
    )
    for parts, stop in (([], 1), ([a, c], 60), ([b, a], 20), ([a, a], 20), ([a, b], 20), ([a, b], 41), ([a], 0)):
        with pytest.raises(InputError):
            decode_parts(parts, stop, "float16")
    with pytest.raises(InputError, match="int8"):
        decode_parts([a], 20, "int8")


def test_other_artifacts_are_refused(learnt, tmp_path):
    artifacts = learnt("kvtc-rd", "dual")
    (blob,) = encoded(PartCodec(artifacts), text(DUAL, 20), [0, 20])
    other = grouped_artifacts(tmp_path, DUAL, CONFIGS["kvtc-rd"], seeds=(5,), length=120)
    with pytest.raises(MismatchError, match="needs artifacts"):
        joined([blob], other, 20)
    for method in ("kvtc", "direct"):
        with pytest.raises(FormatError, match="coded by method 'kvtc-rd'"):
            joined([blob], learnt(method, "dual"), 20)


def test_a_part_of_another_cache_is_no_part_of_this_one(learnt):
    artifacts = learnt("exact", "window")
    streams = text(artifacts.spec, 60)
    blob = PartCodec(artifacts).encode(part_of(streams, 0, 60, {1: 20}), META)
    check_part(Reader(blob), artifacts.spec)
    assert read_positions(Reader(blob)) == (0, 60)
    with pytest.raises(FormatError, match="cannot begin"):
        check_part(Reader(blob), DUAL)
    for damage in (changed(blob, meta=None), changed(blob, raw=[]), changed(blob, stop=61), blob[:-1]):
        with pytest.raises(FormatError):
            check_part(Reader(damage), artifacts.spec)
    header, body = header_of(blob)
    with pytest.raises(FormatError, match="checksum"):
        check_part(Reader(forge(header, body[:-1] + bytes([body[-1] ^ 1]))), artifacts.spec)
    with pytest.raises(FormatError, match="no part"):
        read_tokens(Reader(forge({"kind": "note", "sections": []})))


def test_what_is_no_part_is_not_encoded(learnt):
    artifacts = learnt("exact", "dual")
    codec, part = PartCodec(artifacts), part_of(text(DUAL, 20), 0, 20)
    wrong = [
        {"start": -1}, {"stop": 0}, {"stop": 513}, {"tokens": part.tokens[:-1]}, {"tokens": part.tokens.astype(np.int64)},
        {"dtype": "int8"}, {"firsts": {0: 5}}, {"firsts": {3: 0}}, {"start": 1, "tokens": part.tokens[1:]},
        {"streams": {"k": part.streams["k"], "v": part.streams["v"][1:]}},
        {"streams": {name: [x[..., :4] for x in part.streams[name]] for name in STREAMS}},
        {"streams": {name: [np.repeat(x, 2, axis=0) for x in part.streams[name]] for name in STREAMS}},
        {"streams": {"k": part.streams["k"], "v": [x.astype(np.float32) for x in part.streams["v"]]}},
    ]  # fmt: skip
    for fields in wrong:
        with pytest.raises((InputError, MismatchError)):
            codec.encode(part._replace(**fields), META)
    with pytest.raises(InputError, match="JSON"):
        codec.encode(part, {"note": object()})
    for options in ({"recent": -1}, {"sinks": 1.5}, {"quality": 38}):
        with pytest.raises(InputError):
            PartCodec(artifacts, **options)


def test_a_description_of_enormous_layers_is_refused_before_memory_is_taken():
    layers = tuple(replace(layer, keys=replace(layer.keys, heads=16384), values=replace(layer.values, heads=16384)) for layer in DUAL.layers if layer) * 300  # fmt: skip
    artifacts = uncalibrated(replace(DUAL, layers=layers), method="exact")
    small = uncalibrated(DUAL, method="exact")
    (blob,) = encoded(PartCodec(small), text(DUAL, 20), [0, 20])
    forged = changed(blob, artifacts=artifacts.fingerprint, uncalibrated=artifacts.recipe, stop=500)
    with pytest.raises(InputError, match="would decode to"):
        decode_parts([StoredPart(Reader(forged), artifacts)], 500, "float16")

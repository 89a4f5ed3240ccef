"""Layers of several shapes and windows in one file: each group of them is coded like a cache of its own."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import run
from synthetic import GROUPED, grouped_artifacts, grouped_dump, grouped_sensitivity

from mlxkv.codec import writing
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.calibrate import calibrate, calibration_warning
from mlxkv.codec.methods.kvtc import KVTCConfig
from mlxkv.codec.methods.kvtc_rd import KVTCRDConfig
from mlxkv.codec.methods.kvtc_weighted import KVTCWeightedConfig
from mlxkv.codec.samples import Samples
from mlxkv.codec.session import CacheCodec
from mlxkv.codec.summary import summary
from mlxkv.dump import read_dump, stream_key, write_dump
from mlxkv.errors import InputError, MismatchError
from mlxkv.io.container import Reader
from mlxkv.spec import STREAMS, CacheSpec, Layer

CONFIGS = {"kvtc": KVTCConfig(4.0), "kvtc-weighted": KVTCWeightedConfig(4.0), "kvtc-rd": KVTCRDConfig()}
WINDOWED = ("window", "all windows")


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """Artifacts of each method and kind of cache, made once."""
    made = {}

    def get(method, kind):
        if (method, kind) not in made:
            folder = tmp_path_factory.mktemp("grouped")
            made[method, kind] = grouped_artifacts(folder, GROUPED[kind], CONFIGS[method])
        return made[method, kind]

    return get


def streams_of(dump):
    """Every array of keys and values, by its name in files."""
    keys = [stream_key(group, name) for group in dump.held_groups for name in STREAMS]
    return dict(zip(keys, (dump.stream(name, group) for group in dump.held_groups for name in STREAMS)))


def relative_error(found, array):
    difference = found.astype(np.float64) - array
    return float(np.square(difference).sum() / max(np.square(array, dtype=np.float64).sum(), 1e-30))


def without_rotation(spec):
    plain = [layer and tuple(replace(slot, rope=None) for slot in layer) for layer in spec.layers]
    return CacheSpec(
        spec.model_type,
        tuple(layer and Layer(*pair, layer.latent, layer.window) for layer, pair in zip(spec.layers, plain)),
    )


# Whole files


@pytest.mark.parametrize("length", [30, 300])
@pytest.mark.parametrize("kind", GROUPED)
@pytest.mark.parametrize("method", CONFIGS)
def test_each_group_comes_back_within_its_quality(learnt, method, kind, length):
    codec = CacheCodec(learnt(method, kind), recent=8, sinks=4)
    dump = grouped_dump(GROUPED[kind], length, batch=2, seed=9, states=True)
    found = codec.decompress_dump(codec.compress_dump(dump))
    assert found.rings == dump.rings
    assert np.array_equal(found.states["0.0"], dump.states["0.0"])
    arrays = streams_of(found)
    for key, array in streams_of(dump).items():
        assert (arrays[key].shape, arrays[key].dtype) == (array.shape, array.dtype)
        assert relative_error(arrays[key], array) < 0.05
        if method != "kvtc-rd":
            assert np.array_equal(arrays[key][..., -8:, :], array[..., -8:, :])
    for group in dump.held_groups:
        exact = np.array_equal(found.stream("k", group)[..., :4, :], dump.stream("k", group)[..., :4, :])
        assert exact is (dump.stream("k", group).shape[3] == length), "a window that has moved on has no sinks"


@pytest.mark.parametrize("kind", GROUPED)
@pytest.mark.parametrize("method", ["kvtc", "kvtc-rd"])
def test_rotated_keys_take_the_bytes_of_keys_that_are_not(tmp_path, method, kind):
    sizes, errors = [], []
    for spec in (GROUPED[kind], without_rotation(GROUPED[kind])):
        codec = CacheCodec(grouped_artifacts(tmp_path, spec, CONFIGS[method], seeds=(0, 1)), recent=8)
        dump = grouped_dump(spec, 300, seed=9, dtype=np.float32)
        blob = codec.compress_dump(dump)
        found = streams_of(codec.decompress_dump(blob))
        with Reader(blob) as reader:
            sizes.append([group["file_bytes"] for group in summary(reader)["groups"]])
        errors.append([relative_error(found[key], array) for key, array in streams_of(dump).items() if array.size])
    np.testing.assert_allclose(*sizes, rtol=0.03)
    np.testing.assert_allclose(*errors, rtol=0.05)


@pytest.mark.parametrize("kind", GROUPED)
@pytest.mark.parametrize("method", CONFIGS)
def test_the_size_of_all_groups_is_estimated(learnt, method, kind):
    codec, dump = CacheCodec(learnt(method, kind), recent=8, lossless="raw"), grouped_dump(GROUPED[kind], 200, seed=9)
    made = len(codec.compress_dump(dump))
    assert codec.fixed_bytes(dump) + codec.coded_bytes(dump, 2) == pytest.approx(made, rel=0.06)


def test_parts_of_a_file_are_counted_group_by_group(learnt):
    codec, dump = CacheCodec(learnt("kvtc-rd", "window"), recent=8), grouped_dump(GROUPED["window"], 300, seed=9)
    with Reader(codec.compress_dump(dump)) as reader:
        facts = summary(reader)
    assert [(g["layers"], g["tokens"]) for g in facts["groups"]] == [(2, 300), (3, 40)]
    assert sum(g["fp16_bytes"] for g in facts["groups"]) == facts["fp16_bytes"] == dump.fp16_bytes
    assert sum(g["file_bytes"] for g in facts["groups"]) == facts["coded_bytes"] + facts["sink_and_window_bytes"]
    assert facts["tokens"] == 300


# Parts and appends


@pytest.mark.parametrize("kind", GROUPED)
def test_a_part_has_windows_and_states_only_where_it_ends_with_the_last_token(learnt, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(writing, "BLOCK_ROWS", 16)
    spec = GROUPED[kind]
    codec, dump = CacheCodec(learnt("kvtc", kind), recent=8, sinks=2), grouped_dump(spec, 90, seed=9, states=True)
    blob = codec.compress_dump(dump)
    whole = streams_of(codec.decompress_dump(blob))
    for first, last in [(0, 90), (0, 1), (10, 60), (60, 90), (89, 90)]:
        if kind == "all windows" and (first, last) != (0, 90):
            with pytest.raises(InputError, match="the newest 40 tokens alone"):
                codec.decompress_dump(blob, tokens=(first, last))
            continue
        part = codec.decompress_dump(blob, tokens=(first, last))
        windows = [i for i, group in enumerate(spec.groups) if group.window]
        assert set(windows) & set(part.held_groups) == (set(windows) if last == 90 else set())
        assert (bool(part.states), bool(part.rings)) == (last == 90, last == 90 and bool(windows))
        for key, array in streams_of(part).items():
            is_window = spec.groups[int(key.split(".")[0]) if "." in key else 0].window
            assert np.array_equal(array, whole[key] if is_window else whole[key][..., first:last, :])
        write_dump(tmp_path / "part.npz", part)
        assert read_dump(tmp_path / "part.npz").held_groups == part.held_groups
        if len(part.held_groups) < len(spec.groups):
            with pytest.raises(InputError, match=r"part of a cache|starts at token"):
                codec.compress_dump(part)
            with pytest.raises(InputError, match=r"part of a cache|starts at token"):
                Samples([tmp_path / "part.npz"], 0).read(tmp_path / "part.npz")


@pytest.mark.parametrize(("before", "after"), [(1, 3), (20, 39), (30, 55), (39, 41), (41, 60), (70, 120)])
@pytest.mark.parametrize("kind", GROUPED)
@pytest.mark.parametrize("method", ["kvtc", "kvtc-rd"])
def test_a_file_grows_across_the_end_of_a_window(learnt, tmp_path, monkeypatch, method, kind, before, after):
    monkeypatch.setattr(writing, "BLOCK_ROWS", 16)
    codec, path = CacheCodec(learnt(method, kind), recent=6, sinks=2), tmp_path / "a.mlxkv"
    short, long = (grouped_dump(GROUPED[kind], n, seed=9, states=True, of=120) for n in (before, after))
    path.write_bytes(codec.compress_dump(short))
    with Reader(path) as reader:
        old = dict(reader.sections)
    codec.append_dump(path, long)
    assert path.read_bytes() == codec.compress_dump(long)
    with Reader(path) as reader:
        whole = [i for i, group in enumerate(GROUPED[kind].groups) if group.window is None]
        blocks = range(max(0, before - 8) // 16)
        kept = [f"{stream_key(i, name)}.{block}" for block in blocks for i in whole for name in STREAMS]
        kept = [name for name in kept if name in old]
        first = [name for name in reader.sections if not name.endswith("sink")][: len(kept)]
        assert first == kept
        assert all(reader.sections[name] == old[name] for name in kept)
    path.write_bytes(codec.compress_dump(short))
    codec.append_dump(path, last_part(long, codec.append_start(path, long.tokens[0])))
    assert path.read_bytes() == codec.compress_dump(long)


def last_part(dump, start):
    """The dump from a token on; windows stay whole."""
    streams = {
        key: array if dump.spec.groups[int(key.split(".")[0]) if "." in key else 0].window else array[..., start:, :]
        for key, array in streams_of(dump).items()
    }
    return replace(
        dump, k=streams.pop("k"), v=streams.pop("v"), others=streams, tokens=dump.tokens[:, start:], start=start
    )


def test_other_settings_do_not_go_on_with_a_file(learnt, tmp_path):
    artifacts, path = learnt("kvtc", "all windows"), tmp_path / "a.mlxkv"
    short, long = (grouped_dump(GROUPED["all windows"], n, seed=9, of=60) for n in (30, 60))
    path.write_bytes(CacheCodec(artifacts, recent=6, sinks=2).compress_dump(short))
    with pytest.raises(MismatchError, match="another layout, groups"):
        CacheCodec(artifacts, recent=7, sinks=2).append_dump(path, long)


# Artifacts


@pytest.mark.parametrize("kind", GROUPED)
@pytest.mark.parametrize("method", CONFIGS)
def test_artifacts_of_all_groups_are_kept_in_one_folder(learnt, tmp_path, method, kind):
    made = learnt(method, kind)
    made.save(tmp_path / "a")
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert {"k_mu.npy", "v_mu.npy", "1_k_mu.npy", "1_v_mu.npy", "meta.json"} <= names
    found = CalibrationArtifacts.from_dir(tmp_path / "a")
    assert (found.fingerprint, found.nbytes) == (made.fingerprint, made.nbytes)
    assert found.explain() == made.explain()
    assert found.explain()["1.k_width"] == GROUPED[kind].groups[1].stream("k").width
    found.save(tmp_path / "a", overwrite=True)


def test_artifacts_without_a_group_or_with_one_too_many_are_refused(learnt):
    made = learnt("kvtc", "window")
    with pytest.raises(MismatchError, match="2 shapes"):
        replace(made, others={})
    with pytest.raises(MismatchError, match=r"1\.k artifacts are"):
        replace(made, others={"1.k": made.k, "1.v": made.v})
    other = replace(made, others={**made.others, "1.k": replace(made.others["1.k"], mu=made.others["1.k"].mu + 1)})
    assert other.fingerprint != made.fingerprint


@pytest.mark.parametrize("method", CONFIGS)
def test_what_was_measured_is_told_of_each_group(learnt, method):
    meta = learnt(method, "window").meta
    [facts] = meta["groups"]
    assert (meta["calibration_tokens"], facts["calibration_tokens"]) == (3 * 296, 3 * 40)
    assert facts["held_out_error"].keys() == {"k", "v"}
    assert calibration_warning(meta) is None
    few = {**meta, "groups": [{**facts, "calibration_tokens": 5, "calibration_tokens_needed": 48}]}
    assert calibration_warning(few).startswith("5 tokens are few to learn 48")
    assert calibration_warning({**meta, "groups": 3}) is None


def test_one_quality_is_one_bargain_for_all_groups(tmp_path):
    """A group whose errors matter a hundred times as much gets more bits; the other gets as many as before."""
    spec, taken = GROUPED["window"], []
    dump = grouped_dump(spec, 40, seed=9)
    for factor in (1, 100):
        paths = [tmp_path / f"{seed}.npz" for seed in range(3)]
        for seed, path in enumerate(paths):
            known = grouped_dump(spec, 40, seed=seed)
            found = grouped_sensitivity(known)
            scaled = {key: array * (factor if key.startswith("1.") else 1) for key, array in found.items()}
            write_dump(path, replace(known, sensitivity=scaled))
        codec = CacheCodec(calibrate(paths, KVTCRDConfig()), recent=0, sinks=0)
        with Reader(codec.compress_dump(dump)) as reader:
            taken.append([group["file_bytes"] for group in summary(reader)["groups"]])
    assert taken[1][0] == taken[0][0]
    assert taken[1][1] > 1.2 * taken[0][1]


def test_attention_is_predicted_from_the_keys_that_a_window_still_holds(tmp_path):
    """Counted are tokens 4 to 225 of 300, and a window of 40 holds none of them; one of 200 holds most."""
    for window, held in ((40, False), (200, True)):
        layers = tuple(layer and replace(layer, window=layer.window and window) for layer in GROUPED["window"].layers)
        folder = tmp_path / str(window)
        artifacts = grouped_artifacts(folder, CacheSpec("toy", layers), KVTCRDConfig(), seeds=(0, 1))
        assert artifacts.v.attention.size > 0
        assert bool(artifacts.stream("v", 1).attention.size) is held
        samples = Samples([folder / "grouped0.npz"], 4).of_group(1)
        found = samples.sensitivity()
        assert len(found.held) == 221
        assert found.held.sum() == len(found.keys) == (125 if held else 0)
        rows = Samples([folder / "grouped0.npz"], 0).of_group(1).rows("k")
        assert np.array_equal(found.keys, rows[: len(found.keys)])


def test_layers_that_nothing_was_measured_of_are_weighed_like_the_main_group(tmp_path):
    spec, path = GROUPED["window"], tmp_path / "a.npz"
    dump = grouped_dump(spec, 200)
    measured = {k: array * (not k.startswith("1.")) for k, array in grouped_sensitivity(dump).items()}
    write_dump(path, replace(dump, sensitivity=measured))
    codec, held = CacheCodec(calibrate([path], KVTCRDConfig())), grouped_dump(spec, 200, seed=9)
    found = codec.decompress_dump(codec.compress_dump(held))
    assert relative_error(found.stream("k", 1), held.stream("k", 1)) < 0.05


def test_layers_without_a_dump_are_of_one_shape(learnt):
    codec, dump = CacheCodec(learnt("kvtc", "window")), grouped_dump(GROUPED["window"], 60)
    with pytest.raises(InputError, match=r"compress_dump\(\)"):
        codec.compress(list(dump.k), list(dump.v))
    keys, values = codec.decompress(codec.compress_dump(dump), tokens=(10, 60))
    assert [array.shape for array in (*keys, *values)] == [(1, 2, 50, 8)] * 4


def test_the_commands_tell_of_all_groups(learnt, tmp_path, says):
    dump = grouped_dump(GROUPED["window"], 90, seed=9)
    write_dump(tmp_path / "a.npz", dump)
    told = says("calibrate", "--npz", tmp_path / "a.npz", "--compression-ratio", "4", "--out", tmp_path / "b")
    assert (told["calibration_tokens"], told["1.calibration_tokens"]) == (86, 40)
    assert told["1.k_held_out_error"] > 0 < told["k_held_out_error"]
    learnt("kvtc-rd", "window").save(tmp_path / "artifacts")
    words = ("--artifacts", tmp_path / "artifacts")
    made = says("compress", "--npz", tmp_path / "a.npz", *words, "--out", tmp_path / "a.mlxkv")
    assert [group["tokens"] for group in made["groups"]] == [90, 40]
    found = says("inspect", tmp_path / "a.npz")
    assert found["groups"][1] == {
        "layers": [1, 2, 4],
        "window": 40,
        "k_shape": [3, 1, 1, 40, 16],
        "v_shape": [3, 1, 1, 40, 16],
    }
    assert says("inspect", tmp_path / "artifacts")["1.k_width"] == 48
    assert len(says("inspect", tmp_path / "a.mlxkv")["groups"]) == 2
    back = says("decompress", tmp_path / "a.mlxkv", *words, "--out", tmp_path / "b.npz")
    assert back["1.k_shape"] == [3, 1, 1, 40, 16]
    assert read_dump(tmp_path / "b.npz").rings == dump.rings
    assert run("inspect", tmp_path / "a.mlxkv") == 0

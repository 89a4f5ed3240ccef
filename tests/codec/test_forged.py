"""What a file says about itself is checked before it is used: types, ranges, sizes; loops are paid for by its own bytes."""

import copy
import dataclasses
import json
import math
import os
import tracemalloc

import mlx.core as mx
import numpy as np
import pytest
from conftest import run
from forging import forge, header_of
from fuzz.guard import SECONDS, alarm
from synthetic import DUAL, PLAIN, rd_artifacts, toy_artifacts, toy_dump, toy_sensitivity

from mlxkv.cli._checks import read_size
from mlxkv.codec import writing
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.layout import DECODE_ROWS, MAX_BLOCK_ROWS, Layout
from mlxkv.codec.methods.kvtc import KVTCStream
from mlxkv.codec.methods.kvtc_rd import KVTCRDStream
from mlxkv.codec.reading import WORKING_BYTES
from mlxkv.codec.session import CacheCodec
from mlxkv.codec.stages.basis import Basis
from mlxkv.codec.stages.plan import MAX_RUNS, Group, Plan
from mlxkv.dump import KVDump, read_dump, write_dump
from mlxkv.errors import FormatError, InputError, MismatchError, MlxkvError
from mlxkv.io import container, inputs, lossless
from mlxkv.io.container import Reader, digest, encode_section
from mlxkv.io.inputs import check_decoded_size, read_text
from mlxkv.spec import MAX_LAYERS, CacheSpec, Rope, Slot

HUGE = 10**400


@pytest.fixture(scope="module")
def codecs(tmp_path_factory):
    made = {
        "kvtc": toy_artifacts(tmp_path_factory.mktemp("kvtc"), seeds=(0,)),
        "kvtc-rd": rd_artifacts(tmp_path_factory.mktemp("rd"), seeds=(0,)),
    }
    return {name: CacheCodec(artifacts, recent=3, sinks=2) for name, artifacts in made.items()}


@pytest.fixture(params=["kvtc", "kvtc-rd"])
def codec(codecs, request):
    return codecs[request.param]


def file_of(codec, **changes):
    """A file whose layout says something else."""
    header, body = header_of(codec.compress_dump(toy_dump(codec.artifacts.spec, length=40)))
    header["layout"].update(changes)
    return forge(header, body)


# Layouts


@pytest.mark.parametrize("changes", [{"length": 2**31 - 1}, {"length": 2**31 - 1, "w": 2**31 - 5}], ids=str)
def test_an_append_to_a_forged_length_ends_at_once(codec, changes, tmp_path):
    path = tmp_path / "a.mlxkv"
    path.write_bytes(file_of(codec, **changes))
    with alarm(SECONDS):
        with pytest.raises(MlxkvError):
            codec.append_dump(path, toy_dump(codec.artifacts.spec, length=60))
        with pytest.raises(FormatError):
            codec.decompress(path)


@pytest.mark.parametrize("key", ["batch", "length", "sinks", "recent", "block_tokens"])
@pytest.mark.parametrize("value", [2**31, HUGE, -1, True, 1.0, "1", None])
def test_numbers_of_a_layout_are_positions(key, value):
    fields = {"batch": 1, "length": 9, "sinks": 1, "recent": 2, "block_tokens": 4}
    with pytest.raises(FormatError, match="not a layout"):
        Layout(**{**fields, key: value})


@pytest.mark.parametrize("recent", [0, 3, 30])
@pytest.mark.parametrize("window", [None, 60.0])
def test_blocks_are_counted_without_making_them(recent, window):
    for length in (1, 5, 12, 13, 29):
        layout = Layout(1, length, 2, recent, 4)
        assert layout.count_blocks(window is not None) == len(list(layout.coded_blocks(30.0, window)))
        assert layout.complete_blocks == sum(stop - start == 4 for _, start, stop in layout.blocks())


# Descriptions of caches


def test_a_cache_of_no_width_is_refused_however_long():
    with pytest.raises(MlxkvError, match="keeps a key/value cache"):
        CacheSpec("toy", ((Slot("keys", 1, 0), Slot("values", 1, 0)),))


def described(**changes):
    data = json.loads(json.dumps(DUAL.to_json()))
    data["kinds"][0][0]["rope"].update(changes)
    return data


@pytest.mark.parametrize("name", ["scale", "gain", "base"])
@pytest.mark.parametrize("value", [10**30, HUGE, 3e38, 1e-45, 0, -1, math.inf, math.nan, "1", True, [1.0], None])
def test_a_rotation_is_finite_at_every_position_or_refused(name, value):
    try:
        rope = CacheSpec.from_json(described(**{name: value})).stream("k").ropes[0]
    except FormatError:
        return
    keys = mx.ones((1, 1, 2, 8))
    for start in (0, 2**31 - 3):
        for turned in (rope.rotate(keys, start), rope.unrotate(keys, start)):
            assert mx.isfinite(turned).all().item()


@pytest.mark.parametrize(
    "freqs", [[1e-45] * 4, ["1"] * 4, [True] * 4, [HUGE] * 3, [0] * 4, [math.nan] * 4, {}, "1234", 4]
)
def test_periods_of_a_rotation_are_numbers_that_rotate(freqs):
    with pytest.raises(FormatError):
        CacheSpec.from_json(described(freqs=freqs, base=None))


@pytest.mark.parametrize(
    "change",
    [
        {"kinds": {}}, {"layers": "0000"}, {"layers": [0] * (MAX_LAYERS + 1)}, {"layers": [True]}, {"layers": [HUGE]},
        {"model_type": None}, {"model_type": ["llama"]}, {"mode": []}, {"kinds": [[]]}, {"kinds": [[1, 2]]},
    ],
    ids=lambda change: str(change)[:40],
)  # fmt: skip
def test_a_description_of_another_form_is_refused(change):
    with pytest.raises(FormatError):
        CacheSpec.from_json({**DUAL.to_json(), **change})


@pytest.mark.parametrize("field", ["heads", "dim"])
@pytest.mark.parametrize("value", [2**15, 10**12, HUGE, -1, 1.0, "8", None, True])
def test_slots_have_sizes_that_models_have(field, value):
    data = json.loads(json.dumps(DUAL.to_json()))
    data["kinds"][0][1][field] = value
    with pytest.raises(FormatError):
        CacheSpec.from_json(data)


def test_a_description_of_thousands_of_kinds_takes_no_longer_than_its_bytes():
    kinds = [[*pair] for i in range(MAX_LAYERS) for pair in DUAL.to_json()["kinds"]]
    kinds = copy.deepcopy(kinds)
    for i, kind in enumerate(kinds):
        kind[0]["rope"]["base"] = 1e4 + i
    data = {**DUAL.to_json(), "kinds": kinds, "layers": list(range(MAX_LAYERS))}
    with alarm(SECONDS):  # it was quadratic: minutes
        assert CacheSpec.from_json(data).to_json() == data


# Artifacts


def part(kind, **changes):
    """One stream's artifacts with other fields."""
    if kind == "kvtc":
        fields = {"mu": np.zeros(2, np.float32), "V": np.eye(2, dtype=np.float16), "plan": Plan((Group(1, "fp8"),) * 2)}
        return KVTCStream(**{**fields, **changes})
    codes = np.frombuffer((4).to_bytes(4, "little") + lossless.encode("deflate", bytes(4)), np.uint8)
    tables = np.zeros((64, 256), np.uint16)
    tables[:, 0] = 4096
    ones = np.ones(2, np.float32)
    fields = {"mu": ones, "codes": codes, "scale": ones, "spread": ones, "weights": np.eye(2, dtype=np.float16)[None]}
    fields |= {"attention": np.zeros((0, 0), np.float32), "tables": tables}
    return KVTCRDStream(**{**fields, **changes})


@pytest.mark.parametrize("kind", ["kvtc", "kvtc-rd"])
def test_these_artifacts_are_sound(kind):
    assert part(kind).width == 2


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("kvtc", {"mu": np.array([0, np.inf], np.float32)}),
        ("kvtc", {"V": np.full((2, 2), np.nan, np.float16)}),
        ("kvtc", {"mu": np.zeros(0, np.float32), "V": np.zeros((0, 10**12), np.float16), "plan": Plan((Group(10**12, "none"),))}),
        ("kvtc", {"V": np.zeros((2, 3), np.float16), "plan": Plan((Group(1, "fp8"),) * 3)}),
        ("kvtc-rd", {"scale": np.array([np.inf, 1], np.float32)}),
        ("kvtc-rd", {"spread": np.array([1, -1], np.float32)}),
        ("kvtc-rd", {"scale": np.zeros(0, np.float32), "spread": np.zeros(0, np.float32)}),
        ("kvtc-rd", {"tables": np.ones((64, 256), np.uint16)}),
        ("kvtc-rd", {"tables": np.zeros((64, 256), np.uint16)}),
    ],
    ids=lambda value: str(list(value)) if isinstance(value, dict) else value,
)  # fmt: skip
def test_artifacts_that_no_calibration_makes_are_refused(kind, changes):
    with pytest.raises(FormatError):
        part(kind, **changes)


def test_a_plan_changes_its_type_a_bounded_number_of_times():
    groups = [Group(1, kind) for kind in ("fp8", "int4")] * MAX_RUNS
    with pytest.raises(FormatError, match="at most"):
        Plan(tuple(groups))


def test_a_small_basis_does_not_become_a_huge_matrix():
    side = 20_000
    codes = np.frombuffer((side * side).to_bytes(4, "little") + bytes(99), np.uint8)
    with pytest.raises(FormatError, match="is not one of"):
        Basis(codes, np.ones(side, np.float32), np.ones(side, np.float32), side)


@pytest.mark.parametrize("tokens", ["x", None, [], 1.5, True, -1])
def test_artifacts_of_no_number_of_tokens_are_no_traceback(codecs, tokens, tmp_path, capsys):
    made = codecs["kvtc"].artifacts
    dataclasses.replace(made, meta={**made.meta, "calibration_tokens": tokens}).save(tmp_path / "artifacts")
    assert run("inspect", tmp_path / "artifacts") == 3
    assert "number of tokens" in capsys.readouterr().err


def test_rows_that_decode_to_infinity_are_refused(codecs):
    codec = codecs["kvtc"]
    header, body = header_of(codec.compress_dump(toy_dump(length=40)))
    position, parts = 0, []
    for row in header["sections"]:
        data = body[position : position + row[3]]
        position += row[3]
        if row[0] == "k.0":
            data = lossless.encode("deflate", b"\xff" * row[2])
            row[3:] = [len(data), digest(data).hex()]
        parts.append(data)
    with pytest.raises(FormatError, match="NaN or infinite"):
        codec.decompress(forge(header, b"".join(parts)))


# Dumps and live caches


@pytest.mark.parametrize("name", ["k", "v", "k.energy", "v.energy"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 2), (3, 2, 0)])
def test_a_sensitivity_of_another_shape_is_refused(name, shape):
    dump = toy_dump(length=40)
    with pytest.raises(MismatchError, match="sensitivity"):
        dataclasses.replace(dump, sensitivity={**toy_sensitivity(dump), name: np.zeros(shape, np.float32)})


def test_a_scalar_sensitivity_on_disk_is_refused(tmp_path):
    dump = toy_dump(length=40)
    dump.sensitivity = {**toy_sensitivity(dump), "k.energy": np.zeros((), np.float32)}
    write_dump(tmp_path / "a.npz", dump)
    with pytest.raises(MismatchError, match="sensitivity"):
        read_dump(tmp_path / "a.npz")


@pytest.mark.parametrize(
    "layers", [[[["a"], []], [1, []]], [["x", []]], [[True, []]], [[-1, []]], [[1]], [3], {}, None, "x"]
)
def test_a_live_cache_with_forged_offsets_is_no_traceback(layers, tmp_path, capsys):
    (tmp_path / "a.cache").write_bytes(forge({"kind": "live cache", "layers": layers, "sections": []}))
    assert run("inspect", tmp_path / "a.cache") == 3
    assert "layers" in capsys.readouterr().err


# Sizes


def flat_file(tmp_path, method="kvtc"):
    """A file of a constant cache, which is many times smaller than it."""
    spec, length = CacheSpec("flat", ((Slot("keys", 4, 32), Slot("values", 4, 32)),) * 2), 3000
    keys = np.ones((2, 1, 4, length, 32), np.float16)
    dump = KVDump(keys, keys, spec, np.zeros((1, length), np.int32), fingerprint="f00d")
    make = toy_artifacts if method == "kvtc" else rd_artifacts
    codec = CacheCodec(make(tmp_path, spec, seeds=(0,)), recent=0, sinks=0)
    path = tmp_path / "flat.mlxkv"
    path.write_bytes(codec.compress(list(dump.k), list(dump.v)))
    return codec, path, dump.k.nbytes + dump.v.nbytes


@pytest.mark.parametrize("method", ["kvtc", "kvtc-rd"])
def test_a_file_that_grows_out_of_proportion_needs_leave(method, tmp_path, monkeypatch):
    codec, path, decoded = flat_file(tmp_path, method)
    monkeypatch.setattr(inputs, "FREE_BYTES", 1000)
    monkeypatch.setattr(inputs, "MAX_RATIO", 5)
    for call in (codec.decompress, lambda *a, **k: codec.decompress(*a, tokens=(0, 1500), **k)):
        with pytest.raises(InputError, match=r"--limit \(in Python limit=\)"):
            call(path)
    assert len(codec.decompress(path, limit=decoded)[0]) == 2
    with pytest.raises(InputError, match="limit"):
        codec.decompress(path, limit=decoded - 1)


@pytest.mark.parametrize("method", ["kvtc", "kvtc-rd"])
def test_memory_for_a_block_counts_towards_the_limit(method, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "BLOCK_ROWS", MAX_BLOCK_ROWS)
    spec, make = CacheSpec("thin", ((Slot("keys", 1, 16), Slot("values", 1, 16)),)), (toy_artifacts, rd_artifacts)
    codec = CacheCodec(make[method == "kvtc-rd"](tmp_path, spec, seeds=(0,)), recent=0, sinks=0)
    dump = toy_dump(spec, length=MAX_BLOCK_ROWS)
    blob = codec.compress(list(dump.k), list(dump.v))
    codec.decompress(codec.compress([dump.k[0, :, :, :9]], [dump.v[0, :, :, :9]]))  # what is made once
    del dump
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    tracemalloc.start()
    codec.decompress(blob)
    used = tracemalloc.get_traced_memory()[1] + mx.get_peak_memory() - before
    tracemalloc.stop()
    width = 2 * 16
    assert used < (2 + WORKING_BYTES) * width * MAX_BLOCK_ROWS
    counted = 2 * width * MAX_BLOCK_ROWS + WORKING_BYTES * width * (MAX_BLOCK_ROWS - DECODE_ROWS)
    with pytest.raises(InputError, match="limit"):
        codec.decompress(blob, limit=counted - 1)


def test_a_part_counts_as_the_blocks_that_it_is_cut_from(tmp_path):
    codec, path, decoded = flat_file(tmp_path)
    block = decoded * 512 // 3000
    assert codec.decompress(path, tokens=(5, 6), limit=block)[0][0].shape == (1, 4, 1, 32)
    with pytest.raises(InputError, match="limit"):
        codec.decompress(path, tokens=(5, 6), limit=block - 1)


def test_what_any_file_may_decode_to_is_256_mib_or_200_times_itself():
    check_decoded_size("a", 256 * 2**20, 1)
    check_decoded_size("a", 200 * 2**30, 2**30)
    for decoded, stored in ((256 * 2**20 + 1, 1), (200 * 2**30 + 1, 2**30)):
        with pytest.raises(InputError, match="are allowed"):
            check_decoded_size("a", decoded, stored)


@pytest.mark.parametrize(
    ("text", "size"),
    [("500MB", 5 * 10**8), ("20GB", 2 * 10**10), ("1.5 GiB", 3 * 2**29), ("7", 7), ("2kb", 2000), (None, None)],
)
def test_a_limit_is_a_size_as_people_write_it(text, size):
    assert read_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1GB", "1e9", "nan", "1 parsec", "9" * 400])
def test_anything_else_is_no_limit(text):
    with pytest.raises(InputError, match="--limit is a size"):
        read_size(text)


def test_the_command_line_has_the_limit(tmp_path, capsys, codecs):
    codecs["kvtc"].artifacts.save(tmp_path / "artifacts")
    (tmp_path / "a.mlxkv").write_bytes(codecs["kvtc"].compress_dump(toy_dump(length=40)))
    words = ["decompress", tmp_path / "a.mlxkv", "--artifacts", tmp_path / "artifacts", "--out", tmp_path / "a.npz"]
    assert run(*words, "--limit", "1KB") == 2
    assert "--limit" in capsys.readouterr().err
    assert run(*words, "--limit", "1MB") == 0


def test_a_header_that_readers_would_refuse_is_not_written(codecs):
    dump = toy_dump(length=40)
    with pytest.raises(InputError, match="readers accept"):
        codecs["kvtc"].compress(list(dump.k), list(dump.v), meta={"note": "x" * container.MAX_HEADER})


@pytest.mark.parametrize("size", [2**48 + 1, 2**62, HUGE])
def test_sections_have_sizes_that_files_have(size):
    section, _ = encode_section("a", b"")
    row = ["a", "raw", size, size, section.digest]
    with pytest.raises(FormatError, match="malformed"):
        Reader(forge({"sections": [row]}))


# Texts


@pytest.mark.parametrize("content", ["pipe", "zero", "folder", "missing", "latin"])
def test_a_prompt_comes_from_a_text_file(content, tmp_path, model_dir, capsys):
    path = tmp_path / "prompt"
    if content == "pipe":
        os.mkfifo(path)
    elif content == "folder":
        path.mkdir()
    elif content == "latin":
        path.write_bytes(b"caf\xe9")
    path = "/dev/zero" if content == "zero" else path
    code = run("dump", "--model", model_dir, "--prompt-file", path, "--out", tmp_path / "a.npz")
    assert code == (3 if content == "latin" else 2)
    assert "UTF-8" in (err := capsys.readouterr().err) or "cannot read" in err


def test_a_text_has_a_size_that_a_model_can_read(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    assert read_text(tmp_path / "a.txt", limit=3) == "abc"
    with pytest.raises(InputError, match="has more than"):
        read_text(tmp_path / "a.txt", limit=2)


def test_spec_and_rope_still_read_what_old_files_say():
    assert CacheSpec.from_json(PLAIN.to_json()) == PLAIN
    assert Rope(8, base=10000).to_json()["base"] == 10000  # an int stays one: fingerprints are made of it


def test_folders_of_artifacts_are_read_back(codecs, tmp_path):
    for name, codec in codecs.items():
        codec.artifacts.save(tmp_path / name)
        assert CalibrationArtifacts.from_dir(tmp_path / name).fingerprint == codec.artifacts.fingerprint

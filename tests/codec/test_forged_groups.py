"""What a file says of its groups of layers is checked before it is used: how many, their layouts, their rings, their sizes."""

import json
from dataclasses import replace

import numpy as np
import pytest
from forging import forge, header_of
from fuzz.guard import SECONDS, alarm
from synthetic import GROUPED, grouped_artifacts, grouped_dump

from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.layout import Layout
from mlxkv.codec.methods.kvtc import KVTCConfig
from mlxkv.codec.session import CacheCodec
from mlxkv.codec.summary import summary
from mlxkv.dump import KVDump
from mlxkv.errors import FormatError, InputError, MismatchError, MlxkvError
from mlxkv.io.container import Reader
from mlxkv.spec import MAX_LAYERS, CacheSpec, Layer, Slot

LENGTH, HUGE = 60, 10**400


@pytest.fixture(scope="module")
def codecs(tmp_path_factory):
    return {
        kind: CacheCodec(
            grouped_artifacts(tmp_path_factory.mktemp("forged"), GROUPED[kind], KVTCConfig(4.0), seeds=(0,)),
            recent=3,
            sinks=2,
        )
        for kind in ("window", "shapes", "all windows")
    }


def file_of(codec):
    return header_of(codec.compress_dump(grouped_dump(codec.artifacts.spec, LENGTH, of=90)))


def check_refused(codec, blob, tmp_path):
    """Reading ends soon with a typed error; of parts perhaps with a result; an append may replace what is wrong."""
    path, longer = tmp_path / "a.mlxkv", grouped_dump(codec.artifacts.spec, 90, of=90)
    path.write_bytes(blob)
    with alarm(SECONDS):
        with pytest.raises(MlxkvError):
            codec.decompress_dump(path)
        try:
            codec.append_dump(path, longer)
        except MlxkvError:
            assert path.read_bytes() == blob
        else:
            assert path.read_bytes() == codec.compress_dump(longer)
        for call in (lambda: codec.decompress_dump(path, tokens=(0, 5)), lambda: summary(Reader(blob))):
            try:
                call()
            except MlxkvError:
                continue


ONE = {"batch": 1, "length": 40, "s": 0, "w": 3, "block": 512, "start": 20}


def test_the_header_says_where_a_window_begins(codecs):
    assert file_of(codecs["window"])[0]["groups"] == [ONE]


@pytest.mark.parametrize("kind", ["window", "shapes", "all windows"])
@pytest.mark.parametrize(
    "groups",
    [
        None, [], {}, "x", 3, [3], [None], [[]], [{}], [{**ONE, "start": 19}], [{**ONE, "length": 39}], [ONE] * 9,
        [{**ONE, "length": 60, "start": 0}], [{**ONE, "start": 2**31 - 1}], [{**ONE, "length": 2**31 - 1, "start": 0}],
        [{**ONE, "s": 2}], [{**ONE, "batch": 2}], [{**ONE, "start": HUGE}], [{**ONE, "start": -20}], [ONE] * 5000,
        [{**ONE, "start": True}], [{**ONE, "start": 20.0}], [{**ONE, "more": 1}], [{**ONE, "w": 2**31 - 1, "block": 1}],
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_layouts_that_are_not_of_these_groups_are_refused(codecs, tmp_path, kind, groups):
    header, body = file_of(codecs[kind])
    check_refused(codecs[kind], forge({**header, "groups": groups}, body), tmp_path)


@pytest.mark.parametrize("kind", ["window", "shapes", "all windows"])
@pytest.mark.parametrize(
    "change",
    [{"start": 1, "s": 0}, {"length": 2**31 - 1}, {"length": 61}, {"batch": 2}, {"start": 2**31 - 100, "s": 0}],
    ids=str,
)
def test_all_groups_are_of_one_text(codecs, tmp_path, kind, change):
    header, body = file_of(codecs[kind])
    check_refused(codecs[kind], forge({**header, "layout": {**header["layout"], **change}}, body), tmp_path)


def test_a_file_without_its_other_groups_is_refused(codecs, tmp_path):
    header, body = file_of(codecs["window"])
    del header["groups"]
    check_refused(codecs["window"], forge(header, body), tmp_path)


@pytest.mark.parametrize("name", ["1.k.sink", "1.v.window", "1.k.0"])
@pytest.mark.parametrize("other", ["2.k.sink", "k.other", "1.k.1", "0.k.sink"])
def test_a_section_of_a_group_is_not_another_one(codecs, tmp_path, name, other):
    header, body = file_of(codecs["window"])
    header["sections"] = [[other if row[0] == name else row[0], *row[1:]] for row in header["sections"]]
    check_refused(codecs["window"], forge(header, body), tmp_path)


@pytest.mark.parametrize("shape", [[3, 1, 1, 41, 16], [3, 1, 1, 0, 16], [3, 1, 2, 3, 16], [0], [], [2**40, 0, 1, 1, 1]])
def test_unquantized_tokens_of_a_group_have_the_shape_of_its_layout(codecs, tmp_path, shape):
    header, body = file_of(codecs["window"])
    header["raw"]["1.k.window"][1] = shape
    check_refused(codecs["window"], forge(header, body), tmp_path)


@pytest.mark.parametrize(
    "rings", [{"1": 0}, {"1": 41}, {"0": 3}, {"2": 3}, {"1": True}, {"1": 1.0}, {"1": HUGE}, {"x": 1}, [], "1", 3, None]
)
def test_rings_are_rows_of_windows(codecs, rings):
    header, body = file_of(codecs["window"])
    header["meta"]["rings"] = rings
    with pytest.raises(MlxkvError):
        codecs["window"].decompress_dump(forge(header, body))
    part = codecs["window"].decompress_dump
    with pytest.raises(FormatError) if not isinstance(rings, dict) else pytest.raises(MlxkvError):
        part(forge(header, body), tokens=(LENGTH - 1, LENGTH))


def test_what_all_groups_decode_to_counts_towards_the_limit(codecs):
    for codec in codecs.values():
        dump = grouped_dump(codec.artifacts.spec, LENGTH, of=90)
        blob = codec.compress_dump(dump)
        whole = sum(array.nbytes for array in (dump.k, dump.v, *dump.others.values()))
        codec.decompress_dump(blob, limit=whole)
        with pytest.raises(InputError, match="limit"):
            codec.decompress_dump(blob, limit=whole - 1)


def test_a_window_that_has_moved_on_has_no_sinks():
    Layout(1, 9, 0, 2, 4, start=5)
    for fields in ({"sinks": 1, "start": 5}, {"sinks": 0, "start": 2**31 - 5}):
        with pytest.raises(FormatError, match="not a layout"):
            Layout(**{"batch": 1, "length": 9, "recent": 2, "block_tokens": 4, **fields})


@pytest.mark.parametrize("kind", ["window", "shapes"])
@pytest.mark.parametrize("missing", ["1.k", "1.v"])
def test_a_dump_that_lacks_an_array_of_a_group_is_refused_by_its_name(kind, missing):
    dump = grouped_dump(GROUPED[kind], LENGTH, of=90)
    others = {key: array for key, array in dump.others.items() if key != missing}
    with pytest.raises(MismatchError, match=rf"no {missing}"):
        replace(dump, others=others)


def test_rings_of_thousands_of_groups_are_checked_as_fast_as_they_are_read():
    slot = Slot("x", 1, 1)
    spec = CacheSpec("toy", tuple(Layer(slot, slot, window=i + 1) for i in range(MAX_LAYERS)))
    one = np.zeros((1, 1, 1, 1, 1), np.float16)
    others = {f"{i}.{name}": one for i in range(1, MAX_LAYERS) for name in "kv"}
    with alarm(SECONDS):  # it was quadratic
        KVDump(one, one, spec, np.zeros((1, 1), np.int32), others=others, rings=dict.fromkeys(range(MAX_LAYERS), 1))


def test_names_of_groups_are_not_names_of_extras(tmp_path):
    from synthetic import toy_artifacts, toy_dump

    codec, dump = CacheCodec(toy_artifacts(tmp_path, seeds=(0,))), toy_dump(length=20)
    for name in ("k.x", "1.v.x", "4096.k.0"):
        with pytest.raises(InputError, match="own names"):
            codec.compress(list(dump.k), list(dump.v), extras={name: np.zeros(1, np.float32)})


@pytest.mark.parametrize("groups", [MAX_LAYERS, 3, 1])
def test_artifacts_with_files_of_other_groups_than_their_cache_has_are_refused(codecs, tmp_path, groups):
    codecs["window"].artifacts.save(tmp_path / "a")
    path = tmp_path / "a" / "meta.json"
    meta = json.loads(path.read_text())
    [full, window] = meta["spec"]["kinds"][::-1] if "window" in str(meta["spec"]["kinds"][0]) else meta["spec"]["kinds"]
    kinds = [full, *([*window[:2], {"window": 40 + i}] for i in range(groups - 1))]
    meta["spec"] |= {"kinds": kinds, "layers": list(range(groups))}
    path.write_text(json.dumps(meta))
    with alarm(SECONDS), pytest.raises(MlxkvError):
        CalibrationArtifacts.from_dir(tmp_path / "a")

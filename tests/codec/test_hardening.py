"""Nasty inputs that once got further than they should."""

import copy
import dataclasses
import json
import os
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from forging import forge, header_of
from synthetic import DUAL, toy_artifacts, toy_dump

from mlxkv.cli import main
from mlxkv.codec.calibrate import calibrate
from mlxkv.codec.layout import BLOCK_ROWS, MAX_BLOCK_ROWS, Layout
from mlxkv.codec.methods.kvtc import KVTCConfig
from mlxkv.codec.session import CacheCodec
from mlxkv.dump import KVDump, write_dump
from mlxkv.errors import FormatError, InputError, MismatchError
from mlxkv.io.atomic import atomic_write
from mlxkv.io.container import Reader, digest
from mlxkv.io.inputs import open_input
from mlxkv.io.npz import read_npz
from mlxkv.spec import CacheSpec

BOMB = zlib.compress(bytes(50_000_000), 9)


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return CacheCodec(toy_artifacts(tmp_path_factory.mktemp("hardening")), recent=3, sinks=2)


def with_section(blob, name, stored, size, shape):
    """The blob with one section replaced, all lengths and checksums made to fit."""
    header, sections = header_of(blob)
    header["raw"][name][1] = shape
    body, position = b"", 0
    for row in header["sections"]:
        data = sections[position : position + row[3]]
        position += row[3]
        if row[0] == name:
            data = stored
            row[1:] = ["deflate", size, len(stored), digest(stored).hex()]
        body += data
    return forge(header, body)


@pytest.mark.parametrize(
    ("name", "shape"), [("k.sink", [3, 1, 2, 520833, 8]), ("state.0.0", [25_000_000]), ("tokens", [1, 12_500_000])]
)
def test_a_bomb_in_a_raw_section_is_refused_before_it_goes_off(codec, name, shape):
    blob = with_section(codec.compress_dump(toy_dump(length=40, states=True)), name, BOMB, 50_000_000, shape)
    tracemalloc.start()
    with pytest.raises(FormatError):
        codec.decompress_dump(blob)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


def test_blocks_bound_rows_whatever_the_batch(codec):
    blob = codec.compress_dump(toy_dump(length=140, batch=8))
    with Reader(blob) as reader:
        assert reader.header["layout"]["block"] == BLOCK_ROWS // 8
    with pytest.raises(FormatError, match="not a layout"):
        Layout(batch=MAX_BLOCK_ROWS, length=10, sinks=0, recent=0, block_tokens=2)


def test_an_archive_whose_members_overlap_is_refused(tmp_path):
    path = tmp_path / "overlap.npz"
    np.savez(path, a=np.zeros(1000))
    with zipfile.ZipFile(path, "a") as archive:
        twin = copy.copy(archive.filelist[0])
        twin.filename = "b.npy"
        archive.filelist.append(twin)
        archive._didModify = True
    with pytest.raises(FormatError, match="claim more bytes"):
        read_npz(path)


@pytest.mark.parametrize("name", ["", ".", "/"])
def test_a_folder_or_nothing_is_no_file_to_write(name):
    with pytest.raises(InputError, match="cannot write"), atomic_write(name):
        pass


def test_pipes_are_neither_read_nor_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(InputError, match="not a regular file"):
        open_input(pipe)
    with pytest.raises(InputError, match="cannot write"), atomic_write(pipe):
        pass
    assert pipe.is_fifo()


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    with atomic_write(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


@pytest.mark.parametrize("value", [[], "yes", None, 1])
def test_a_rope_is_traditional_or_not(value):
    data = json.loads(json.dumps(DUAL.to_json()))
    data["kinds"][0][0]["rope"]["traditional"] = value
    with pytest.raises(FormatError, match="true or false"):
        CacheSpec.from_json(data)


def test_a_dump_of_no_tokens_is_refused():
    empty = toy_dump(length=1)
    with pytest.raises(MismatchError, match="at least one token"):
        KVDump(empty.k[..., :0, :], empty.v[..., :0, :], empty.spec, empty.tokens[:, :0])


def test_too_few_tokens_to_calibrate_is_an_input_error(tmp_path):
    write_dump(tmp_path / "short.npz", toy_dump(length=5))
    with pytest.raises(InputError, match="1 tokens are left after the first 4"):
        calibrate([tmp_path / "short.npz"], KVTCConfig(4))


@pytest.mark.parametrize(
    "wrong",
    [{"compression_ratio": value} for value in ("4", True, 0, -1, float("nan"), float("inf"), 1e-320)]
    + [{"rank": 2.5}, {"rank": 0}, {"sinks": 1.5}, {"sinks": -1}, {"samples_per_file": True}, {"seed": "0"}],
)
def test_settings_of_another_type_or_range_are_refused(wrong):
    with pytest.raises(InputError, match="must be"):
        KVTCConfig(**{"compression_ratio": 4, **wrong})


def test_extras_and_meta_that_could_not_be_read_back_are_refused(codec):
    dump = toy_dump(length=40)
    layers = list(dump.k), list(dump.v)
    with pytest.raises(InputError, match=r"codec's own names: k\.0"):
        codec.compress(*layers, extras={"k.0": dump.tokens})
    with pytest.raises(InputError, match="plain JSON"):
        codec.compress(*layers, meta={"a": np.int64(1)})


@pytest.mark.parametrize("name", ["[/x]", "[bold]hello", "\x1b[31mred", "\ud800"])
def test_a_hostile_model_name_is_shown_as_plain_text(name, tmp_path, capsys):
    write_dump(tmp_path / "x.npz", dataclasses.replace(toy_dump(length=5), model=name))
    with pytest.raises(SystemExit) as exit_info:
        main(["inspect", str(tmp_path / "x.npz")])
    assert not exit_info.value.code
    out = capsys.readouterr().out
    assert name.replace("\x1b", "?").replace("\ud800", "?") in out
    assert "\x1b[31m" not in out


def test_calibration_of_a_long_dump_keeps_only_its_samples(tmp_path):
    write_dump(tmp_path / "long.npz", toy_dump(length=3 * BLOCK_ROWS))
    artifacts = calibrate([tmp_path / "long.npz"], KVTCConfig(4, samples_per_file=100))
    assert artifacts.meta["calibration_tokens"] == 100
    everything = calibrate([tmp_path / "long.npz"], KVTCConfig(4))
    assert everything.meta["calibration_tokens"] == 3 * BLOCK_ROWS - 4
    assert not np.array_equal(artifacts.k.mu, everything.k.mu)

import errno
import io
import json
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import time
import tracemalloc
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from mlxkv.dump import KVDump, read_dump, write_dump
from mlxkv.errors import FormatError, InputError, MismatchError, VersionError
from mlxkv.io import atomic, container, disk, growing
from mlxkv.io.atomic import atomic_write
from mlxkv.io.inputs import parse_json
from mlxkv.io.npz import read_npy, read_npz
from mlxkv.spec import CacheSpec, Rope, Slot

SPEC = CacheSpec("toy", (None, *((Slot("keys", 2, 4, Rope(4, base=1e4)), Slot("values", 1, 4)),) * 2))
LATENT = CacheSpec("mla", ((Slot("latent", 1, 6), Slot("k_pe", 1, 2, Rope(2, base=1e4))),), "single_stream")


def toy_dump(dtype=np.float16, states=True):
    random = np.random.default_rng(0)
    k = random.standard_normal((2, 2, 2, 5, 4)).astype(dtype)
    v = random.standard_normal((2, 2, 1, 5, 4)).astype(dtype)
    tokens = random.integers(0, 50000, (2, 5)).astype(np.int32)
    extra = {"0.0": random.standard_normal((2, 3, 7)).astype(np.float32)} if states else {}
    return KVDump(k, v, SPEC, tokens, "a/model", "abc123", np.dtype(dtype).name, extra)


@contextmanager
def at_most(limit):
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def npy(array, **header):
    buffer = io.BytesIO()
    np.save(buffer, array)
    if not header:
        return buffer.getvalue()
    out = io.BytesIO()
    described = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape, **header}
    np.lib.format.write_array_header_1_0(out, described)
    return out.getvalue() + array.tobytes()


def archive(path, members):
    with zipfile.ZipFile(path, "w") as out:
        for name, data in members:
            out.writestr(name, data)
    return path


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_dump_survives_its_file(tmp_path, dtype):
    dump = toy_dump(dtype)
    write_dump(tmp_path / "dump.npz", dump)
    again = read_dump(tmp_path / "dump.npz")
    for name in ("k", "v", "tokens"):
        before, after = getattr(dump, name), getattr(again, name)
        assert after.dtype == before.dtype
        assert after.tobytes() == before.tobytes()
    assert again.states.keys() == {"0.0"}
    assert np.array_equal(again.states["0.0"], dump.states["0.0"])
    assert (again.spec, again.model, again.fingerprint, again.dtype) == (SPEC, "a/model", "abc123", dump.dtype)
    assert os.listdir(tmp_path) == ["dump.npz"]


def test_a_dump_without_values_survives_its_file(tmp_path):
    k = np.arange(40, dtype=np.float16).reshape(1, 1, 1, 5, 8)
    write_dump(tmp_path / "dump.npz", KVDump(k, k[..., :0], LATENT, np.zeros((1, 5), np.int32)))
    again = read_dump(tmp_path / "dump.npz")
    assert np.array_equal(again.k, k)
    assert again.v.shape == (1, 1, 1, 5, 0)
    assert again.spec == LATENT


def test_pickled_objects_are_refused(tmp_path):
    np.savez(tmp_path / "evil.npz", k=np.array([{"a": 1}], dtype=object))
    with pytest.raises(FormatError, match="object"):
        read_npz(tmp_path / "evil.npz")


def test_compressed_archives_are_refused(tmp_path):
    np.savez_compressed(tmp_path / "small.npz", k=np.zeros(1000))
    with pytest.raises(FormatError, match="compressed"):
        read_npz(tmp_path / "small.npz")


@pytest.mark.parametrize(
    "shape", [(10**15,), (10**30,), (2**31, 2**31, 2**31), (0, 10**30), (-1,), (-1, -4), (5,), (3,), ()]
)
def test_a_header_that_claims_another_shape_is_refused_without_allocating(shape):
    data = npy(np.zeros(4, np.float32), shape=shape)
    with at_most(10**6), pytest.raises(FormatError):
        read_npy(io.BytesIO(data), len(data), "claim")


@pytest.mark.parametrize("shape", [(4,), (2, 2), (1, 4, 1)])
def test_an_honest_header_is_read(shape):
    array = np.arange(4, dtype=np.float32)
    data = npy(array, shape=shape)
    assert np.array_equal(read_npy(io.BytesIO(data), len(data), "honest"), array.reshape(shape))


def test_column_order_is_kept():
    data = npy(np.asfortranarray(np.arange(12.0).reshape(3, 4)))
    assert np.array_equal(read_npy(io.BytesIO(data), len(data), "order"), np.arange(12.0).reshape(3, 4))


@pytest.mark.parametrize(
    "text", ["(", "{'descr': '<f4', 'shape': (", "{}", "[" * 5000, "{1: 2", "'", "9" * 5000, "{'descr': []}", "\x00"]
)
def test_a_header_that_is_no_python_literal_is_refused(text):
    data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(16)
    with pytest.raises(FormatError):
        read_npy(io.BytesIO(data), len(data), "odd")


def test_missing_files_and_folders_are_input_errors(tmp_path):
    for path in (tmp_path / "absent.npz", tmp_path):
        with pytest.raises(InputError, match="cannot read"):
            read_dump(path)


@pytest.mark.parametrize("data", [b"", b"PK", b"hello", b"PK\x03\x04" + bytes(40)])
def test_files_that_are_no_archive_are_refused(tmp_path, data):
    (tmp_path / "odd.npz").write_bytes(data)
    with pytest.raises(FormatError):
        read_npz(tmp_path / "odd.npz")


def test_a_truncated_dump_is_refused(tmp_path):
    write_dump(tmp_path / "dump.npz", toy_dump())
    data = (tmp_path / "dump.npz").read_bytes()
    for keep in np.linspace(0, len(data) - 1, 60).astype(int):
        (tmp_path / "short.npz").write_bytes(data[:keep])
        with pytest.raises(FormatError):
            read_dump(tmp_path / "short.npz")


@pytest.mark.filterwarnings("ignore:Reading .*:UserWarning")
def test_bit_flips_are_refused_or_change_nothing(tmp_path):
    write_dump(tmp_path / "dump.npz", toy_dump(states=False))
    data = (tmp_path / "dump.npz").read_bytes()
    expected = read_npz(tmp_path / "dump.npz")
    random, refused = np.random.default_rng(1), 0
    for _ in range(1500):
        damaged = bytearray(data)
        damaged[random.integers(len(data))] ^= 1 << random.integers(8)
        (tmp_path / "flip.npz").write_bytes(damaged)
        try:
            found = read_npz(tmp_path / "flip.npz")
            read_dump(tmp_path / "flip.npz")
        except FormatError:
            refused += 1
        else:
            assert all(found[key].tobytes() == expected[key].tobytes() for key in expected)
    assert refused > 1000


def test_repeated_and_foreign_members_are_refused(tmp_path):
    good = npy(np.zeros(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns when the test repeats a name
        repeated = archive(tmp_path / "twice.npz", [("k.npy", good), ("k.npy", good)])
    for path in (repeated, archive(tmp_path / "foreign.npz", [("k.npy", good), ("readme.txt", b"hi")])):
        with pytest.raises(FormatError, match="unexpected or repeated"):
            read_npz(path)


def test_an_archive_that_claims_a_huge_member_is_refused_without_allocating(tmp_path):
    path = archive(tmp_path / "claim.npz", [("k.npy", npy(np.zeros(4, np.float32), shape=(2**29 - 20,)))])
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02")
    claimed = len(npy(np.zeros(0, np.float32), shape=(2**29 - 20,))) + 4 * (2**29 - 20)
    for field in (entry + 20, entry + 24):  # stored and plain size in the central directory
        data[field : field + 4] = claimed.to_bytes(4, "little")
    path.write_bytes(data)
    with at_most(10**6), pytest.raises(FormatError):
        read_npz(path)


def edited_dump(path, **changes):
    write_dump(path, toy_dump())
    arrays = {**read_npz(path), **changes}
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def test_a_dump_of_another_version_is_refused(tmp_path):
    meta = np.array(json.dumps({"version": 99}))
    with pytest.raises(VersionError, match="99"):
        read_dump(edited_dump(tmp_path / "d.npz", meta=meta))


@pytest.mark.parametrize(
    "changes",
    [
        {"k": None},
        {"meta": None},
        {"tokens": np.zeros((2, 5), np.int64)},
        {"k": toy_dump().k.astype(np.float64)},
        {"k": toy_dump().k.astype(np.float32)},
        {"v": toy_dump().v.astype(">f2")},
        {"layers": np.array([0, 1], np.int32)},
        {"meta": np.array("[1]")},
        {"meta": np.zeros(0)},
        {"meta": np.array(7)},
        {"meta": np.array([0x7FFFFFFF], np.uint32).view("<U1")[0:1].reshape(())},
        {"meta": np.array(json.dumps({"version": 1}))},
        {"meta": np.array(json.dumps({"version": 1, "spec": [SPEC.to_json()]}))},
    ],
)
def test_a_dump_with_a_wrong_member_is_refused(tmp_path, changes):
    with pytest.raises(FormatError):
        read_dump(edited_dump(tmp_path / "d.npz", **changes))


def test_a_dump_whose_shapes_disagree_is_refused(tmp_path):
    with pytest.raises(MismatchError, match="tokens"):
        read_dump(edited_dump(tmp_path / "d.npz", tokens=np.zeros((2, 4), np.int32)))


@pytest.mark.parametrize(
    "text", ["", "nul", "[]", "3", "{" * 10**5, "[" * 10**5, '{"a":' + "9" * 5000 + "}", b"\xff\xfe"]
)
def test_text_that_is_no_json_object_is_refused(text):
    with pytest.raises(FormatError, match="here"):
        parse_json(text, "here")


def unfinished_write(target, error):
    with atomic_write(target) as file:
        file.write(b"new, unfinished")
        raise error


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "file"
    target.write_bytes(b"old")
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error):
            unfinished_write(target, error)
        assert target.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["file"]


def test_a_finished_write_replaces_the_old_file(tmp_path):
    target = tmp_path / "file"
    target.write_bytes(b"old")
    with atomic_write(target) as file:
        file.write(b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"


def test_a_place_that_cannot_be_written_is_an_input_error(tmp_path):
    (tmp_path / "folder").mkdir()
    for target in (tmp_path / "absent" / "file", tmp_path / "folder"):
        with pytest.raises(InputError, match="cannot write"), atomic_write(target) as file:
            file.write(b"x")
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_killed_process_leaves_the_old_file(tmp_path, old):
    target = tmp_path / "file"
    if old is not None:
        target.write_bytes(old)
    child = subprocess.Popen([sys.executable, "-c", HALF_A_WRITE, target], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "half\n"
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert (target.read_bytes() if target.exists() else None) == old
    left = [name for name in os.listdir(tmp_path) if name != "file"]
    assert [bool(re.fullmatch(r"\.file\.[0-9a-f]{16}\.tmp", name)) for name in left] == [True]
    assert (tmp_path / left[0]).stat().st_size == 2**20
    with atomic_write(target) as file:
        file.write(b"new")
    assert (target.read_bytes(), os.listdir(tmp_path)) == (b"new", ["file"])


def test_litter_of_the_dead_is_swept_and_nothing_else(tmp_path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    ended, hour_ago = int(dead.stdout), time.time() - 4000
    swept = [".file.0123456789abcdef.tmp", f".file.{ended}.tmp"]
    kept = [".file.x.0123456789abcdef.tmp", ".file.notes.tmp", f".file.{os.getpid()}.tmp", ".file.7.7.tmp", "x.tmp"]
    for name in (*swept, *kept):
        (tmp_path / name).write_bytes(b"left")
        os.utime(tmp_path / name, (hour_ago, hour_ago))
    (tmp_path / ".file.00000000000000aa.tmp").symlink_to("x.tmp")
    (tmp_path / ".file.00000000000000bb.tmp").mkdir()
    with atomic_write(tmp_path / "file") as file:
        file.write(b"new")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "file", ".file.00000000000000aa.tmp"])
    assert (tmp_path / "x.tmp").read_bytes() == b"left"
    (tmp_path / f".file.{ended}.tmp").write_bytes(b"of another machine, now")
    with atomic_write(tmp_path / "file") as file:
        file.write(b"new")
    assert (tmp_path / f".file.{ended}.tmp").exists()


def test_a_file_that_is_being_written_is_no_litter(tmp_path):
    with atomic_write(tmp_path / "file") as first:
        first.write(b"first")
        with atomic_write(tmp_path / "file") as second:
            second.write(b"second")
        assert (tmp_path / "file").read_bytes() == b"second"
    assert ((tmp_path / "file").read_bytes(), os.listdir(tmp_path)) == (b"first", ["file"])


def test_a_name_that_someone_planted_is_neither_followed_nor_written(tmp_path, monkeypatch):
    names = iter(["planted", "free"])
    monkeypatch.setattr(atomic, "temporary_path", lambda target: target.with_name(next(names)))
    (tmp_path / "victim").write_bytes(b"mine")
    (tmp_path / "planted").symlink_to("victim")
    with pytest.raises(InputError, match="File exists"), atomic_write(tmp_path / "file") as file:
        file.write(b"new")
    assert sorted(os.listdir(tmp_path)) == ["planted", "victim"]
    assert (tmp_path / "victim").read_bytes() == b"mine"


def test_temporary_names_cannot_be_guessed():
    names = {disk.temporary_path(Path("/a/file")).name for _ in range(100)}
    assert len(names) == 100
    assert all(re.fullmatch(r"\.file\.[0-9a-f]{16}\.tmp", name) for name in names)


def test_a_new_file_has_the_permissions_of_any_and_another_one_the_old_ones(tmp_path):
    (tmp_path / "plain").touch()
    for mode in (None, 0o640, 0o600, 0o444):
        if mode is not None:
            (tmp_path / "file").chmod(mode)
        with atomic_write(tmp_path / "file") as file:
            file.write(b"new")
        assert (tmp_path / "file").stat().st_mode == (
            stat.S_IFREG | mode if mode else (tmp_path / "plain").stat().st_mode
        )


def test_a_link_stays_one(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real/file")
    with atomic_write(tmp_path / "link") as file:
        file.write(b"new")
    assert (os.readlink(tmp_path / "link"), (tmp_path / "real" / "file").read_bytes()) == ("real/file", b"new")
    assert (sorted(os.listdir(tmp_path)), os.listdir(tmp_path / "real")) == (["link", "real"], ["file"])


def test_file_and_folder_are_flushed_the_file_before_it_has_its_name(tmp_path, monkeypatch):
    flushed = []

    def sync(file):
        is_folder = stat.S_ISDIR(os.fstat(file).st_mode)
        flushed.append((is_folder, (tmp_path / "file").exists()))

    monkeypatch.setattr(disk.os, "fsync", sync)
    monkeypatch.delattr(disk.fcntl, "F_FULLFSYNC", raising=False)
    with atomic_write(tmp_path / "file") as file:
        file.write(b"new")
    assert flushed == [(False, False), (True, True)]


def test_a_mac_flushes_its_drive_too(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(disk.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(disk.fcntl, "fcntl", lambda file, command: called.append(command))
    with atomic_write(tmp_path / "file") as file:
        file.write(b"new")
    assert called == [51, 51]


def test_a_file_system_without_locks_is_written_and_read_but_not_appended_to(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(disk.fcntl, "flock", unsupported)
    for text in (b"one", b"two"):
        blob = io.BytesIO()
        container.write(blob, {}, [container.encode_section("a", text)])
        with atomic_write(tmp_path / "file") as file:
            file.write(blob.getvalue())
        with container.Reader(tmp_path / "file") as reader:
            assert reader.read("a") == text
    with pytest.raises(InputError, match=r"cannot append to .*: Operation not supported"):
        growing.replace_tail(tmp_path / "file", 12, b"")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("room", [0, 100, 5000])
def test_a_disk_that_is_full_leaves_the_old_file_and_one_error(tmp_path, room):
    (tmp_path / "file").write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(InputError, match=r"cannot write .*File too large"), atomic_write(tmp_path / "file") as file:
            file.write(bytes(2**16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ((tmp_path / "file").read_bytes(), os.listdir(tmp_path)) == (b"old", ["file"])


HALF_A_WRITE = """
import sys, time
from mlxkv.io.atomic import atomic_write
with atomic_write(sys.argv[1]) as file:
    file.write(bytes(2**20))
    file.flush()
    print("half", flush=True)
    time.sleep(600)
    file.write(bytes(2**20))
"""

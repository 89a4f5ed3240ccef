"""A file that a conversation is appended to is what compressing all of it makes, whatever is killed on the way."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from forging import forge, header_of
from synthetic import toy_artifacts, toy_dump

from mlxkv.codec import session, writing
from mlxkv.codec.session import CacheCodec
from mlxkv.dump import read_dump, write_dump
from mlxkv.errors import FormatError, InputError, MismatchError
from mlxkv.io import atomic
from mlxkv.io.container import Reader

BLOCK = 8


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    return toy_artifacts(tmp_path_factory.mktemp("append"))


@pytest.fixture
def codec(artifacts, monkeypatch):
    monkeypatch.setattr(writing, "BLOCK_ROWS", BLOCK)
    return CacheCodec(artifacts, recent=3, sinks=2)


def beginning(dump, length):
    return replace(dump, k=dump.k[..., :length, :], v=dump.v[..., :length, :], tokens=dump.tokens[:, :length])


@pytest.mark.parametrize("length", [1, 2, 4, 5, 6, 12, 13, 14, 29, 40])
def test_an_appended_file_is_the_one_that_compressing_makes(codec, tmp_path, length):
    dump, path = toy_dump(length=40, states=True), tmp_path / "a.mlxkv"
    path.write_bytes(codec.compress_dump(beginning(dump, length)))
    reported = []
    codec.append_dump(path, dump, reported.append)
    assert path.read_bytes() == codec.compress_dump(dump)
    assert sum(reported) == 35 - max(0, (length - 5) // BLOCK * BLOCK)
    assert [file.name for file in tmp_path.iterdir()] == ["a.mlxkv"]


def test_whole_blocks_are_not_written_again(codec, tmp_path, monkeypatch):
    dump, path, written = toy_dump(length=40), tmp_path / "a.mlxkv", []
    path.write_bytes(codec.compress_dump(beginning(dump, 30)))
    inode = path.stat().st_ino
    monkeypatch.setattr(session, "replace_tail", lambda *call: written.append(call[1:]) or atomic.replace_tail(*call))
    codec.append_dump(path, dump)
    keep, rest = written[0]
    with Reader(path) as reader:
        first = [*("k.sink", "v.sink"), *(f"{name}.{index}" for index in range(3) for name in "kv")]
        assert list(reader.sections)[:8] == first
        assert keep == 12 + sum(reader.sections[name].stored for name in first)
    assert path.stat().st_size == keep + len(rest)
    assert path.stat().st_ino == inode


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda codec, dump: (codec, replace(dump, tokens=dump.tokens + 1)), "other tokens"),
        (lambda codec, dump: (codec, beginning(dump, 20)), "other tokens"),
        (lambda codec, dump: (CacheCodec(codec.artifacts, recent=4, sinks=2), dump), "another layout"),
        (lambda codec, dump: (codec, replace(dump, k=dump.k.astype(np.float32), v=dump.v.astype(np.float32))), "dtype"),
        (lambda codec, dump: (codec, replace(dump, start=1)), "starts at token 1"),
    ],
)
def test_what_does_not_go_on_with_the_file_is_refused(codec, tmp_path, change, message):
    dump, path = toy_dump(length=40), tmp_path / "a.mlxkv"
    path.write_bytes(before := codec.compress_dump(beginning(dump, 30)))
    other, longer = change(codec, dump)
    with pytest.raises((MismatchError, InputError), match=message):
        other.append_dump(path, longer)
    assert path.read_bytes() == before


def test_a_file_in_another_order_is_refused(codec, tmp_path):
    dump, path = toy_dump(length=40), tmp_path / "a.mlxkv"
    header, body = header_of(codec.compress_dump(beginning(dump, 30)))
    first, second = header["sections"][:2]
    header["sections"][:2] = [second, first]
    path.write_bytes(
        forge(header, body[first[3] : first[3] + second[3]] + body[: first[3]] + body[first[3] + second[3] :])
    )
    with pytest.raises(FormatError, match="another order"):
        codec.append_dump(path, dump)


KILLED = """
import os, signal, sys
from mlxkv.io import atomic
step = int(sys.argv[2])
calls = 0
def count(of):
    def called(*arguments, **named):
        global calls
        calls += 1
        if calls == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return of(*arguments, **named)
    return called
for name in ("fsync", "replace", "fstat"):
    setattr(os, name, count(getattr(os, name)))
atomic.Path.unlink = count(atomic.Path.unlink)
atomic.replace_tail(sys.argv[1], 1000, bytes(range(256)) * 20)
print("done", calls)
"""


@pytest.mark.parametrize("step", range(1, 8))
def test_a_process_killed_at_any_step_leaves_the_old_file_or_the_new_one(tmp_path, step):
    path, old = tmp_path / "a", np.random.default_rng(0).bytes(3000)
    new = old[:1000] + bytes(range(256)) * 20
    path.write_bytes(old)
    run = subprocess.run([sys.executable, "-c", KILLED, path, str(step)], capture_output=True, text=True, check=False)
    assert run.returncode in (0, -signal.SIGKILL), run.stderr
    atomic.finish_interrupted_append(path)
    assert path.read_bytes() in ((old,) if step <= 2 else (new,))
    atomic.replace_tail(path, 1000, new[1000:])
    assert path.read_bytes() == new


@pytest.mark.parametrize("written", [0, 1, 500, 10**6])
def test_what_a_killed_process_left_half_written_is_finished_by_the_next_reader(codec, tmp_path, monkeypatch, written):
    dump, path = toy_dump(length=40), tmp_path / "a.mlxkv"
    path.write_bytes(codec.compress_dump(beginning(dump, 30)))
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "finish_interrupted_append", lambda path: None)
        codec.append_dump(path, dump)
    assert len(list(tmp_path.iterdir())) == 2
    with Reader(codec.compress_dump(dump)) as reader:
        keep = reader.end_of(list(reader.sections.values())[:8])
    path.write_bytes(codec.compress_dump(dump)[: keep + written] + os.urandom(50))
    assert np.array_equal(codec.decompress_dump(path).tokens, dump.tokens)
    assert path.read_bytes() == codec.compress_dump(dump)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_journal_of_another_file_is_refused_and_named(codec, tmp_path, monkeypatch):
    dump, path = toy_dump(length=40), tmp_path / "a.mlxkv"
    path.write_bytes(codec.compress_dump(beginning(dump, 30)))
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "finish_interrupted_append", lambda path: None)
        codec.append_dump(path, dump)
    path.write_bytes(CacheCodec(codec.artifacts, recent=3, sinks=1).compress_dump(dump))
    with pytest.raises(FormatError, match=r"\.a\.mlxkv\.rest does not fit"):
        codec.decompress_dump(path)
    (tmp_path / ".a.mlxkv.rest").write_bytes(b"")
    with pytest.raises(FormatError, match="damaged or of another file; remove it"):
        codec.decompress_dump(path)


def test_a_part_of_the_tokens_is_what_the_whole_holds_there(codec, tmp_path):
    dump = toy_dump(length=40, states=True)
    blob = codec.compress_dump(dump)
    whole = codec.decompress_dump(blob)
    for first, last in [(0, 40), (0, 1), (1, 3), (3, 9), (0, 10), (10, 26), (25, 40), (38, 40), (39, 40)]:
        part = codec.decompress_dump(blob, tokens=(first, last))
        assert part.start == first
        assert np.array_equal(part.tokens, dump.tokens[:, first:last])
        for name in "kv":
            assert np.array_equal(part.stream(name), whole.stream(name)[..., first:last, :])
        assert bool(part.states) == (last == 40)
        write_dump(tmp_path / "part.npz", part)
        assert read_dump(tmp_path / "part.npz").start == first
    for wrong in [(0, 0), (5, 4), (-1, 3), (0, 41)]:
        with pytest.raises(InputError, match="tokens 0 to 40"):
            codec.decompress_dump(blob, tokens=wrong)


def test_blocks_outside_the_part_are_not_read(codec):
    header, body = header_of(codec.compress_dump(toy_dump(length=40)))
    starts = np.cumsum([0, *(row[3] for row in header["sections"])])
    place = next(start for start, row in zip(starts, header["sections"]) if row[0] == "k.3")
    damaged = forge(header, body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :])
    assert codec.decompress_dump(damaged, tokens=(0, 20)).length == 20
    with pytest.raises(FormatError, match=r"k\.3"):
        codec.decompress_dump(damaged, tokens=(0, 30))

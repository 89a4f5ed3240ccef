"""A file that a conversation is appended to is what compressing all of it makes, whatever is killed on the way."""

import os
import resource
import struct
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from forging import forge, header_of
from killing import nothing_written
from synthetic import toy_artifacts, toy_dump

from mlxkv.codec import writing
from mlxkv.codec.session import CacheCodec
from mlxkv.dump import read_dump, write_dump
from mlxkv.errors import FormatError, InputError, MismatchError
from mlxkv.io import growing
from mlxkv.io.atomic import atomic_write
from mlxkv.io.container import Reader, digest
from mlxkv.io.growing import Append, finish_interrupted_append

BLOCK = 8


@contextmanager
def limited(size):
    """No file may be longer, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    return toy_artifacts(tmp_path_factory.mktemp("append"))


@pytest.fixture
def codec(artifacts, monkeypatch):
    monkeypatch.setattr(writing, "BLOCK_ROWS", BLOCK)
    return CacheCodec(artifacts, recent=3, sinks=2)


def beginning(dump, length):
    return replace(dump, k=dump.k[..., :length, :], v=dump.v[..., :length, :], tokens=dump.tokens[:, :length])


def part(dump, start):
    return replace(dump, k=dump.k[..., start:, :], v=dump.v[..., start:, :], tokens=dump.tokens[:, start:], start=start)


@pytest.mark.parametrize("length", [1, 2, 4, 5, 6, 12, 13, 14, 29, 40])
def test_an_appended_file_is_the_one_that_compressing_makes(codec, tmp_path, length):
    dump, path = toy_dump(length=40, states=True), tmp_path / "a.mlxkv"
    path.write_bytes(codec.compress_dump(beginning(dump, length)))
    reported = []
    codec.append_dump(path, dump, reported.append)
    assert path.read_bytes() == codec.compress_dump(dump)
    assert sum(reported) == 35 - max(0, (length - 5) // BLOCK * BLOCK)
    assert [file.name for file in tmp_path.iterdir()] == ["a.mlxkv"]


@pytest.mark.parametrize("length", [1, 5, 13, 14, 29, 40])
def test_the_last_part_of_a_longer_dump_is_enough_to_append_it(codec, tmp_path, length):
    dump, path = toy_dump(length=40, states=True), tmp_path / "a.mlxkv"
    path.write_bytes(codec.compress_dump(beginning(dump, length), notes={"said": "a"}))
    start = codec.append_start(path, dump.tokens[0])
    assert start == (2 + max(0, (length - 5) // BLOCK * BLOCK) if length > 1 else 0)
    codec.append_dump(path, part(dump, start), notes={"said": "b"})
    assert path.read_bytes() == codec.compress_dump(dump, notes={"said": "b"})


@pytest.mark.parametrize("common", [1, 2, 9, 10, 17, 20, 29])
@pytest.mark.parametrize("length", [5, 15, 25, 40])
def test_a_conversation_that_goes_back_keeps_what_both_begin_with(codec, tmp_path, common, length):
    old, other, path = toy_dump(length=30), toy_dump(length=40, seed=7), tmp_path / "a.mlxkv"
    k, v, tokens = (
        np.concatenate([first[..., :common, :], second[..., common:length, :]], axis=-2)
        for first, second in ((old.k, other.k), (old.v, other.v), (old.tokens[..., None], other.tokens[..., None]))
    )
    new = replace(other, k=k[..., :length, :], v=v[..., :length, :], tokens=tokens[:, :length, 0])
    path.write_bytes(before := codec.compress_dump(old, notes={}))
    with pytest.raises(MismatchError):
        codec.append_dump(path, new)
    assert path.read_bytes() == before
    start = codec.append_start(path, new.tokens[0])
    assert start <= common
    codec.append_dump(path, part(new, start), rewind=True)
    assert path.read_bytes() == codec.compress_dump(new, notes={})


def test_an_older_version_may_have_begun_the_file(codec, tmp_path):
    dump, path = toy_dump(length=40), tmp_path / "a.mlxkv"
    header, body = header_of(codec.compress_dump(beginning(dump, 30)))
    path.write_bytes(forge({**header, "mlxkv": "0.0.1"}, body))
    codec.append_dump(path, dump)
    assert path.read_bytes() == codec.compress_dump(dump)


def test_whole_blocks_are_not_written_again(codec, tmp_path, monkeypatch):
    dump, path, written = toy_dump(length=40), tmp_path / "a.mlxkv", []
    path.write_bytes(codec.compress_dump(beginning(dump, 30)))
    inode = path.stat().st_ino
    really = Append.replace_tail
    monkeypatch.setattr(Append, "replace_tail", lambda *call: written.append(call[1:]) or really(*call))
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
        (lambda codec, dump: (codec, beginning(dump, 20)), "30 tokens already, the dump only 20"),
        (lambda codec, dump: (CacheCodec(codec.artifacts, recent=4, sinks=2), dump), "another layout"),
        (lambda codec, dump: (codec, replace(dump, k=dump.k.astype(np.float32), v=dump.v.astype(np.float32))), "dtype"),
        (lambda codec, dump: (codec, replace(dump, start=1)), "other tokens"),
        (lambda codec, dump: (codec, part(dump, 27)), "starts at token 27, and .* goes on at token 26"),
        (lambda codec, dump: (codec, part(dump, 31)), "do not go on with it"),
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


@pytest.fixture
def interrupted(codec, tmp_path, monkeypatch):
    """A file of 30 tokens, and the journal of an append to 40 that died before it touched the file."""
    dump, path = toy_dump(length=40), tmp_path / "a.mlxkv"
    path.write_bytes(codec.compress_dump(beginning(dump, 30)))
    with monkeypatch.context() as patch:
        patch.setattr(growing, "_apply", lambda *_: False)
        codec.append_dump(path, dump)
    assert sorted(os.listdir(tmp_path)) == [".a.mlxkv.rest", "a.mlxkv"]
    return path, dump


def torn_states(codec, dump):
    """What a kill in the middle of the rewrite can leave: the kept bytes, then any mixture of the old end and the new."""
    old, new = codec.compress_dump(beginning(dump, 30)), codec.compress_dump(dump)
    with Reader(new) as reader:
        keep = reader.end_of(list(reader.sections.values())[:8])
    assert old[:keep] == new[:keep]
    yield old
    yield new
    yield old + new[len(old) :]
    for written in (1, 500, len(old) - keep - 1):
        yield new[: keep + written]
        yield new[: keep + written] + old[keep + written :]
        yield new[: keep + written] + os.urandom(50)
    yield old[:keep] + bytes(len(old) - keep - 64) + old[-64:]  # a power cut writes pages in any order
    yield old[:keep] + bytes(len(new) - keep - 64) + new[-64:]


def test_an_interrupted_append_is_read_through_its_journal_and_nothing_is_written(codec, interrupted):
    path, dump = interrupted
    journal = path.with_name(".a.mlxkv.rest")
    whole, new = journal.read_bytes(), codec.compress_dump(dump)
    for state in torn_states(codec, dump):
        path.write_bytes(state)
        with nothing_written():  # as on a read-only disk
            assert np.array_equal(codec.decompress_dump(path).tokens, dump.tokens)
            with Reader(path) as reader:
                reader.verify()
                assert reader.size == len(new)
        assert (path.read_bytes(), journal.read_bytes()) == (state, whole)
        codec.append_dump(path, dump)
        assert path.read_bytes() == new
        assert os.listdir(path.parent) == ["a.mlxkv"]
        journal.write_bytes(whole)


def test_an_incomplete_journal_is_as_none(codec, interrupted):
    path, _ = interrupted
    journal = path.with_name(".a.mlxkv.rest")
    whole, old = journal.read_bytes(), path.read_bytes()
    damaged = bytes([*whole[:-1], whole[-1] ^ 1])
    for left in (b"", whole[:1], whole[:72], whole[:-1], bytes(len(whole)), damaged, b"MLXKVjn3" + whole[8:]):
        journal.write_bytes(left)
        assert codec.decompress_dump(path).length == 30
        assert (path.read_bytes(), journal.read_bytes()) == (old, left)
        finish_interrupted_append(path)
        assert (path.read_bytes(), os.listdir(path.parent)) == (old, ["a.mlxkv"])


@pytest.mark.parametrize("length", [20, 30, 35, 60])
@pytest.mark.parametrize("sinks", [2, 1])
def test_a_file_written_anew_holds_nothing_of_an_append_that_died(codec, interrupted, length, sinks):
    path, _ = interrupted
    journal = path.with_name(".a.mlxkv.rest")
    left, other = journal.read_bytes(), toy_dump(length=60, seed=5)
    fresh = CacheCodec(codec.artifacts, recent=3, sinks=sinks)
    for dump in (beginning(other, length), beginning(toy_dump(length=60), length)):
        with atomic_write(path) as file:
            file.write(fresh.compress_dump(dump))
        assert os.listdir(path.parent) == ["a.mlxkv"]
        journal.write_bytes(left)
        if path.read_bytes() != codec.compress_dump(beginning(toy_dump(length=40), 30)):
            assert np.array_equal(fresh.decompress_dump(path).tokens, dump.tokens)
            fresh.append_dump(path, dump)
            assert np.array_equal(fresh.decompress_dump(path).tokens, dump.tokens)


OLD_HEAD = struct.Struct("<8sQ16s16s")


@pytest.mark.parametrize("replaced", [False, True])
def test_a_journal_of_an_older_version_is_finished_only_where_the_file_is_half_written(codec, interrupted, replaced):
    path, dump = interrupted
    journal, old, new = path.with_name(".a.mlxkv.rest"), path.read_bytes(), codec.compress_dump(dump)
    keep = int.from_bytes(journal.read_bytes()[8:16], "little")
    tail = new[keep:]
    left = OLD_HEAD.pack(b"MLXKVjnl", keep, digest(old[:keep]), digest(tail)) + tail
    if replaced:  # by a file that begins alike: all of it is intact, so the journal is of another one
        old = codec.compress_dump(beginning(dump, 32))
    for state, length in (
        (old, 32 if replaced else 30),
        (old[: keep + 9], 40),
        (new[: keep + 9] + old[keep + 9 :], 40),
    ):
        path.write_bytes(state)
        journal.write_bytes(left)
        assert codec.decompress_dump(path).length == length
        finish_interrupted_append(path)
        assert path.read_bytes() == (new if length == 40 else old)
        assert os.listdir(path.parent) == ["a.mlxkv"]


def test_an_append_to_a_file_that_was_replaced_meanwhile_is_refused(codec, tmp_path):
    dump, path = toy_dump(length=40), tmp_path / "a.mlxkv"
    path.write_bytes(codec.compress_dump(beginning(dump, 30)))
    other = codec.compress_dump(toy_dump(length=25, seed=3))

    def replace_file(_):
        with atomic_write(path) as file:
            file.write(other)

    with pytest.raises(MismatchError, match="another process has written"):
        codec.append_dump(path, dump, replace_file)
    assert (path.read_bytes(), os.listdir(tmp_path)) == (other, ["a.mlxkv"])


def test_an_append_goes_through_while_the_file_is_read_and_readers_keep_what_they_opened(codec, tmp_path, monkeypatch):
    monkeypatch.setattr(growing, "APPLY_WAIT", 0)
    monkeypatch.setattr(growing, "PENDING_WAIT", 0)
    dump, path = toy_dump(length=40), tmp_path / "a.mlxkv"
    path.write_bytes(old := codec.compress_dump(beginning(dump, 30)))
    with Reader(path) as before:
        codec.append_dump(path, beginning(dump, 35))
        assert path.read_bytes() == old
        with Reader(path) as after:
            assert after.header["layout"]["length"] == 35
            with pytest.raises(InputError, match="has been read by other processes"):
                codec.append_dump(path, dump)
            before.verify()
            after.verify()
        assert codec.decompress_dump(path).length == 35
    codec.append_dump(path, dump)
    assert (path.read_bytes(), os.listdir(tmp_path)) == (codec.compress_dump(dump), ["a.mlxkv"])


def test_a_second_append_waits_for_the_first_and_then_says_who_is_writing(codec, tmp_path, monkeypatch):
    monkeypatch.setattr(growing, "WRITER_WAIT", 0)
    dump, path = toy_dump(length=40), tmp_path / "a.mlxkv"
    path.write_bytes(codec.compress_dump(beginning(dump, 30)))
    refused = []

    def append_too(_):
        with pytest.raises(InputError, match="another process has been writing"):
            codec.append_dump(path, beginning(dump, 32))
        refused.append(True)

    codec.append_dump(path, dump, append_too)
    assert refused
    assert path.read_bytes() == codec.compress_dump(dump)


def test_a_disk_with_room_for_the_journal_only_keeps_the_append_there(codec, tmp_path):
    dump, path = toy_dump(length=40), tmp_path / "a.mlxkv"
    path.write_bytes(old := codec.compress_dump(beginning(dump, 30)))
    new = codec.compress_dump(dump)
    with limited(len(new) - 1):
        with pytest.raises(InputError, match=r"cannot write .*; what was appended is kept in .*\.a\.mlxkv\.rest"):
            codec.append_dump(path, dump)
        assert path.read_bytes() == old
        assert codec.decompress_dump(path).length == 40
        with pytest.raises(InputError, match="cannot write"):
            codec.append_dump(path, dump)
        assert codec.decompress_dump(path).length == 40
    codec.append_dump(path, dump)
    assert (path.read_bytes(), os.listdir(tmp_path)) == (new, ["a.mlxkv"])


@pytest.mark.parametrize("room", [0, 10, 500])
def test_a_disk_without_room_for_the_journal_leaves_the_old_file(codec, tmp_path, room):
    dump, path = toy_dump(length=40), tmp_path / "a.mlxkv"
    path.write_bytes(old := codec.compress_dump(beginning(dump, 30)))
    with limited(room), pytest.raises(InputError, match=r"cannot write .*\.a\.mlxkv\.rest"):
        codec.append_dump(path, dump)
    assert (path.read_bytes(), os.listdir(tmp_path)) == (old, ["a.mlxkv"])


def test_who_may_read_the_file_may_read_its_journal_and_no_one_else(interrupted, codec, monkeypatch):
    path, dump = interrupted
    codec.append_dump(path, dump)
    monkeypatch.setattr(growing, "_apply", lambda *_: False)
    for mode in (0o600, 0o644, 0o664):
        path.chmod(mode)
        codec.append_dump(path, dump)
        journal = path.with_name(".a.mlxkv.rest")
        assert journal.stat().st_mode & 0o777 == mode
        journal.unlink()


def test_what_does_not_exist_gets_no_journal(codec, tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        codec.append_dump(tmp_path / "absent", toy_dump(length=40))
    assert os.listdir(tmp_path) == []


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

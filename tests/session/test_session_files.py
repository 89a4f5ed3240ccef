"""Files of conversations: a turn is appended, no one else writes them, and what they hold is checked."""

import os
import subprocess
import sys

import mlx.core as mx
import pytest
from forging import forge, header_of
from talking import dictated, tiny_talker

import mlxkv
from mlxkv import lm, stock
from mlxkv.codec import library, writing
from mlxkv.codec.calibrate import uncalibrated
from mlxkv.dump import write_dump
from mlxkv.errors import FormatError, InputError, MismatchError
from mlxkv.identity import fingerprint
from mlxkv.io.container import Reader
from mlxkv.models import cache_spec
from mlxkv.session import Session


def exact(model):
    return uncalibrated(cache_spec(model), fingerprint=fingerprint(model), method="exact")


@pytest.fixture
def long(tmp_path, monkeypatch):
    """A conversation of many blocks, saved."""
    monkeypatch.setattr(writing, "BLOCK_ROWS", BLOCK)
    model, spoken = tiny_talker()
    session = Session(model, spoken, tmp_path / "a.mlxkv")
    session.send("Once upon a time. " * 10, sampler=dictated(spoken, "Yes."))
    session.save()
    return session, spoken


BLOCK = 16


def first_blocks(path, tokens):
    """Sections of the complete blocks of a conversation of so many tokens, in the order of the file, and where they end."""
    blocks = (tokens - 4 - 128) // BLOCK
    with Reader(path) as reader:
        names = ["k.sink", "v.sink", *(f"{name}.{block}" for block in range(blocks) for name in "kv")]
        found = [reader.sections[name] for name in names]
        return found, reader.end_of(found)


def test_a_turn_does_not_write_the_conversation_again(long, monkeypatch):
    session, spoken = long
    inode, length = session.path.stat().st_ino, len(session.tokens)
    old, end = first_blocks(session.path, length)
    assert len(old) > 6
    copied = []
    really = lm.extract_cache
    monkeypatch.setattr(lm, "extract_cache", lambda *a, **more: copied.append(more["start"]) or really(*a, **more))
    session.send("And then?", sampler=dictated(spoken, "Then the wolf came."))
    assert session.save() == session.path.stat().st_size - end
    assert copied == [4 + BLOCK * ((length - 132) // BLOCK)]
    assert session.path.stat().st_ino == inode
    assert first_blocks(session.path, length) == (old, end)


def test_what_was_taken_back_is_not_in_the_file_and_what_stays_is_not_written_again(long):
    session, spoken = long
    tokens, path = session.tokens, session.path
    old = first_blocks(path, len(tokens))
    session.send("And then?", sampler=dictated(spoken, "Then " * 20 + "the wolf came."))
    session.save()
    assert len(first_blocks(path, len(session.tokens))[0]) > len(old[0])
    assert session.undo() == "And then?"
    assert session.save() == path.stat().st_size - old[1]
    assert first_blocks(path, len(tokens)) == old
    model = session._model.model
    session.close()
    again = Session(model, spoken, path)
    assert (again.turns, again.tokens) == (1, [*tokens, *spoken.encode("\n")])  # which the template has after an answer


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_goes_on_in_the_file_it_was_begun_in(tmp_path, dtype):
    model, spoken = tiny_talker()
    model.set_dtype(dtype)
    inodes = set()
    for turns in range(3):
        with Session(
            model, spoken, path := tmp_path / "a.mlxkv", **({} if turns else {"artifacts": exact(model)})
        ) as session:
            assert session._cached.tokens == [] or stock.entries(session._cached.cache)[0].keys.dtype == dtype
            session.send("Hello", max_tokens=5)
            session.save()
        inodes.add(path.stat().st_ino)
    assert len(inodes) == 1


def test_a_conversation_belongs_to_one_process_at_a_time(tmp_path):
    model, spoken = tiny_talker()
    path = tmp_path / "a.mlxkv"
    code = (
        "import sys, time; from pathlib import Path; from mlxkv.io.ownership import Ownership;"
        "own = Ownership(sys.argv[1]); print('mine', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"mine\n"
        with pytest.raises(InputError, match="another process works on"):
            Session(model, spoken, path)
        other.kill()
    assert os.listdir(tmp_path) == [".a.mlxkv.lock"]
    with Session(model, spoken, path) as session:
        with pytest.raises(InputError, match="another process works on"):
            Session(model, spoken, path)
        session.send("Hello", max_tokens=2)
        session.save()
    assert os.listdir(tmp_path) == ["a.mlxkv"]
    forgotten = Session(model, spoken, path)
    del forgotten
    assert os.listdir(tmp_path) == ["a.mlxkv"]


def test_what_others_wrote_to_the_file_is_not_lost(long):
    session, spoken = long
    path, model = session.path, session._model.model
    other = Session(model, spoken)
    other.send("Hello", max_tokens=2)
    data = mlxkv.compress(model, other._cached.cache, other.tokens)
    path.write_bytes(data)
    session.send("And then?", max_tokens=2)
    with pytest.raises(MismatchError, match="something else has written it"):
        session.save()
    assert path.read_bytes() == data
    session.save(path.with_name("b.mlxkv"))
    assert session.path.name == "b.mlxkv"


@pytest.fixture
def saved(tmp_path):
    model, spoken = tiny_talker()
    with Session(model, spoken, tmp_path / "a.mlxkv", system="Be brief.") as session:
        session.send("Hello", max_tokens=2)
        session.save()
    return model, spoken, tmp_path / "a.mlxkv"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"system": "Be long."}, "begun with the system prompt 'Be brief.'"),
        ({"cache": "int8"}, "not begun in int8: it is a compressed cache"),
    ],
)
def test_a_conversation_goes_on_only_as_it_was_begun(saved, change, message):
    model, spoken, path = saved
    with pytest.raises(MismatchError, match=message):
        Session(model, spoken, path, **change)
    Session(model, spoken, path, system="Be brief.").close()  # and is free again


def test_a_conversation_without_a_system_prompt_says_so_where_one_is_asked_for(tmp_path):
    model, spoken = tiny_talker()
    with Session(model, spoken, tmp_path / "a.mlxkv") as session:
        session.send("Hello", max_tokens=2)
        session.save()
    with pytest.raises(MismatchError, match="was begun without a system prompt, not with 'Be brief"):
        Session(model, spoken, tmp_path / "a.mlxkv", system="Be brief.")


def test_a_live_conversation_goes_on_in_its_own_method_alone(tmp_path):
    model, spoken = tiny_talker()
    with Session(model, spoken, tmp_path / "a", cache="int8") as session:
        session.send("Hello", max_tokens=2)
        session.save()
    with pytest.raises(MismatchError, match="not begun in int4: it is a live cache of another kind"):
        Session(model, spoken, tmp_path / "a", cache="int4")
    assert mlxkv.load_cache(tmp_path / "a", model)[0].offset == len(session.tokens)


@pytest.mark.parametrize("coding", [None, "int8"])
def test_a_conversation_of_another_model_is_refused(tmp_path, coding):
    model, spoken = tiny_talker()
    with Session(model, spoken, tmp_path / "a", cache=coding) as session:
        session.send("Hello", max_tokens=2)
        session.save()
    with pytest.raises(MismatchError, match=r"another model|of fingerprint"):
        Session(tiny_talker(seed=1)[0], spoken, tmp_path / "a")


def test_a_file_goes_on_with_what_it_was_begun_with_and_a_new_one_with_the_newest_calibration(saved, tmp_path):
    model, spoken, path = saved
    write_dump(tmp_path / "a.npz", lm.dump(model, [i % 96 for i in range(400)]))
    learnt = mlxkv.calibrate([tmp_path / "a.npz"], mlxkv.KVTCConfig(4))
    library.add(learnt)
    for name, method in (("a", "direct"), ("b", "kvtc"), ("b", "kvtc")):
        with Session(model, spoken, path.with_name(f"{name}.mlxkv")) as session:
            session.send("So?", max_tokens=3)
            session.save()
        with Reader(path.with_name(f"{name}.mlxkv")) as reader:
            assert reader.header["method"] == method
    library.remove(learnt.fingerprint)
    with pytest.raises(MismatchError, match="was made with artifacts"):
        Session(model, spoken, path.with_name("b.mlxkv"))
    assert Session(model, spoken, path.with_name("b.mlxkv"), artifacts=learnt).turns == 2


def test_a_quality_is_that_of_the_file_for_as_long_as_it_grows(tmp_path):
    model, spoken = tiny_talker()
    sizes = {}
    for quality in (20, 70):
        for _ in range(2):
            with Session(model, spoken, path := tmp_path / f"{quality}.mlxkv", quality=quality) as session:
                session.send("Once upon a time. " * 8, sampler=dictated(spoken, "Yes."))
                session.save()
        with Reader(path) as reader:
            assert reader.header["quality"] == quality
        sizes[quality] = path.stat().st_size
    assert sizes[20] < sizes[70]


GOOD = {"messages": [{"role": "user", "content": "a"}], "began": "2026-01-02T03:04:05", "template": "plain"}


@pytest.mark.parametrize(
    ("notes", "error"),
    [
        (None, InputError),
        (["a"], FormatError),
        ({**GOOD, "messages": "all"}, FormatError),
        ({**GOOD, "messages": [{"role": "root", "content": "a"}]}, FormatError),
        ({**GOOD, "messages": [{"role": "user", "content": 3}]}, FormatError),
        ({**GOOD, "messages": [{"role": "user", "content": "a", "tools": []}]}, FormatError),
        ({**GOOD, "began": "yesterday"}, FormatError),
        ({**GOOD, "began": None}, FormatError),
        (GOOD, None),
    ],
)
def test_a_file_says_what_was_said_or_is_refused(saved, notes, error):
    model, spoken, path = saved
    header, body = header_of(path.read_bytes())
    header["meta"]["notes"] = notes
    if notes is None:
        del header["meta"]["notes"]
    path.write_bytes(forge(header, body))
    if error is None:
        assert Session(model, spoken, path).messages == GOOD["messages"]
        return
    with pytest.raises(error):
        Session(model, spoken, path)


@pytest.mark.parametrize("tokens", [None, "abc", [1, 2], [1] * 10_000, [-1] * 51, [True] * 51])
def test_a_live_file_has_the_tokens_of_its_cache_or_is_refused(tmp_path, tokens):
    model, spoken = tiny_talker()
    with Session(model, spoken, path := tmp_path / "a", cache="int8") as session:
        session.send("Hello", max_tokens=2)
        session.save()
    header, body = header_of(path.read_bytes())
    header["notes"]["tokens"] = tokens
    path.write_bytes(forge(header, body))
    with pytest.raises(FormatError, match="does not hold the"):
        Session(model, spoken, path)


def test_sizes_are_those_of_the_file_and_of_the_cache(saved):
    model, spoken, path = saved
    session = Session(model, spoken, path)
    stats = session.stats()
    layers = 2 * 2 * 2 * 8  # layers, keys and values, heads, dims
    assert stats["full_bytes"] == 2 * layers * len(session.tokens)
    assert stats["file_bytes"] == path.stat().st_size
    assert stats["cache_bytes"] >= 2 * stats["full_bytes"]  # float32
    assert (stats["turns"], stats["tokens"]) == (1, len(session.tokens))


def test_a_save_needs_a_name_that_is_free(saved, tmp_path):
    model, spoken, path = saved
    session = Session(model, spoken)
    with pytest.raises(InputError, match="no file: give save a name"):
        session.save()
    assert session.save(tmp_path / "empty.mlxkv") == 0
    session.send("Hello", max_tokens=2)
    with pytest.raises(InputError, match="exists"):
        session.save(path)
    assert session.save() > 0


def test_a_cache_of_ones_own_loop_comes_back_from_bytes_or_a_file(tmp_path):
    model, spoken = tiny_talker()
    session = Session(model, spoken)
    session.send("Hello", max_tokens=5)
    for artifacts in (None, exact(model)):
        data = mlxkv.compress(model, session._cached.cache, session.tokens, artifacts=artifacts, name="tiny")
        (tmp_path / "a.mlxkv").write_bytes(data)
        for source in (data, tmp_path / "a.mlxkv", str(tmp_path / "a.mlxkv")):
            cache = mlxkv.decompress(model, source)
            assert cache[0].offset == len(session.tokens)
            pairs = zip(stock.state_parts(cache[0]).values(), stock.state_parts(session._cached.cache[0]).values())
            assert all(mx.array_equal(mx.array(a), mx.array(b)) for a, b in pairs) == (artifacts is not None)
    with pytest.raises(MismatchError):
        mlxkv.decompress(tiny_talker(seed=1)[0], data)
    with pytest.raises(MismatchError, match="tokens, but"):
        mlxkv.compress(model, session._cached.cache, session.tokens[1:])

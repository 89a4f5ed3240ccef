"""Whatever goes wrong in a conversation, it stays what was said, and can be saved."""

import pytest
from talking import dictated, tiny_talker
from test_session import SAID, exact, interrupt_layer, interrupted, read_at_once

from mlxkv.errors import InputError
from mlxkv.session import Session, files


def goes_on_as_read_at_once(session, model, spoken):
    messages = [*session.messages, {"role": "user", "content": "So?"}]
    prompt, expected = read_at_once(model, spoken, messages, 6)
    return session.send("So?", max_tokens=6) == expected and session.tokens[: len(prompt)] == prompt


def test_a_first_answer_that_fails_between_layers_leaves_no_layer_that_has_read_nothing(monkeypatch):
    model, spoken = tiny_talker()
    session = Session(model, spoken)
    interrupt_layer(monkeypatch, model, after=0, everywhere=True)
    with pytest.raises(KeyboardInterrupt):
        session.send("Hello")
    monkeypatch.undo()
    assert goes_on_as_read_at_once(session, model, spoken)


@pytest.mark.parametrize("what", ["the answer", "taken back", "all taken back"])
def test_a_conversation_whose_cache_was_lost_is_saved_nevertheless(what, tmp_path):
    model, spoken = tiny_talker("lfm2")
    path = tmp_path / "a.mlxkv"
    with Session(model, spoken, path, artifacts=exact(model)) as session:
        session.send("Hello", sampler=dictated(spoken, "Hi."))
        session.save()
        with pytest.raises(KeyboardInterrupt):
            session.send("Tell me all.", sampler=interrupted(spoken, "It was"))
        assert not session.tokens
        for _ in range({"the answer": 0, "taken back": 1, "all taken back": 2}[what]):
            session.undo()
        assert session.save() > 0
        messages = session.messages
    with Session(model, spoken, path) as again:
        assert again.messages == messages
        assert goes_on_as_read_at_once(again, model, spoken)


@pytest.mark.parametrize("then", ["send", "undo", "save"])
def test_an_answer_that_is_left_ends_before_anything_else_uses_the_cache(then, tmp_path):
    model, spoken = tiny_talker()
    session = Session(model, spoken, tmp_path / "a.mlxkv")
    left = session.stream("Tell me all.", sampler=dictated(spoken, "It was a dark night."))
    told = "".join(next(left) for _ in range(6))
    if then == "send":
        session.send("And?", sampler=dictated(spoken, "No."))
    else:
        getattr(session, then)()
    assert list(left) == []
    assert [message["content"] for message in session.messages][:2] == (
        [] if then == "undo" else ["Tell me all.", told]
    )
    assert goes_on_as_read_at_once(session, model, spoken)


@pytest.mark.parametrize("said", [5, None, b"Hello", ["Hello"], "\ud83d"])
@pytest.mark.parametrize("template", ["chatml", "none"])
def test_what_is_no_text_is_refused_before_a_file_could_hold_it(said, template):
    model, spoken = tiny_talker(template=template)
    session = Session(model, spoken)
    with pytest.raises(InputError, match="must be text"):
        session.send(said, max_tokens=1)
    if said is not None:
        with pytest.raises(InputError, match="must be text"):
            Session(model, spoken, system=said)
    assert session.messages == []


@pytest.mark.parametrize("count", [0, -2, 1.5, True, None, "3"])
def test_an_answer_has_a_number_of_tokens(count):
    session = Session(*tiny_talker())
    with pytest.raises(InputError, match="max_tokens must be 1 or more"):
        session.send("Hello", max_tokens=count)


def test_a_live_conversation_that_was_resumed_is_saved_under_another_name(tmp_path):
    model, spoken = tiny_talker()
    with Session(model, spoken, tmp_path / "a.mlxkv", cache="int8") as session:
        session.send("Hello", max_tokens=2)
        session.save()
    with Session(model, spoken, tmp_path / "a.mlxkv") as session:
        session.save(tmp_path / "b.mlxkv")
        tokens = session.tokens
    with Session(model, spoken, tmp_path / "b.mlxkv", cache="int8") as again:
        assert again.tokens == tokens


def test_a_save_that_fails_under_another_name_leaves_the_old_one(tmp_path, monkeypatch):
    model, spoken = tiny_talker()
    session = Session(model, spoken, tmp_path / "a.mlxkv")
    session.send("Hello", max_tokens=2)
    session.save()

    def full(path):
        raise InputError(f"cannot write {path}: no space left")

    monkeypatch.setattr(files, "atomic_write", full)
    with pytest.raises(InputError, match="no space"):
        session.save(tmp_path / "b.mlxkv")
    monkeypatch.undo()
    session.send("And?", max_tokens=2)
    assert (session.path, session.save() > 0) == (tmp_path / "a.mlxkv", True)
    with pytest.raises(InputError, match="another process works on"):
        Session(model, spoken, tmp_path / "a.mlxkv")
    Session(model, spoken, tmp_path / "b.mlxkv").close()


def test_a_save_that_is_interrupted_after_the_write_can_be_repeated(tmp_path, monkeypatch):
    model, spoken = tiny_talker()
    session = Session(model, spoken, tmp_path / "a.mlxkv")
    for said in SAID[:2]:
        session.send(said, max_tokens=2)
        codec, name = session._file._codec, "append_dump" if session.path.exists() else "compress_dump"
        really = getattr(codec, name)

        def late(*given, really=really, **named):
            really(*given, **named)
            raise KeyboardInterrupt

        monkeypatch.setattr(codec, name, late)
        with pytest.raises(KeyboardInterrupt):
            session.save()
        monkeypatch.undo()
        session.send("Well?", max_tokens=2)
        assert session.save() > 0


def test_a_file_that_could_not_be_opened_can_be_tried_again(tmp_path):
    model, spoken = tiny_talker()
    (path := tmp_path / "a.mlxkv").write_bytes(b"nonsense" * 20)
    kept = []
    for _ in range(2):
        with pytest.raises(Exception, match="is not an mlxkv container") as found:
            Session(model, spoken, path)
        kept.append(found.value)  # and with it all that its frames refer to


@pytest.mark.parametrize("name", ["n" * 300, "n" * 252, "a\0b", "circle"])
def test_names_that_no_file_can_have_are_refused(name, tmp_path):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    session = Session(*tiny_talker())
    with pytest.raises(InputError, match=r"cannot (write|work on)"):
        session.save(tmp_path / name)


def test_a_cache_of_chunks_does_not_go_back_to_tokens_that_it_has_dropped():
    import mlx.core as mx
    from mlx_lm.models.cache import ChunkedKVCache

    from mlxkv.session.cached import CachedTokens

    entry = ChunkedKVCache(8)
    for _ in range(12):
        entry.maybe_trim_front()
        entry.update_and_fetch(mx.zeros((1, 1, 1, 4)), mx.zeros((1, 1, 1, 4)))
    cached = CachedTokens(lambda: [ChunkedKVCache(8)], [entry], range(12))
    assert cached.go_to([*range(9), 50]) == 12
    assert cached.cache[0].offset == 0

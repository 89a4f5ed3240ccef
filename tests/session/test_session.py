"""A conversation is what its template makes of its messages, in one process or in several, whatever stops an answer."""

import os
import subprocess
import sys
from datetime import datetime

import mlx.core as mx
import pytest
from forging import forge, header_of
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from talking import KINDS, TEMPLATES, dictated, tiny_talker

import mlxkv
from mlxkv import lm, stock
from mlxkv.codec import library, writing
from mlxkv.codec.calibrate import uncalibrated
from mlxkv.dump import write_dump
from mlxkv.errors import FormatError, InputError, MismatchError
from mlxkv.identity import fingerprint
from mlxkv.io.container import Reader
from mlxkv.live.base import LayerCache
from mlxkv.models import cache_spec
from mlxkv.session import Session
from mlxkv.session.cached import CachedTokens
from mlxkv.session.templates import Template

SAID = ("Hello there", "And? ", "So")
ANSWERS = ("A fine day.", " <think>hm</think> Is it? ", "\n Yes.")


def read_at_once(model, spoken, messages, count, began=None):
    """What a model answers that reads all messages for the first time."""
    prompt = Template(spoken, began or datetime.now()).render(messages)
    cache = make_prompt_cache(model)
    logits = lm.prefill(model, prompt, cache)
    words = lm.continue_greedily(model, cache, logits, spoken.eos_token_ids)
    return prompt, spoken.decode([token for _, token in zip(range(count), words)])


def exact(model):
    return uncalibrated(cache_spec(model), fingerprint=fingerprint(model), method="exact")


EVERY_KIND = [*(("llama", template) for template in TEMPLATES), *((kind, "trims answers") for kind in KINDS[1:])]


@pytest.mark.parametrize(("kind", "template"), EVERY_KIND)
def test_a_model_reads_what_its_template_makes_of_all_messages(kind, template):
    model, spoken = tiny_talker(kind, template)
    session = Session(model, spoken, system="Be brief.")
    for said, answer in zip(SAID, ANSWERS):
        session.send(said, sampler=dictated(spoken, answer))
        messages = [*session.messages, {"role": "user", "content": "Now you"}]
        prompt, expected = read_at_once(model, spoken, messages, 6, session._began)
        assert session.send("Now you", max_tokens=6) == expected
        assert session.tokens[: len(prompt)] == prompt
        assert session.messages[-1] == {"role": "assistant", "content": expected}
        assert session.undo() == "Now you"
    assert session.turns == 3


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_template_leaves_of_the_last_answer_is_all_that_is_read_again(kind):
    model, spoken = tiny_talker(kind, "drops thinking")
    session = Session(model, spoken)
    session.send("Hello" * 12, sampler=dictated(spoken, "Yes."))
    session.send("What is that?", sampler=dictated(spoken, thought := "<think>It is.</think>It is."))
    answer = spoken.encode(thought, add_special_tokens=False)
    session.send("So?", max_tokens=2)
    assert len(answer) < session.lost <= len(answer) + 2
    session.send("And?", max_tokens=2)
    assert session.lost == 0


CODINGS = [*(("exact", kind) for kind in KINDS), ("direct", "llama"), ("int8", "llama"), ("h2o-96", "lfm2")]


@pytest.mark.parametrize(("coding", "kind"), CODINGS)
def test_a_conversation_goes_on_in_another_process_as_in_one(tmp_path, coding, kind):
    model, spoken = tiny_talker(kind)
    live = {"cache": coding} if coding not in ("exact", "direct") else {}
    begin = {"artifacts": exact(model)} if coding == "exact" else live
    one = Session(model, spoken, system="Be brief.", **begin)
    several = Session(model, spoken, path := tmp_path / "a.mlxkv", system="Be brief.", **begin)
    for number, said in enumerate(SAID):
        assert several.resumed == bool(number)
        expected = one.send(said, max_tokens=9)
        say = {"sampler": dictated(spoken, expected)} if coding == "direct" else {}
        assert several.send(said, max_tokens=9, **say) == expected
        before = arrays(several)
        assert several.save() > 0
        assert all(
            mx.array_equal(a, b) for a, b in zip(before, arrays(several), strict=True)
        )  # the file's loss is not in it
        assert several.save() == 0
        several.close()
        several = Session(model, spoken, path, **(live if number == 1 else {}))
        assert (several.tokens, several.messages) == (one.tokens, one.messages)
        same = all(mx.array_equal(a, b) for a, b in zip(arrays(one), arrays(several)))
        assert same == (coding != "direct")
    several.close()
    assert os.listdir(tmp_path) == ["a.mlxkv"]


def arrays(session):
    """What a session's cache holds, without what is only allocated."""
    entries = stock.entries(session._cached.cache)
    states = [
        entry.state if isinstance(entry, LayerCache) else [*stock.state_parts(entry).values()] for entry in entries
    ]
    return [array for _, array in tree_flatten(states) if isinstance(array, mx.array)]


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


@pytest.mark.parametrize("kind", ["llama", "lfm2"])
def test_everything_can_be_taken_back(tmp_path, kind):
    model, spoken = tiny_talker(kind)
    session = Session(model, spoken, tmp_path / "a.mlxkv")
    expected = session.send("Hello", max_tokens=9)
    session.save()
    session.undo()
    assert (session.messages, session.turns, len(session.tokens)) == ([], 0, 1)
    with pytest.raises(InputError, match="nothing has been said"):
        session.undo()
    session.save()
    session.close()
    again = Session(model, spoken, tmp_path / "a.mlxkv")
    assert (again.turns, len(again.tokens)) == (0, 1)
    assert again.send("Hello", max_tokens=9) == expected


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


def test_a_point_to_go_back_to_is_forgotten_with_its_text():
    model, _ = tiny_talker("gemma3_text")
    cached = CachedTokens(lambda: make_prompt_cache(model))

    def read(text):
        lm.prefill(model, text[len(cached.tokens) :], cached.cache)
        cached.tokens = text

    read(first := list(range(8)))
    cached.remember(8)
    assert cached.go_to(first[:4], unread=0) == 4  # while all windows have room
    read(other := [0, 1, 2, 3, *range(50, 90)])
    assert cached.go_to(other[:20], unread=0) == len(other)
    assert cached.tokens == []


@pytest.mark.parametrize("kind", ["llama", "lfm2", "gemma3_text"])
@pytest.mark.parametrize("way", ["closed", "after the model", "between layers", "while reading"])
def test_an_answer_that_is_stopped_stays_as_far_as_it_came_and_the_next_is_right(kind, way, monkeypatch):
    model, spoken = tiny_talker(kind)
    session = Session(model, spoken)
    session.send("Hello", sampler=dictated(spoken, "Hi."))
    before = session.messages
    if way == "closed":
        pieces = session.stream("Tell me all.", sampler=dictated(spoken, "It was a dark and stormy night."))
        told = "".join(next(pieces) for _ in range(6))
        pieces.close()
    else:
        told = "" if way == "while reading" else "It was"
        sampler = dictated(spoken, told + "!!!") if way == "between layers" else interrupted(spoken, told)
        if way == "between layers":
            interrupt_layer(monkeypatch, model, after=len(told) + 1)
        with pytest.raises(KeyboardInterrupt):
            session.send("Tell me all.", sampler=sampler)
        monkeypatch.undo()
        # A convolution may have read one token more than the layers that count.
        assert bool(session.tokens) == (kind != "lfm2" and way != "between layers")
    expected = [*before, {"role": "user", "content": "Tell me all."}, {"role": "assistant", "content": told}]
    assert session.messages == (expected if told else before)
    prompt, answer = read_at_once(model, spoken, [*session.messages, {"role": "user", "content": "So?"}], 6)
    assert session.send("So?", max_tokens=6) == answer
    assert session.tokens[: len(prompt)] == prompt


def interrupt_layer(monkeypatch, model, after):
    """Someone presses Ctrl-C in a layer in the middle, in a call of one token."""
    kind, middle, left = type(model.layers[1]), model.layers[1], [after]
    really = kind.__call__

    def call(self, x, *more, **named):
        if self is middle and x.shape[1] == 1:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        return really(self, x, *more, **named)

    monkeypatch.setattr(kind, "__call__", call)


def interrupted(spoken, text):
    """A sampler that says a text, until someone presses Ctrl-C in the middle of a call of the model."""
    say, left = dictated(spoken, text), [len(text) + 1]

    def sampler(logprobs):
        left[0] -= 1
        if left[0] < 0 or not text:
            raise KeyboardInterrupt
        return say(logprobs)

    return sampler


def test_the_same_can_be_said_again_when_all_of_it_has_been_read():
    model, spoken = tiny_talker()
    session = Session(model, spoken)

    def stop(done, total):
        if done == total:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        "".join(session.stream("Hello", progress=stop))
    assert session.messages == []
    assert session.send("Hello", max_tokens=5) == Session(model, spoken).send("Hello", max_tokens=5)


def test_reading_can_be_stopped_between_chunks(tmp_path):
    model, spoken = tiny_talker()
    session = Session(model, spoken)

    def stop(done, total):
        if done:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        "".join(session.stream("Hello " * 400, progress=stop))
    assert (session.messages, len(session.tokens)) == ([], 2048)
    prompt, answer = read_at_once(model, spoken, [{"role": "user", "content": "Hello " * 300}], 5)
    assert session.send("Hello " * 300, max_tokens=5) == answer
    assert session.tokens[: len(prompt)] == prompt


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


def test_a_template_that_tells_the_day_tells_the_one_on_which_the_conversation_began(tmp_path, monkeypatch):
    model, spoken = tiny_talker(template="dates")
    path = tmp_path / "a.mlxkv"
    with Session(model, spoken, path, artifacts=exact(model)) as session:
        session._began = datetime(2026, 1, 2, 3, 4, 5)
        session._template = Template(spoken, session._began)
        session.send("Hello", sampler=dictated(spoken, "Hi."))
        session.save()
        assert "02 January 2026, 03:04:05" in spoken.decode(session.tokens)
    again = Session(model, spoken, path)
    again.send("What day is it?", max_tokens=2)
    assert again.lost == 0


def test_a_template_that_refuses_leaves_the_conversation_as_it_was():
    model, spoken = tiny_talker()
    spoken.chat_template = "{{ raise_exception('no system prompt') if messages[0]['role'] == 'system' else 'a' }}"
    session = Session(model, spoken, system="Be brief.")
    with pytest.raises(InputError, match="refuses this conversation: no system prompt"):
        session.send("Hello")
    assert len(session.messages) == 1


def test_of_an_answer_in_channels_the_last_is_what_the_template_gets():
    model, spoken = tiny_talker(template="channels")
    session = Session(model, spoken)
    told = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes."
    session.send("Is it?", sampler=dictated(spoken, told))
    assert session.messages[-1]["content"] == told
    session.send("So?", max_tokens=2)
    assert spoken.decode(session.tokens).startswith(
        "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nSo?<|im_end|>"
    )


def test_without_a_template_an_answer_ends_where_the_next_question_would_begin():
    model, spoken = tiny_talker(template="none")
    session = Session(model, spoken)
    pieces = list(session.stream("Hello", sampler=dictated(spoken, " Hi.\n\nUse it.\n\nUser: And you?")))
    assert "".join(pieces) == " Hi.\n\nUse it."
    assert session.messages[-1]["content"] == " Hi.\n\nUse it."
    session.send("So?", max_tokens=2)
    assert spoken.decode(session.tokens).startswith(
        "User: Hello\n\nAssistant: Hi.\n\nUse it.\n\nUser: So?\n\nAssistant:"
    )


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

"""A conversation is what its template makes of its messages, in one process or in several, whatever stops an answer."""

import os
from datetime import datetime

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from talking import KINDS, TEMPLATES, dictated, tiny_talker

from mlxkv import lm, stock
from mlxkv.codec.calibrate import uncalibrated
from mlxkv.errors import InputError
from mlxkv.identity import fingerprint
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


def interrupt_layer(monkeypatch, model, after, everywhere=False):
    """Someone presses Ctrl-C in a layer in the middle, in a call of one token, or of any number."""
    kind, middle, left = type(model.layers[1]), model.layers[1], [after]
    really = kind.__call__

    def call(self, x, *more, **named):
        if self is middle and (everywhere or x.shape[1] == 1):
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

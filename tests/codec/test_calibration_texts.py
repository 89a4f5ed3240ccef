"""Texts to calibrate on: diverse from the first stretch on, begun as the model's texts do, and read without trust."""

import json
from collections import Counter

import pytest

from mlxkv import calibration
from mlxkv.bundled.corpus import Text
from mlxkv.calibration import texts
from mlxkv.errors import FormatError, InputError
from mlxkv.sensitivity import STRETCH_TOKENS


class Bytes:
    """A tokenizer of bytes, with a token before every text, and a template that marks turns."""

    def __init__(self, has_chat_template=False, fails=False):
        self.has_chat_template, self.fails = has_chat_template, fails

    def encode(self, text):
        return [1, *(2 + byte for byte in text.encode())]

    def apply_chat_template(self, messages, tokenize):
        if self.fails:
            raise RuntimeError("no system role")
        return [1, *(token for turn in messages for token in [300, *self.encode(turn["content"])[1:]])]


def of(kind, *lengths):
    return [
        Text(f"{kind}{i}", kind, f"{kind}{i} " * (length // (len(kind) + 2)), None) for i, length in enumerate(lengths)
    ]


MESSAGES = [{"role": "system", "content": "Be brief. " * 30}, {"role": "user", "content": "Why? " * 60}]


def test_kinds_take_turns_from_the_first_stretch_on():
    found = calibration.cut(Bytes(), of("a", *[2000] * 6) + of("b", *[700] * 4) + of("c", 1500, 1500, 1500))
    kinds = [stretch.kind for stretch in found.trained]
    assert kinds[:9] == ["a", "b", "c"] * 3
    firsts = [bytes(t - 2 for t in s.tokens[1:4]) for s in found.trained if s.kind == "a"][:5]
    assert len(set(firsts)) == 5  # of every text before a second one of any


def test_every_stretch_begins_as_a_text_does_and_none_is_too_long_or_short():
    found = calibration.cut(Bytes(), of("a", 3000, 100, 40, 700, 671, 672) + of("b", 5000))
    for stretch in found.trained + found.held_out:
        assert stretch.tokens[0] == 1
        assert stretch.tokens.count(1) == 1
        assert 17 <= len(stretch.tokens) <= STRETCH_TOKENS


def test_nothing_that_is_held_out_is_learnt_from_and_each_kind_has_its_own():
    found = calibration.cut(Bytes(), of("a", *[2000] * 4) + of("b", *[900] * 4) + of("c", 6000))
    assert Counter(stretch.kind for stretch in found.held_out) == {"a": 1, "b": 1, "c": 1}
    learnt = {tuple(stretch.tokens[1:40]) for stretch in found.trained}
    assert not learnt & {tuple(stretch.tokens[1:40]) for stretch in found.held_out if stretch.kind != "c"}


@pytest.mark.parametrize(
    ("tokenizer", "through"), [(Bytes(True), True), (Bytes(), False), (Bytes(True, fails=True), False)]
)
def test_conversations_go_through_the_template_where_the_model_has_one_that_takes_them(tokenizer, through):
    text = Text("talk", "chat", "System: Be brief.\n" * 40, MESSAGES)
    found = calibration.cut(tokenizer, [text])
    assert (300 in [token for s in found.trained + found.held_out for token in s.tokens]) == through


def test_the_texts_that_ship_along_are_of_many_kinds_and_tens_of_thousands_of_tokens():
    found = calibration.cut(Bytes(True), calibration.default_texts())
    assert len({stretch.kind for stretch in found.trained[:7]}) == 7
    assert sum(len(stretch.tokens) for stretch in found.trained) > 150_000  # bytes
    assert len(found.held_out) >= 6


def test_files_and_folders_are_read_as_what_they_are(tmp_path):
    (tmp_path / "notes" / "deep").mkdir(parents=True)
    (tmp_path / "notes" / "a.md").write_text("# Title")
    (tmp_path / "notes" / "deep" / "b.py").write_text("x = 1")
    (tmp_path / "notes" / "talk.json").write_text(json.dumps({"messages": MESSAGES}))
    (tmp_path / "notes" / "data.json").write_text('{"x": 1}')
    (tmp_path / "notes" / "picture.png").write_bytes(b"\x89PNG\0\xff")
    (tmp_path / "notes" / ".hidden").mkdir()
    (tmp_path / "notes" / ".hidden" / "c.txt").write_text("no")
    (tmp_path / "odd.name").write_text("given by name")
    found = {text.name: text for text in calibration.read_texts([tmp_path / "notes", tmp_path / "odd.name"])}
    assert {name: text.kind for name, text in found.items()} == {
        "a.md": "md", "b.py": "deep", "talk.json": "json", "data.json": "json", "odd.name": "name",
    }  # fmt: skip
    assert found["talk.json"].messages == MESSAGES
    assert found["data.json"].messages is None
    assert found["data.json"].text == '{"x": 1}'


@pytest.mark.parametrize("content", [b"\x89PNG\xff\xfe", b"text\0more"])
def test_a_file_that_is_no_text_is_refused_by_its_name(tmp_path, content):
    (tmp_path / "picture.txt").write_bytes(content)
    with pytest.raises(FormatError, match=r"picture\.txt"):
        calibration.read_texts([tmp_path])


def test_texts_that_are_missing_too_short_too_many_or_too_long_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="gone"):
        calibration.read_texts([tmp_path / "gone.txt"])
    with pytest.raises(InputError, match="no text files"):
        calibration.read_texts([tmp_path])
    with pytest.raises(InputError, match="256 are the least"):
        calibration.cut(Bytes(), of("a", 100))
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("word " * 100)
    monkeypatch.setattr(texts, "MAX_FILE", 100)
    with pytest.raises(InputError, match=r"a\.txt has more than"):
        calibration.read_texts([tmp_path])
    monkeypatch.setattr(texts, "MAX_FILES", 1)
    with pytest.raises(InputError, match="2 files are more than 1"):
        calibration.read_texts([tmp_path])


def test_of_many_texts_the_beginnings_are_used(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "MAX_CHARACTERS", 200)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name[0] * 1000)
    assert [len(text.text) for text in calibration.read_texts([tmp_path])] == [100, 100]

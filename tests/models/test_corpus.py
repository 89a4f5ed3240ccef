"""The texts that ship for calibration: whole, varied, and none of those that measure it."""

import pydoc_data.topics
from itertools import pairwise

import pytest

from benchmarks import texts as measured
from mlxkv.bundled import corpus
from mlxkv.errors import InputError

SHARES = {"chat": 30, "code": 40, "data": 7, "languages": 25, "long": 20, "prose": 50, "tools": 20}  # KiB at least
# Lines that Python itself prints, and its documentation shows.
PRINTED = {
    "Traceback (most recent call last):",
    "During handling of the above exception, another exception occurred:",
}
PATHS = sorted(path for path in corpus.FOLDER.glob("*/*") if path.is_file())
TEXTS = corpus.texts()
CHATS = [text for text in TEXTS if text.messages is not None]


def test_there_are_the_kinds_that_the_readme_lists_and_no_other():
    assert {text.kind for text in TEXTS} == set(SHARES)
    readme = (corpus.FOLDER / "README.md").read_text(encoding="utf-8")
    assert {line.split("`")[1].rstrip("/") for line in readme.splitlines() if line.startswith("| `")} == set(SHARES)


@pytest.mark.parametrize("kind", SHARES)
def test_every_kind_has_its_share(kind):
    assert sum(len(text.text.encode()) for text in TEXTS if text.kind == kind) >= SHARES[kind] * 1024


def test_every_file_is_read_once_in_a_fixed_order_and_says_something():
    assert [(text.kind, text.name) for text in TEXTS] == [(p.parent.name, p.name.split(".")[0]) for p in PATHS]
    assert len({(text.kind, text.name) for text in TEXTS}) == len(TEXTS)
    assert all(len(text.text) > 300 and "\0" not in text.text and "\ufffd" not in text.text for text in TEXTS)


def test_texts_are_no_modules():
    assert [path.name for path in PATHS if path.suffix in (".py", ".pyi")] == []


def test_every_file_of_chat_is_a_conversation():
    assert all(text.messages for text in TEXTS if text.kind == "chat")


@pytest.mark.parametrize("text", CHATS, ids=lambda text: text.name)
def test_turns_alternate_between_user_and_assistant(text):
    roles = [turn["role"] for turn in text.messages]
    spoken = roles[1:] if roles[0] == "system" else roles
    assert spoken[0] == "user"
    assert spoken[-1] == "assistant"
    follows = {"user": {"assistant"}, "assistant": {"user", "tool"}, "tool": {"tool", "assistant"}}
    assert all(after in follows[before] for before, after in pairwise(spoken))
    assert all(turn["content"].strip() for turn in text.messages)
    assert text.text.startswith(f"{roles[0].capitalize()}: {text.messages[0]['content']}\n")


def test_no_long_line_is_one_that_measures_calibration():
    others = [path.read_text(encoding="utf-8") for path in measured.FOLDER.glob("*.txt")]
    known = {line for text in [*others, *pydoc_data.topics.topics.values()] for line in measured.long_lines(text)}
    assert known & {line for text in TEXTS for line in measured.long_lines(text.text)} <= PRINTED


def test_json_that_is_no_conversation_stays_text(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "FOLDER", tmp_path)
    turns = '[{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Yes."}]'
    files = {
        "chat/a.json": turns,
        "data/a.json": turns,
        "tools/a.json": '{"a": 1}',
        "tools/b.json": "[]",
        "tools/c.json": '[{"role": "user"}]',
        "tools/d.json": "[1]",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "chat/.DS_Store").write_bytes(b"\xff")
    first, *rest = corpus.texts()
    assert (first.text, len(first.messages)) == ("User: Hm?\nAssistant: Yes.\n", 2)
    assert [text.messages for text in rest] == [None] * 5


def test_a_missing_folder_is_an_error_that_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "FOLDER", tmp_path / "corpus")
    with pytest.raises(InputError, match=r"no texts in .*corpus; reinstall"):
        corpus.texts()

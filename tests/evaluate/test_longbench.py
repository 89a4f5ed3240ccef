"""LongBench: samples from files as published, cut in the middle, asked of every variant, scored as published."""

import json
import marshal
import os
import sys
import tempfile

import pytest
from conftest import tiny_model
from damage import shuffled, zeroed

from mlxkv.errors import FormatError, InputError, MlxkvError
from mlxkv.evaluate import answer_scores as scores
from mlxkv.evaluate import variants as variants
from mlxkv.evaluate.runner import draw_samples, run
from mlxkv.evaluate.tasks import longbench
from mlxkv.evaluate.tasks.longbench import TASKS, Sample

RIGHT = {
    scores.f1: ("the Eiffel Tower", "Eiffel tower."),
    scores.f1_zh: ("清华大学", "清华大学。"),
    scores.rouge: ("a report about roads", "a report about roads"),
    scores.rouge_zh: ("会议讨论了预算", "会议讨论了预算"),
    scores.classification: ("number", "number"),
    scores.count: ("12", "12"),
    scores.retrieval: ("Paragraph 12", "Paragraph 12"),
    scores.code_similarity: ("return x", "return x"),
}


class Letters:
    """A tokenizer of one token a character; 96 comes first."""

    eos_token_ids = ()

    def encode(self, text, add_special_tokens=True):
        return [96] * add_special_tokens + [95 if char == "\n" else ord(char) - 32 for char in text]

    def decode(self, tokens, skip_special_tokens=False):
        return "".join("\n" if token == 95 else chr(token + 32) for token in tokens if token != 96)


def sample(task="narrativeqa", answers=("x",), classes=(), **changed):
    fields = {"id": "1", "context": "Text: abc", "question": "\nWhich? ", "length": 3, "max_tokens": 8, **changed}
    return Sample(task=task, answers=tuple(answers), classes=tuple(classes), **fields)


def row(task, **changed):
    fields = {"input": "Which?", "context": "abc" * 9, "answers": ["x"], "length": 9, "dataset": task}
    return {**fields, "language": "en", "all_classes": None, "_id": "i0", **changed}


@pytest.fixture
def folder(tmp_path):
    """A function that writes a task's rows, and what it wrote into."""
    (tmp_path / "config").mkdir()
    (tmp_path / "data").mkdir()
    prompts = dict.fromkeys(TASKS, "Read: {context}\nAnswer {input}: ")
    (tmp_path / "config/dataset2prompt.json").write_text(json.dumps(prompts))
    (tmp_path / "config/dataset2maxlen.json").write_text(json.dumps(dict.fromkeys(TASKS, 8)))

    def write(task, *rows):
        lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
        (tmp_path / f"data/{task}.jsonl").write_text("\n".join(lines) + "\n")
        return tmp_path

    return write


def test_there_are_21_tasks_and_each_tells_a_right_answer_from_none():
    assert len(TASKS) == 21
    for task, metric in TASKS.items():
        said, expected = RIGHT[metric]
        asked = sample(task, [expected], ["number", "place"])
        assert longbench.score(asked, said) == pytest.approx(1), task
        assert longbench.score(asked, "") == 0, task


@pytest.mark.parametrize(
    ("said", "expected", "score"),
    [
        ("The cat, a dog!", "cat and dog", 0.8),
        ("cat cat cat", "Cat cat dog", 2 / 3),  # each word as often as both have it
        ("well-known", "wellknown", 1),
        ("another theatre", "other atre", 0),  # articles are whole words
        ("a", "the", 0),
    ],
)
def test_f1_is_of_words_without_case_punctuation_and_articles(said, expected, score):
    assert scores.f1(said, expected) == pytest.approx(score)


def test_chinese_words_are_segmented_and_their_punctuation_does_not_count():
    assert scores.f1_zh("我来到北京清华大学", "“北京”、清华大学。") == pytest.approx(2 * 2 / 6)
    assert scores.f1_zh("OK, 清华大学!", "(ok) 清华大学") == 1
    assert scores.rouge_zh("我来到北京清华大学", "北京清华大学") == pytest.approx(2 * 2 / 6)


@pytest.mark.parametrize(
    ("said", "expected", "score"),
    [
        ("the cat sat", "the cat ran", 2 / 3),
        ("no no no no", "no", 1),  # a word counts once
        ("c d. a b", "a b. c d", 1),  # sentences in any order
        ("a b", "b a", 0.5),  # words in order
        ("...", "a b", 0),
        ("", "a b", 0),
        ("y x" + " x" * 1100, "y", 0),  # beyond the recursion of the package
    ],
)
def test_rouge_is_of_sentences_and_different_words(said, expected, score):
    assert scores.rouge(said, expected) == pytest.approx(score)


@pytest.mark.parametrize(
    ("said", "score"), [("Type: date", 1), ("date or place", 0.5), ("place", 0), ("Date", 0), ("", 0)]
)
def test_a_class_shares_its_point_with_the_others_named(said, score):
    assert scores.classification(said, "date", ["date", "place"]) == score


def test_a_class_whose_name_is_part_of_the_expected_one_takes_nothing():
    assert (
        scores.classification("Other date of birth", "Other date of birth", ["date", "Other date of birth", "birth"])
        == 1
    )
    assert scores.classification("Other date", "date", ["date", "Other date"]) == 0.5


def test_numbers_said_share_the_point():
    assert scores.count("There are 12, not 7 or 12.", "12") == 2 / 3
    assert scores.count("twelve", "12") == 0
    assert scores.count("112", "12") == 0
    assert scores.retrieval("Paragraph 3 (of 30)", "Paragraph 3") == 0.5
    assert scores.retrieval("段落3", "段落3") == 1


def test_code_is_compared_by_its_first_line_of_code():
    assert scores.code_similarity("\n\nx = 1\ny = 2", "x = 2") == 0.8
    assert scores.code_similarity("```python\n# next\n// next\nx = 2", "x = 2") == 1
    assert scores.code_similarity("# only", "x = 2") == 0
    assert scores.code_similarity("abc", "abd") == 0.67  # in whole per cent


def test_only_the_first_line_counts_where_models_go_on_with_examples():
    said = "\nnumber\nplace"
    assert longbench.score(sample("trec", ["number"], ["number", "place"]), said) == 1
    assert longbench.score(sample("triviaqa", ["number"]), said) == 1
    assert longbench.score(sample("qasper", ["number"]), said) == pytest.approx(2 / 3)


def test_the_closest_answer_counts():
    assert longbench.score(sample(answers=["red", "blue", "dark blue"]), "Blue") == 1


@pytest.mark.parametrize(("name", "task"), [("rouge", "gov_report"), ("jieba", "dureader")])
def test_a_missing_library_is_found_out_before_the_model_runs(monkeypatch, folder, name, task):
    scores._segmenter.cache_clear()
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MlxkvError, match=rf"{name}.*mlxkv\[eval\]"):
        longbench.LongBench(longbench.LongBenchOptions(folder(task, row(task)), 100, (task,))).samples(Letters(), 0)


def test_no_dictionary_is_read_from_or_left_in_the_shared_temporary_folder(monkeypatch, tmp_path):
    word, planted = "北京清华大学", tmp_path / "jieba.cache"
    prefixes = [word[:end] for end in range(1, len(word))]
    planted.write_bytes(marshal.dumps(({**dict.fromkeys(prefixes, 0), word: 10**9}, 10**9)))
    os.utime(planted, (4e9, 4e9))  # newer than jieba's own dictionary
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    scores._segmenter.cache_clear()
    assert scores.f1_zh(word, "清华大学") == pytest.approx(2 / 3)
    assert list(tmp_path.iterdir()) == [planted]


def test_a_long_prompt_loses_its_middle():
    context, question = list(range(100)), list(range(100, 120))
    assert longbench.truncate_middle(context, question, 120) == (context, question)
    assert longbench.truncate_middle(context, question, 60) == ([*range(30), *range(90, 100)], question)
    assert longbench.truncate_middle(context, question, 61) == ([*range(30), *range(90, 100)], question)
    assert longbench.truncate_middle(context, question, 20) == ([*range(10)], [*range(110, 120)])
    assert longbench.truncate_middle([0], question, 10) == ([0], [100, 101, 102, 103, 115, 116, 117, 118, 119])


def test_only_the_context_begins_with_the_tokenizers_own_token_and_only_it_is_held():
    (found,) = longbench.ask_sample(sample(), 100, tiny_model("llama"), Letters(), [variants.baseline()])
    assert found["tokens"] == len("Text: abc") + 1
    context, question = longbench.tokenize_prompt(Letters(), sample(), 100)
    assert (context[0], context) == (96, Letters().encode("Text: abc"))
    assert question == Letters().encode("\nWhich? ", add_special_tokens=False)


def test_the_question_is_what_follows_the_context_and_the_input_is_in_it(folder):
    where = folder("qasper", row("qasper", input="{context} {0}", context="{input}", answers=["y", "z"]))
    question = "\nAnswer {context} {0}: "
    expected = sample("qasper", ["y", "z"], id="i0", context="Read: {input}", question=question, length=9)
    assert longbench.read_task(where, "qasper") == [expected]


def test_samples_do_not_depend_on_the_seed_and_are_limited_in_each_task(folder):
    where = folder("qasper", *(row("qasper", _id=f"i{i:02}") for i in range(30)))
    options = longbench.LongBenchOptions(folder("lcc", row("lcc")), 100, ("qasper", "lcc"))
    assert [unit.key for unit in longbench.LongBench(options).samples(Letters(), 0)] == [
        *({"task": "qasper", "id": f"i{i:02}"} for i in range(30)),
        {"task": "lcc", "id": "i0"},
    ]
    drawn = [unit.group for unit in draw_samples(longbench.LongBench(options), Letters(), limit=5)]
    assert drawn == ["qasper"] * 5 + ["lcc"]
    assert len(draw_samples(longbench.LongBench(options), Letters(), seeds=3)) == 31
    assert where == options.folder


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        ("qasper", '{"input": ', "not valid JSON"),
        ("qasper", "", "not valid JSON"),
        ("qasper", "[" * 100_000, "not valid JSON"),
        ("qasper", "[]", "JSON object"),
        ("qasper", {"input": None}, "input should be text"),
        ("qasper", {"context": ""}, "context not empty"),
        ("qasper", {"context": "\ud800"}, "context should be text"),
        ("qasper", {"dataset": "trec"}, "'trec' among those of qasper"),
        ("qasper", {"answers": []}, "answers"),
        ("qasper", {"answers": "x"}, "answers"),
        ("qasper", {"answers": ["x" * 40_000]}, "answers"),
        ("qasper", {"length": -1}, "length"),
        ("qasper", {"length": True}, "length"),
        ("qasper", {"all_classes": {"a": 1}}, "all_classes"),
        ("trec", {"all_classes": []}, "all_classes"),
        ("passage_retrieval_en", {"answers": ["3"]}, "names no paragraph"),
    ],
)
def test_hostile_lines_are_refused_by_file_and_line(folder, task, line, message):
    good = {"answers": ["Paragraph 3"], "all_classes": ["date"]}
    where = folder(task, row(task, **good), line if isinstance(line, str) else row(task, **{**good, **line}))
    with pytest.raises(FormatError, match=rf"{task}\.jsonl, line 2: .*{message}|{task}\.jsonl, line 2.*{message}"):
        longbench.read_task(where, task)


def test_lines_and_settings_have_bounds(folder, monkeypatch):
    where = folder("qasper", row("qasper"))
    monkeypatch.setattr(longbench, "MAX_LINE_BYTES", 50)
    with pytest.raises(FormatError, match="line 1: more than 50 bytes"):
        longbench.read_task(where, "qasper")
    monkeypatch.setattr(longbench, "MAX_CONFIG_BYTES", 50)
    with pytest.raises(FormatError, match=r"dataset2prompt\.json has more than 50 bytes"):
        longbench.read_task(where, "qasper")


@pytest.mark.parametrize(
    "template", [None, "{context}", "Answer {input}", "{input} {context}?", "{context} {context}?", "{context}\ud800"]
)
def test_a_prompt_has_one_context_and_the_question_after_it(folder, template):
    where = folder("qasper", row("qasper"))
    (where / "config/dataset2prompt.json").write_text(json.dumps({"qasper": template}))
    with pytest.raises(FormatError, match=r"dataset2prompt\.json: qasper"):
        longbench.read_task(where, "qasper")


@pytest.mark.parametrize("tokens", [None, 0, "8", 1e3, 10**6, True])
def test_tokens_to_generate_are_a_number_within_bounds(folder, tokens):
    where = folder("qasper", row("qasper"))
    (where / "config/dataset2maxlen.json").write_text(json.dumps({"qasper": tokens}))
    with pytest.raises(FormatError, match=r"dataset2maxlen\.json: qasper"):
        longbench.read_task(where, "qasper")


def test_what_cannot_be_asked_is_refused(folder):
    with pytest.raises(FormatError, match="two samples with one _id"):  # one of them would get lost
        longbench.read_task(folder("qasper", row("qasper"), row("qasper", context="other")), "qasper")
    where = folder("qasper", row("qasper"))
    for tasks in (("nq",), ()):
        with pytest.raises(InputError, match=r"tasks (nq|\(none\)); there are 2wikimqa"):
            longbench.LongBenchOptions(where, tasks=tasks)
    with pytest.raises(InputError, match=r"trec\.jsonl"):
        longbench.read_task(where, "trec")
    with pytest.raises(InputError, match="qasper generates 8 tokens; a length of 9"):
        longbench.LongBench(longbench.LongBenchOptions(where, 9, ("qasper",))).samples(Letters(), 0)


def test_a_damaged_cache_scores_worse_and_the_untouched_one_as_the_whole(folder):
    model, text = tiny_model("llama"), "The quick brown fox jumps over the lazy dog. " * 4
    where = folder("lcc", *(row("lcc", _id=f"i{i}", context=text[i:]) for i in range(3)))
    prompts = [longbench.tokenize_prompt(Letters(), one, 100) for one in longbench.read_task(where, "lcc")]
    held = [(variants.baseline().build(model, context), question) for context, question in prompts]
    said = [Letters().decode(variants.generate_answer(model, Letters(), *both, 8)) for both in held]
    where = folder("lcc", *(row("lcc", _id=f"i{i}", context=text[i:], answers=["~", a]) for i, a in enumerate(said)))
    compared = [variants.live_variant("full"), shuffled(), zeroed()]
    records = run("longbench", model, Letters(), compared, longbench.LongBenchOptions(where, 100, ("lcc",)))["samples"]
    names = ("whole", "full", "shuffled keys", "half zeroed")
    whole, full, *damaged = ([r for r in records if r["variant"] == name] for name in names)
    assert records[0]["variant"] == "whole"
    assert len(records) == 12
    assert [r["answer"] for r in full] == [r["answer"] for r in whole] == said
    assert [r["score"] for r in full] == [r["score"] for r in whole]
    for rows in damaged:
        assert sum(r["score"] for r in rows) < sum(r["score"] for r in whole) - 0.5
    assert {r["prompt_tokens"] for r in records} == {92}
    assert json.loads(json.dumps(records)) == records

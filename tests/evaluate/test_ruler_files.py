"""RULER's files: rows that go out and come back, the user's essays and questions, and files that mean harm."""

import json

import pytest
from ruler_checks import sample

from mlxkv.errors import FormatError, InputError
from mlxkv.evaluate.sources import Question, Sources, read_text
from mlxkv.evaluate.tasks.ruler import TASKS
from mlxkv.evaluate.tasks.ruler.samples import read_rows, write_rows

VT = TASKS["vt"]
ROW = {"index": 0, "input": f"a {VT.question_start} 1 is", "outputs": ["A"], "length": 20}
SQUAD_QA = {"question": "Who?", "answers": [{"text": "Bo"}, {"text": "Bo"}, {"text": "old Bo"}], "is_impossible": False}
UNANSWERABLE = {"question": "Why?", "answers": [], "is_impossible": True}


def written(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize("name", TASKS)
def test_rows_come_back_as_the_samples_that_were_written(name, tmp_path):
    made = [sample(name, 1000, index=index) for index in range(2)]
    write_rows(tmp_path / "validation.jsonl", made)
    lines = (tmp_path / "validation.jsonl").read_text().splitlines()
    assert [list(json.loads(line)) for line in lines] == [["index", "input", "outputs", "length"]] * 2
    assert read_rows(tmp_path / "validation.jsonl", TASKS[name]) == made


def test_rows_of_ruler_have_the_beginning_of_the_answer_apart(tmp_path):
    made = sample("niah_single_1", 1000)
    asked, prefix = made.question.rsplit("?", 1)
    row = {
        "index": 7,
        "input": made.context.replace("\n", " ") + asked + "?",
        "outputs": list(made.answers),
        "length": made.length,
        "length_w_model_temp": made.length,
        "answer_prefix": prefix,
        "token_position_answer": 12,
    }
    (read,) = read_rows(written(tmp_path / "r.jsonl", json.dumps(row) + "\n"), TASKS["niah_single_1"])
    assert (read.question, read.answers, read.index) == (made.question, made.answers, 7)
    assert read.context == made.context.replace("\n", " ")


def test_a_line_may_hold_any_character(tmp_path):
    row = {**ROW, "input": f"a\u2028b\x85c {VT.question_start} 1 is"}
    path = written(tmp_path / "r.jsonl", json.dumps(row, ensure_ascii=False) + "\n")
    assert read_rows(path, VT)[0].context == "a\u2028b\x85c "


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        '{"index": 1e999}',
        "9" * 5000,
        *(
            json.dumps({**ROW, **change})
            for change in (
                {"index": None},
                {"index": True},
                {"index": "0"},
                {"index": -1},
                {"length": 1.5},
                {"outputs": []},
                {"outputs": "A"},
                {"outputs": [""]},
                {"outputs": [" "]},
                {"outputs": [1]},
                {"outputs": None},
                {"input": 3},
                {"input": ""},
                {"input": VT.question_start},
                {"input": "no question in it"},
                {"input": f"\ud800 {VT.question_start}"},
                {"answer_prefix": 3},
            )
        ),
    ],
)
def test_a_row_that_is_none_is_refused_by_its_line(line, tmp_path):
    path = written(tmp_path / "r.jsonl", f"{json.dumps(ROW)}\n{line}\n")
    with pytest.raises(FormatError, match="line 2"):
        read_rows(path, VT)


def test_rows_of_another_task_are_refused(tmp_path):
    write_rows(tmp_path / "r.jsonl", [sample("fwe")])
    with pytest.raises(FormatError, match="asks no question of this task"):
        read_rows(tmp_path / "r.jsonl", VT)


def test_sizes_are_bounded_and_bytes_are_utf8(tmp_path):
    path = written(tmp_path / "long.txt", "12345")
    assert read_text(path, 5) == "12345"
    with pytest.raises(InputError, match="more than"):
        read_text(path, 4)
    path.write_bytes(b"\xff")
    with pytest.raises(FormatError, match="UTF-8"):
        read_text(path)
    with pytest.raises(InputError, match="cannot read"):
        read_text(tmp_path / "none.txt")


def test_essays_are_a_file_a_folder_or_rulers_json(tmp_path):
    one = written(tmp_path / "b.txt", "b  c\n")
    written(tmp_path / "a.txt", "a\n\n")
    assert Sources(essays=one).essay_words(3) == ["b", "c", "b"]
    assert Sources(essays=tmp_path).essay_words(4) == ["a", "b", "c", "a"]
    assert Sources(essays=written(tmp_path / "e.json", {"text": "x y"})).essay_words(2) == ["x", "y"]
    assert Sources(essays=one).name("essays") == "b.txt"
    assert Sources().name("essays") == "built-in"


@pytest.mark.parametrize("content", ['{"text": 3}', "[]", "{}", "{", '{"text": "\\ud800"}'])
def test_essays_in_wrong_json_are_refused(content, tmp_path):
    with pytest.raises(FormatError):
        Sources(essays=written(tmp_path / "e.json", content)).essay_words(1)


def test_a_folder_without_essays_is_refused(tmp_path):
    with pytest.raises(InputError, match="no essays"):
        Sources(essays=tmp_path).essay_words(1)


def test_squad_is_read_as_published_and_unanswerable_questions_are_left_out(tmp_path):
    parts = [{"context": "z", "qas": [SQUAD_QA, UNANSWERABLE]}, {"context": "y", "qas": []}]
    articles = [{"title": "t", "paragraphs": parts}, {"title": "u", "paragraphs": [{"context": "x", "qas": []}]}]
    path = written(tmp_path / "dev-v2.0.json", {"version": "v2.0", "data": articles})
    questions, documents = Sources(squad=path).questions("squad")
    assert documents == ["x", "y", "z"]
    assert questions == [Question("Who?", ("Bo", "old Bo"), (2,), (2, 1))]
    assert questions[0].related == [1]


def test_questions_of_an_article_share_what_says_so(tmp_path):
    parts = [{"context": f"c{i}", "qas": [SQUAD_QA]} for i in range(50)]
    path = written(tmp_path / "s.json", {"data": [{"paragraphs": parts}]})
    questions, _ = Sources(squad=path).questions("squad")
    assert len({id(question.article) for question in questions}) == 1
    assert len(questions[0].related) == 49


def test_blank_answers_are_none_since_they_would_be_found_in_anything(tmp_path):
    def asked(*texts):
        answers = [{"text": text} for text in texts]
        return {"question": " ".join(texts), "answers": answers, "is_impossible": False}

    paragraph = {"context": "c", "qas": [asked("a", " "), asked("", "\n")]}
    path = written(tmp_path / "s.json", {"data": [{"paragraphs": [paragraph]}]})
    questions, _ = Sources(squad=path).questions("squad")
    assert [question.answers for question in questions] == [("a",)]


def test_hotpotqa_is_read_as_published(tmp_path):
    item = {"_id": "1", "question": "Who?", "answer": "Bo", "context": [["t", ["a.", " b."]], ["s", ["c."]]]}
    questions, documents = Sources(hotpotqa=written(tmp_path / "h.json", [item])).questions("hotpotqa")
    assert documents == ["s\nc.", "t\na. b."]
    assert questions == [Question("Who?", ("Bo",), (1, 0))]


@pytest.mark.parametrize("field", ["squad", "hotpotqa"])
@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[" * 100_000,
        "3",
        "[]",
        "[3]",
        '{"data": []}',
        '{"data": [3]}',
        '{"data": [{"paragraphs": [{"context": 1, "qas": []}]}]}',
        json.dumps({"data": [{"paragraphs": [{"context": "c", "qas": [UNANSWERABLE]}]}]}),
        '{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": 3, "answers": [{"text": "a"}]}]}]}]}',
        '{"data": [{"paragraphs": [{"context": "\\udfff", "qas": []}]}]}',
        '[{"question": "q", "answer": "", "context": []}]',
        '[{"question": "q", "answer": "a", "context": [["t"]]}]',
        '[{"question": "q", "answer": "a", "context": [["t", [1]]]}]',
        '[{"question": "q", "answer": 3, "context": []}]',
    ],
)
def test_questions_in_wrong_json_are_refused(field, content, tmp_path):
    with pytest.raises(FormatError):
        Sources(**{field: written(tmp_path / "q.json", content)}).questions(field)

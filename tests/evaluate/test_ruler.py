"""RULER's tasks: as long as wanted, to the published sizes, with the answers where they should be and nowhere else."""

import re
from collections import Counter
from random import Random

import pytest
from ruler_checks import Words, sample

from mlxkv.errors import InputError
from mlxkv.evaluate.sources import Sources
from mlxkv.evaluate.tasks.ruler import TASKS
from mlxkv.evaluate.tasks.ruler.task import Request, string_match_all, string_match_part
from mlxkv.evaluate.tasks.ruler.vocabulary import draw_keys, draw_words, words

NIAH = [name for name in TASKS if name.startswith("niah")]
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
KINDS = {"words": r"[^:]+-[^:]+", "numbers": r"\d{7}", "uuids": UUID}
# Published: kind of keys and values, needles in the text (None: all of it), answers.
PUBLISHED = {
    "niah_single_1": ("words", "numbers", 1, 1),
    "niah_single_2": ("words", "numbers", 1, 1),
    "niah_single_3": ("words", "uuids", 1, 1),
    "niah_multikey_1": ("words", "numbers", 4, 1),
    "niah_multikey_2": ("words", "numbers", None, 1),
    "niah_multikey_3": ("uuids", "uuids", None, 1),
    "niah_multivalue": ("words", "numbers", 4, 4),
    "niah_multiquery": ("words", "numbers", 4, 4),
}


def keys_asked(made):
    """The keys that the question of a needle task names."""
    return re.split(r", (?:and )?", re.search(r" for (.+?) mentioned", made.question)[1])


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [1500, 4200])
def test_a_sample_fills_its_length_and_never_exceeds_it(name, length):
    made = sample(name, length)
    tokens = len(Words().encode(made.context)) + len(Words().encode(made.question, add_special_tokens=False))
    assert made.length == tokens + TASKS[name].max_tokens
    assert 0.95 * length <= made.length <= length


@pytest.mark.parametrize("name", TASKS)
def test_seed_and_index_decide_what_a_sample_is(name):
    made = sample(name, 1000, seed=3, index=1)
    assert made == sample(name, 1000, seed=3, index=1)
    others = [sample(name, 1000, seed=4, index=1), sample(name, 1000, seed=3, index=0)]
    assert made.context not in [other.context for other in others]


@pytest.mark.parametrize("name", NIAH)
def test_needles_are_as_many_and_of_the_kind_published(name):
    made = sample(name)
    key_kind, value_kind, needles, answers = PUBLISHED[name]
    form = rf"One of the special magic {value_kind} for ({KINDS[key_kind]}) is: ({KINDS[value_kind]})\."
    found = re.findall(form, made.context)
    assert len(found) == made.context.count("special magic") - 1  # the instruction says it too
    assert len(found) == needles if needles else len(found) > 50
    assert len({value for _, value in found}) == len(found)
    asked = keys_asked(made)
    assert sorted(made.answers) == sorted(value for key, value in found if key in asked)
    assert len(made.answers) == answers
    assert all(made.context.count(answer) == 1 for answer in made.answers)


def test_several_answers_come_in_the_order_of_the_keys_asked():
    made = sample("niah_multiquery")
    asked = keys_asked(made)
    assert f"for {asked[0]}, {asked[1]}, {asked[2]}, and {asked[3]} mentioned" in made.question
    assert made.answers == tuple(re.search(rf"for {key} is: (\d+)", made.context)[1] for key in asked)


def test_one_answer_and_several_are_asked_for_in_other_words():
    one, many = sample("niah_single_3"), sample("niah_multivalue")
    assert one.context.startswith("A special magic uuid is hidden within the following text.")
    assert many.context.startswith("Some special magic numbers are hidden within the following text.")
    assert re.fullmatch(
        r"What is the special magic uuid for (.+) mentioned in the provided text\?"
        r" The special magic uuid for \1 mentioned in the provided text is",
        one.question,
    )
    assert many.question.endswith("mentioned in the provided text are")


@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_2", "niah_multikey_2"])
def test_a_needle_can_be_anywhere(name):
    places = []
    for index in range(12):
        made = sample(name, 600, index=index)
        places.append(made.context.index(made.answers[0]) / len(made.context))
    assert min(places) < 0.4
    assert max(places) > 0.6


def test_an_essay_goes_on_in_its_own_order_around_the_needles():
    made = sample("niah_multikey_1")
    text = re.sub(r"One of the special magic numbers for [^:]+ is: \d+\. ?", "", made.context.partition("\n")[2])
    assert Sources().essay_words(len(text.split())) == text.split()


def test_a_chain_of_assignments_leads_to_the_variables_asked_for():
    made = sample("vt")
    value = re.search(r"assigned the value (\d{5}) in the text", made.question)[1]
    text = made.context.rpartition("Memorize and track")[2]
    given = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+) ?\n", text))
    chain = [next(name for name, source in given.items() if source == value)]
    for _ in range(4):
        chain.append(next(name for name, source in given.items() if source == chain[-1]))
    assert tuple(chain) == made.answers
    assert len(given) == 5
    assert all(re.fullmatch("[A-Z]{5}", name) for name in chain)


def test_the_example_before_a_chain_is_another_one_with_its_answer():
    made = sample("vt")
    example, _, text = made.context.rpartition("Memorize and track")
    names = re.findall(r"VAR (\w{3}) =", example)
    assert example.rstrip().endswith("they are:  " + " ".join(names))
    assert len(names) == 5
    assert not [name for name in names if f"VAR {name} " in text]
    assert not [answer for answer in made.answers if answer in example]


@pytest.mark.parametrize(("length", "often", "seldom"), [(2000, 6, 1), (4200, 30, 3)])
def test_ten_words_are_common_as_often_as_published(length, often, seldom):
    made = sample("cwe", length)
    example, _, text = made.context.rpartition("Below is a numbered list")
    numbers, entries = zip(*re.findall(r"(\d+)\. (.+?)(?= \d+\. |\n)", text.partition("\n")[2]))
    counts = Counter(entries)
    assert [int(number) for number in numbers] == list(range(1, len(numbers) + 1))
    assert {word for word, count in counts.items() if count == often} == set(made.answers)
    assert {count for word, count in counts.items() if word not in made.answers} == {seldom}
    assert len(made.answers) == 10
    assert not set(made.answers) & set(re.findall(r"\d+\. (.+?)(?= \d+\. |\n)", example))


def test_three_coded_words_are_the_most_frequent_after_the_dots():
    made = sample("fwe")
    counts = Counter(made.context.partition("coded words. ")[2].split())
    (dots, *asked, fifth), numbers = zip(*counts.most_common(5))
    assert dots == "..."
    assert tuple(asked) == made.answers
    assert len(fifth) == 6
    assert numbers[0] / numbers[1] == pytest.approx(4, rel=0.02)


def test_coded_words_differ_in_how_often_they_stand_at_any_size():
    task = TASKS["fwe"]
    for size in range(task.min_size, 400):
        draft = task.draft(Request("fwe", 1000, 0, 0, Sources()), size)
        counts = Counter(draft.context.partition("coded words. ")[2].split())
        numbers = [counts[answer] for answer in draft.answers]
        others = [count for word, count in counts.items() if word not in draft.answers and word != "..."]
        assert numbers[0] > numbers[1] > numbers[2] > max(others)


@pytest.mark.parametrize(("name", "field"), [("qa_1", "squad"), ("qa_2", "hotpotqa")])
def test_a_question_comes_with_its_documents_among_others(name, field):
    questions, documents = Sources().questions(field)
    made = sample(name, 700)
    asked = next(question for question in questions if f"Question: {question.query} Answer:" in made.question)
    shown = re.split(r"\n\nDocument \d+:\n", made.context.rstrip())[1:]
    assert set(shown) <= set(documents)
    assert {documents[i] for i in asked.required} <= set(shown)
    assert len(shown) > len(asked.required)
    assert made.answers == asked.answers
    with_answer = {i for i, document in enumerate(documents) if string_match_part(document, asked.answers)}
    assert with_answer <= set(asked.required), "a distractor of the project's own holds the answer"


def test_questions_come_once_each_before_any_comes_again():
    count = len(Sources().questions("hotpotqa")[0])
    asked = [sample("qa_2", 800, index=index).question for index in range(count + 1)]
    assert len(set(asked[:count])) == count
    assert asked[count] == asked[0]


def test_documents_of_the_same_article_come_before_those_of_others():
    questions, documents = Sources().questions("squad")
    for index in range(4):
        request = Request("qa_1", 1000, 0, index, Sources())
        few, more = (TASKS["qa_1"].draft(request, size) for size in (3, 4))
        asked = next(question for question in questions if question.query in few.question)
        article = [documents[i] for i in (*asked.required, *asked.related)]
        assert all(document in few.context for document in article)
        assert sum(document in more.context for document in documents) == 5


def test_when_documents_run_out_they_come_again():
    made = sample("qa_1", 4200)
    assert all(document in made.context for document in Sources().questions("squad")[1])


def test_tokens_to_generate_are_the_published_ones():
    expected = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
    assert {name: task.max_tokens for name, task in TASKS.items()} == {n: expected[n.split("_")[0]] for n in TASKS}
    assert len(TASKS) == 13


@pytest.mark.parametrize("name", TASKS)
def test_a_length_that_is_too_short_is_refused(name):
    with pytest.raises(InputError, match="needs"):
        sample(name, 150)


@pytest.mark.parametrize("count", [500, 20_000])
def test_words_of_keys_and_lists_are_different(count):
    assert len(set(draw_keys(Random(1), count))) == count
    drawn = draw_words(Random(1), count)
    assert len(set(drawn)) == count
    known = set(words("noun", "adjective", "verb"))
    assert (set(drawn) <= known) == (count <= len(known))


def test_tasks_of_one_seed_do_not_ask_for_the_same_values():
    first = [sample(name).answers[0] for name in ("niah_single_1", "niah_single_2", "niah_multivalue")]
    assert len(set(first)) == 3


def test_scores_are_those_worked_out_by_hand():
    assert string_match_all("They are 12 and ABC.", ["12", "abc", "34", "5"]) == 0.5
    assert string_match_all("nothing", ["12"]) == 0
    assert string_match_part("It was PARIS, I think", ["the city of Paris", "Paris"]) == 1
    assert string_match_part("London", ["the city of Paris", "Paris"]) == 0
    assert TASKS["niah_multivalue"].score("1 2", ["1", "2", "3", "4"]) == 0.5
    assert TASKS["qa_1"].score("1 2", ["1", "2", "3", "4"]) == 1

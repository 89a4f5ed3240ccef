"""How much of what a model writes stays the same: hand-worked cases, and tiny models with a method and without."""

import json
import sys

import pytest
from conftest import tiny_model, tiny_tokens
from damage import shuffled, zeroed

from mlxkv.errors import InputError, MlxkvError
from mlxkv.evaluate import variants as variants
from mlxkv.evaluate.runner import run
from mlxkv.evaluate.tasks import text


class Words:
    """A tokenizer of words such as w12."""

    eos_token_ids = ()

    def encode(self, text):
        return [int(word.removeprefix("w")) for word in text.split()]

    def decode(self, tokens):
        return " ".join(f"w{token}" for token in tokens)


TEXT = Words().decode(tiny_tokens(240))
MEASURES = ("bleu", "rouge_l", "equal_leading_tokens", "exact")


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def records(text_file):
    compared = [variants.live_variant(name) for name in ("full", "int8")]
    compared += [variants.live_variant("sliding-window", recent=6), shuffled(), zeroed()]
    options = text.TextOptions(text_file, context_tokens=60, max_tokens=12, samples=4)
    return run("text", tiny_model("llama"), Words(), compared, options)["samples"]


def of(records, variant):
    return [record for record in records if record["variant"] == variant]


def test_the_untouched_cache_comes_first_and_a_full_one_writes_the_same(records):
    assert [record["variant"] for record in records[:3]] == ["whole", "full", "int8"]
    assert all(record["exact"] for record in of(records, "full"))
    for record in of(records, "whole") + of(records, "full"):
        assert [record[measure] for measure in MEASURES] == [1, 1, 1, True]
    assert [r["continuation"] for r in of(records, "full")] == [r["continuation"] for r in of(records, "whole")]


def test_a_damaged_cache_is_told_by_every_measure(records):
    for measure in MEASURES:
        for name in ("sliding-window (recent=6)", "shuffled keys", "half zeroed"):
            damaged, ours = (sum(record[measure] for record in of(records, way)) for way in (name, "int8"))
            assert damaged < min(3, ours), (name, measure)


def test_the_whole_cache_writes_what_the_model_does_without_any(records):
    model, record = tiny_model("llama"), of(records, "whole")[2]
    prompt = Words().encode(TEXT)[record["start"] :][:60]
    expected = variants.generate_answer(model, Words(), variants.baseline().build(model, prompt[:20]), prompt[20:], 12)
    assert record["continuation"] == Words().decode(expected)


def test_records_are_json_and_say_of_what_and_how_long(records):
    assert json.loads(json.dumps(records)) == records
    assert len({r["start"] for r in records}) == 4
    for record in of(records, "full"):
        assert (record["text"], record["tokens"], record["generated_tokens"]) == ("words.txt", 59, 12)


@pytest.mark.parametrize(
    ("reference", "said", "equal", "exact"),
    [
        ([1, 2, 3, 4], [1, 2, 9, 4], 0.5, False),  # what is equal after the first difference does not count
        ([1, 2, 3, 4], [1, 2], 0.5, False),
        ([1, 2], [1, 2, 3, 4], 0.5, False),
        ([1], [2], 0, False),
        ([1, 2], [], 0, False),
        ([], [], 1, True),
    ],
)
def test_equal_leading_tokens_are_a_share_of_the_longer_continuation(reference, said, equal, exact):
    found = text.compare(Words(), reference, said)
    assert (found["equal_leading_tokens"], found["exact"]) == (equal, exact)


def test_bleu_and_rouge_are_those_worked_by_hand():
    # 5, 3, 1 of 6, 5, 4 n-grams are there, and none of 3, which sacrebleu smooths to a half of one.
    said, reference = "the cat sat on the mat", "the cat sat near the mat"
    assert text.bleu(said, reference) == pytest.approx((5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25)
    assert text.rouge_l(said, reference) == pytest.approx(5 / 6)
    assert text.rouge_l("the mat", reference) == pytest.approx(2 * 2 / 8)
    assert text.rouge_l(
        "\u043a\u043e\u0442 \u0438 \u0434\u043e\u043c", "\u043a\u043e\u0442 \u0438 \u043b\u0435\u0441"
    ) == pytest.approx(2 / 3)  # Cyrillic


def test_equal_texts_score_1_even_without_words():
    for same in ("", "。", "one"):
        assert text.bleu(same, same) == text.rouge_l(same, same) == 1
    assert text.bleu("", "one") == text.rouge_l("", "one") == 0


@pytest.mark.parametrize("name", ["sacrebleu", "rouge_score"])
def test_a_missing_library_is_found_out_before_the_model_runs(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"{name}.rouge_scorer", raising=False)
    with pytest.raises(MlxkvError, match=rf"{name}.*mlxkv\[eval\]"):
        text.Text(text.TextOptions()).samples(Words(), 0)


def test_what_cannot_be_continued_is_refused(text_file):
    with pytest.raises(InputError, match=r"words\.txt has 240 tokens and 241 are needed"):
        text.Text(text.TextOptions(text_file, context_tokens=241)).samples(Words(), 0)
    for wrong in ({"context_tokens": 1}, {"max_tokens": 0}, {"samples": 0}):
        with pytest.raises(InputError, match="or more, not"):
            text.TextOptions(**wrong)


def test_brevity_is_held_against_what_was_said_and_not_against_the_reference():
    longer, shorter = [*range(9)], [*range(5)]
    found = text.compare(Words(), longer, shorter)["bleu"]
    assert found == text.bleu(*map(Words().decode, (shorter, longer)))
    assert found != text.bleu(*map(Words().decode, (longer, shorter)))

"""How much of what a model writes stays the same: hand-worked cases, and tiny models with a method and without."""

import json
import sys

import pytest
from conftest import tiny_model, tiny_tokens

from mlxkv.errors import InputError, MlxkvError
from mlxkv.evaluate import text, variants


class Words:
    """A tokenizer of words such as w12."""

    eos_token_ids = ()

    def encode(self, text):
        return [int(word[1:]) for word in text.split()]

    def decode(self, tokens):
        return " ".join(f"w{token}" for token in tokens)


PROMPTS = [Words().decode(tiny_tokens(60, seed=seed)) for seed in range(4)]
MEASURES = ("bleu", "rouge_l", "equal_leading_tokens", "exact")


@pytest.fixture(scope="module")
def records():
    ways = [variants.live("full"), variants.live("sliding-window", window=6)]
    return text.evaluate(tiny_model("llama"), Words(), ways, PROMPTS, max_tokens=12)


def of(records, variant):
    return [record for record in records if record["variant"] == variant]


def test_the_untouched_cache_comes_first_and_a_full_one_writes_the_same(records):
    assert [record["variant"] for record in records[:3]] == ["whole", "full", "sliding-window (window=6)"]
    for record in of(records, "whole") + of(records, "full"):
        assert [record[measure] for measure in MEASURES] == [1, 1, 1, True]
    assert [r["text"] for r in of(records, "full")] == [r["text"] for r in of(records, "whole")]


def test_a_damaged_cache_is_told_by_every_measure(records):
    for measure in MEASURES:
        assert sum(record[measure] for record in of(records, "sliding-window (window=6)")) < 3, measure


def test_the_whole_cache_writes_what_the_model_does_without_any(records):
    prompt = Words().encode(PROMPTS[2])
    expected = variants.answer(tiny_model("llama"), Words(), variants.whole(), prompt[:20], prompt[20:], 12)
    assert of(records, "whole")[2]["text"] == Words().decode(expected)


def test_records_are_json_and_say_which_prompt_and_how_long(records):
    assert json.loads(json.dumps(records)) == records
    assert [(r["prompt"], r["prompt_tokens"], r["tokens"]) for r in of(records, "full")] == [
        (i, 60, 12) for i in range(4)
    ]


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


def test_equal_texts_score_1_even_without_words():
    for same in ("", "。", "one"):
        assert text.bleu(same, same) == text.rouge_l(same, same) == 1
    assert text.bleu("", "one") == text.rouge_l("", "one") == 0


def test_a_limit_draws_prompts_by_seed():
    model, ticks = tiny_model("llama"), []

    def drawn(seed):
        found = text.evaluate(model, Words(), [], PROMPTS, max_tokens=1, limit=2, seed=seed, progress=ticks.append)
        return [record["prompt"] for record in found]

    assert len(drawn(0)) == 2
    assert drawn(0) == drawn(0) == sorted(drawn(0))
    assert len({tuple(drawn(seed)) for seed in range(5)}) > 1
    assert ticks[:2] == [1, 1]


@pytest.mark.parametrize("name", ["sacrebleu", "rouge_score"])
def test_a_missing_library_is_found_out_before_the_model_runs(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"{name}.rouge_scorer", raising=False)
    with pytest.raises(MlxkvError, match=rf"{name}.*mlxkv\[eval\]"):
        text.evaluate(None, Words(), [], PROMPTS)


def test_what_cannot_be_continued_is_refused():
    with pytest.raises(InputError, match=r"too short: \[1\]"):
        text.evaluate(None, Words(), [], ["w1 w2", "w1"])
    with pytest.raises(InputError, match="not 0 and None"):
        text.evaluate(None, Words(), [], PROMPTS, max_tokens=0)
    with pytest.raises(InputError, match="not 128 and 0"):
        text.evaluate(None, Words(), [], PROMPTS, limit=0)

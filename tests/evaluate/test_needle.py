"""Needles: the key is where it should be, and a cache that lost it is told from one that has it."""

import mlx.core as mx
import numpy as np
import pytest
from damage import shuffled, zeroed

from mlxkv.errors import InputError
from mlxkv.evaluate.runner import run
from mlxkv.evaluate.sources import Sources
from mlxkv.evaluate.tasks import needle
from mlxkv.evaluate.variants import baseline, live_variant


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return smollm2[1]


@pytest.mark.parametrize("depth", [0, 0.3, 1])
def test_a_haystack_has_its_length_and_the_needle_at_its_depth(tokenizer, depth):
    tokens = needle.build_haystack(tokenizer, Sources(), 300, depth, "48213")
    hidden = needle.NEEDLE.format("48213")
    text = tokenizer.decode(tokens)
    assert len(tokens) == 300
    assert text.count(hidden) == 1
    before = tokenizer.encode(text[: text.index(hidden)])
    room = 300 - len(tokenizer.encode(hidden))
    assert len(before) == pytest.approx(depth * room, abs=2)


class WithFirst:
    """Another tokenizer with a first token of its own, and a blank before a text that it is given alone, as SentencePiece has."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def encode(self, text, add_special_tokens=True):
        return [1] * add_special_tokens + self.tokenizer.encode(f" {text}")


def test_a_needle_at_the_start_comes_after_the_tokenizers_first_token_and_without_a_blank(tokenizer):
    tokens = needle.build_haystack(WithFirst(tokenizer), Sources(), 300, 0, "48213")
    assert tokens[0] == 1
    assert tokenizer.decode(tokens[1:]).startswith(needle.NEEDLE.format("48213"))


def test_a_key_does_not_depend_on_how_its_depth_is_written():
    assert needle.draw_key(100, 0, 0) == needle.draw_key(100, 0.0, 0)


def test_a_text_longer_than_the_essays_begins_again(tokenizer):
    assert len(needle.build_haystack(tokenizer, Sources(), 5000, 0.5, "48213")) == 5000


def test_digits_are_scored_as_one_pass_over_all_of_the_text_scores_them(smollm2):
    model, tokenizer = smollm2
    context = needle.build_haystack(tokenizer, Sources(), 80, 0.5, "48213")
    found = needle.score_digits(model, tokenizer, baseline().build(model, context).cache, "48213")
    asked = tokenizer.encode(needle.QUESTION + "48213")
    logits = np.array(model(mx.array([[*context, *asked]]))[0, -6:-1].astype(mx.float32))
    right = np.array(asked[-5:])
    chances = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    assert found["digits_first"] == pytest.approx((logits.argmax(axis=-1) == right).mean())
    assert found["log_probability"] == pytest.approx(chances[range(5), right].mean(), abs=1e-3)


def test_a_cache_without_the_needle_scores_worse_and_the_full_one_as_the_whole(smollm2):
    model, tokenizer = smollm2
    variants = [live_variant("full"), shuffled(), zeroed()]
    rows = run("needle", model, tokenizer, variants, needle.NeedleOptions((100,), (0.2,)))["samples"]
    scores = {row["variant"]: row for row in rows}
    assert scores["full"]["log_probability"] == pytest.approx(scores["whole"]["log_probability"], abs=1e-3)
    assert scores["whole"]["found"]
    for name in ("shuffled keys", "half zeroed"):
        assert not scores[name]["found"]
        assert scores[name]["log_probability"] < scores["whole"]["log_probability"] - 1
    assert len({row["key"] for row in rows}) == 1


def test_keys_follow_from_seed_length_and_depth(smollm2):
    def keys(seed):
        return [
            unit.key["key"] for unit in needle.Needle(needle.NeedleOptions((60, 70), (0, 1))).samples(smollm2[1], seed)
        ]

    assert keys(0) == keys(0) != keys(1)
    assert len(set(keys(0))) == 4


@pytest.mark.parametrize(
    ("lengths", "depths"), [((60,), (1.1,)), ((60,), (-0.1,)), ((), (0.5,)), ((0,), (0.5,)), ((60,), ())]
)
def test_impossible_places_are_refused(lengths, depths):
    with pytest.raises(InputError, match=r"lengths must be|depths must lie"):
        needle.NeedleOptions(lengths, depths)


def test_a_length_has_room_for_the_needle(smollm2):
    with pytest.raises(InputError, match="no room for a needle"):
        needle.Needle(needle.NeedleOptions((10,), (0.5,))).samples(smollm2[1], 0)


def test_a_sample_holds_the_length_and_the_key_at_the_depth_that_it_says(tokenizer):
    for unit in needle.Needle(needle.NeedleOptions((80, 120), (0, 1))).samples(tokenizer, 0):
        context, key = unit.measure.args
        before, after = tokenizer.decode(context).split(key)
        assert (len(context), key) == (unit.key["length"], unit.key["key"])
        assert (len(before) < len(after)) == (unit.key["depth"] == 0)

"""Memory and latency records: of the caches that were asked for, against the untouched one."""

import dataclasses
import time

import mlx.core as mx
import pytest
from conftest import tiny_model

from mlxkv.errors import InputError
from mlxkv.evaluate import texts
from mlxkv.evaluate.runner import run
from mlxkv.evaluate.tasks import latency, memory
from mlxkv.evaluate.variants import Variant, baseline, live_variant
from mlxkv.live.arrays import iter_arrays

pytestmark = pytest.mark.slow


class Words:
    """As much of a tokenizer as is needed: a token a word."""

    def encode(self, text):
        return [sum(map(ord, word)) % 97 for word in text.split()]


def held(length, *variants, model=None):
    """Memory records by variant."""
    model = model or tiny_model("llama", head_dim=64)
    samples = run("memory", model, Words(), variants, memory.MemoryOptions(lengths=(length,)))["samples"]
    return {sample["variant"]: sample for sample in samples}


def spoilt(variant, damage):
    """A variant whose caches have all been damaged."""

    def hold(model, tokens, exact=None):
        result = variant.build(model, tokens)
        for entry in result.cache:
            damage(entry)
        return result

    return dataclasses.replace(variant, name="spoilt", build=hold)


def test_a_smaller_cache_takes_less_and_what_it_says():
    rows = held(800, live_variant("full"), live_variant("int8"), live_variant("sliding-window", recent=50))
    whole, full, int8, window = rows.values()
    assert full["fp16_bytes"] == 800 * 2 * 2 * 2 * 64 * 2
    for row in rows.values():
        assert row["resident_bytes"] == pytest.approx(row["cache_bytes"], rel=0.05, abs=64e3)
    assert window["resident_bytes"] < int8["resident_bytes"] < full["resident_bytes"]
    assert whole["cache_bytes"] == full["cache_bytes"]
    assert int8["cache_bytes"] < 0.7 * int8["fp16_bytes"]
    assert full["decode_peak_bytes"] > 0
    assert full["prefill_peak_bytes"] > full["resident_bytes"]


def test_a_method_that_keeps_copies_is_found_out():
    def hoard(entry):
        entry.hoard = [mx.concatenate([part, part]) for part in iter_arrays(entry.state)]
        mx.eval(entry.hoard)

    rows = held(400, live_variant("int8"), spoilt(live_variant("int8"), hoard))
    fair, greedy = rows["int8"], rows["spoilt"]
    assert greedy["cache_bytes"] == fair["cache_bytes"]
    assert greedy["resident_bytes"] == pytest.approx(3 * fair["resident_bytes"], rel=0.05)


def test_memory_of_a_hybrid_model_shows_the_convolutions_state():
    row = held(60, model=tiny_model("lfm2"))["whole"]
    # Layers x slots x a step of tokens x heads x dims, and two tokens of 64 dims of each of two convolutions; float32.
    assert row["cache_bytes"] == 2 * 2 * 256 * 2 * 16 * 4 + 2 * 2 * 64 * 4
    # Each of two convolutions has 62 tokens of 64 dims, of which its state is a view; a layer's keys have 32 KiB.
    assert 0 < row["resident_bytes"] - row["cache_bytes"] < 60e3


def test_lengths_longer_than_the_text_begin_it_again():
    tokens = texts.repeated_tokens(Words(), None, 3000)
    assert len(tokens) == 3000
    period = next(n for n in range(1000, 3000) if tokens[n:] == tokens[:-n])
    assert tokens != texts.repeated_tokens(Words(), None, 3000, seed=1)
    assert (
        texts.repeated_tokens(Words(), None, 3000, seed=1)[: period - 3000 % period] == tokens[3000 % period : period]
    )


def test_latency_compares_every_variant_with_the_first_in_the_same_rounds():
    options = latency.LatencyOptions(context_tokens=55, tokens=5, rounds=3)
    model = tiny_model("llama")
    rows = run("latency", model, Words(), [live_variant("int8"), spoilt(baseline(), slow)], options)["samples"]
    assert [row["variant"] for row in rows] == ["whole", "int8", "spoilt"]
    assert (rows[0]["decode_relative"], rows[0]["prefill_relative"]) == (1, 1)
    assert all([len(part) for part in row["seconds"]] == [5, 5, 5] for row in rows)
    for row in rows[1:]:
        ratios = sorted(sum(a) / sum(b) for a, b in zip(rows[0]["seconds"], row["seconds"]))
        assert row["decode_relative"] == pytest.approx(ratios[1])
        assert 0 < row["token_seconds"] <= row["slowest_token_seconds"]
        assert row["decode_peak_bytes"] > 0
    assert rows[2]["decode_relative"] < 0.5
    assert rows[2]["token_seconds"] > 0.02


def slow(entry):
    """A cache that takes a hundredth of a second more for every chunk."""
    fetch = entry.update_and_fetch

    def late(keys, values):
        time.sleep(0.01)
        return fetch(keys, values)

    entry.update_and_fetch = late


def test_seeds_of_latency_have_texts_of_their_own():
    (first,), (second,) = (latency.Latency(latency.LatencyOptions()).samples(Words(), seed) for seed in (0, 1))
    assert first.key == {"text": "built-in", "seed": 0}
    assert first.measure.args[0] != second.measure.args[0]


@pytest.mark.parametrize(
    "options",
    [
        (memory.MemoryOptions, {"lengths": (0,)}),
        (memory.MemoryOptions, {"lengths": ()}),
        (latency.LatencyOptions, {"tokens": 0}),
        (latency.LatencyOptions, {"rounds": 0}),
    ],
)
def test_impossible_options_are_refused(options):
    options_class, values = options
    with pytest.raises(InputError, match=next(iter(values))):
        options_class(**values)


def test_decoding_a_token_takes_little_beside_what_is_held():
    for row in held(800, live_variant("full")).values():
        assert 0 < row["decode_peak_bytes"] < row["resident_bytes"] / 10


def test_a_slow_prefill_is_told():
    def hold(model, tokens, exact=None):
        time.sleep(0.3)
        return baseline().build(model, tokens)

    options = latency.LatencyOptions(context_tokens=20, tokens=1, rounds=1)
    _, late = run("latency", tiny_model("llama"), Words(), [Variant("late", {}, hold)], options)["samples"]
    assert late["prefill_seconds"] > 0.3
    assert late["prefill_relative"] < 0.8

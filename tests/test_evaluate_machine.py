"""Memory and latency records: of the caches that were asked for, against the first of them."""

import pytest
from conftest import tiny_model, tiny_tokens

from mlxkv.errors import InputError
from mlxkv.evaluate import latency, memory
from mlxkv.evaluate.variants import live, whole

TOKENS = tiny_tokens(900)


def test_a_smaller_cache_takes_less_and_what_it_says():
    model = tiny_model("llama", head_dim=64)
    variants = [live("full"), live("int8"), live("sliding-window", window=50)]
    full, int8, window = memory.evaluate(model, variants, TOKENS, [800])
    assert full["fp16_bytes"] == 800 * 2 * 2 * 2 * 64 * 2
    for row in (full, int8, window):
        assert row["resident_bytes"] == pytest.approx(row["cache_bytes"], rel=0.05, abs=64e3)
    assert window["resident_bytes"] < int8["resident_bytes"] < full["resident_bytes"]
    assert int8["cache_bytes"] < 0.7 * int8["fp16_bytes"]
    assert full["decode_peak_bytes"] > 0


def test_memory_of_a_hybrid_model_counts_the_convolutions_state():
    (row,) = memory.evaluate(tiny_model("lfm2"), [whole()], TOKENS, [60])
    assert row["cache_bytes"] > row["fp16_bytes"]  # float32, in steps of 256 tokens


@pytest.mark.parametrize("lengths", [[900], [0], [10, 901]])
def test_memory_needs_a_token_after_every_length(lengths):
    with pytest.raises(InputError, match="for 900 tokens"):
        memory.evaluate(tiny_model("llama"), [whole()], TOKENS, lengths)


def test_latency_compares_every_variant_with_the_first_in_the_same_rounds():
    told = []
    rows = latency.evaluate(
        tiny_model("llama"), [whole(), live("int8")], TOKENS[:70], 55, rounds=3, progress=told.append
    )
    assert [row["variant"] for row in rows] == ["whole", "int8"]
    assert (rows[0]["decode_relative"], rows[0]["prefill_relative"]) == (1, 1)
    assert all(len(part) == 5 for row in rows for part in row["seconds"])
    assert len(rows[1]["seconds"]) == 3
    assert rows[1]["decode_relative"] == pytest.approx(
        sorted(sum(a) / sum(b) for a, b in zip(rows[0]["seconds"], rows[1]["seconds"]))[1]
    )
    assert 0 < rows[1]["token_seconds"] <= rows[1]["slowest_token_seconds"]
    assert sum(told) == 2 + 3 * 2


def test_latency_needs_tokens_to_decode():
    with pytest.raises(InputError, match="too few"):
        latency.evaluate(tiny_model("llama"), [whole()], TOKENS[:52], 50, rounds=3)

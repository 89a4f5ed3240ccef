import mlx.core as mx
import pytest
from conftest import tiny_model, tiny_tokens

from mlxkv import lm, make_cache
from mlxkv.errors import PresetError
from mlxkv.evaluate import fidelity, live


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def start(llama):
    return fidelity.prefix(llama, tiny_tokens(340), 300, predict=30)


def test_the_whole_cache_kept_live_changes_nothing(tiny):
    record = live.evaluate(tiny, "full", fidelity.prefix(tiny, tiny_tokens(80), 60, predict=15))
    assert record["kl"] == pytest.approx(0, abs=1e-5)
    assert record["top1_agreement"] == 1
    assert record["perplexity_delta"] == pytest.approx(0, abs=1e-2)


def test_fewer_bits_and_fewer_tokens_are_noticed_more(llama, start):
    kl = {name: live.evaluate(llama, name, start)["kl"] for name in ("int8", "int4", "kivi-2")}
    assert 0 < kl["int8"] < kl["int4"] < kl["kivi-2"]
    wide, narrow = (live.evaluate(llama, "sliding-window", start, window=window)["kl"] for window in (250, 20))
    assert 0 < wide < narrow


def test_what_follows_goes_in_token_by_token(llama, start):
    def prefilled():
        cache = make_cache(llama, "sliding-window", window=5)
        lm.prefill(llama, start.dump.tokens[0].tolist(), cache)
        return cache

    apart, cache = [], prefilled()
    for token in start.following[:-1]:
        apart.append(llama(mx.array([[token]]), cache=cache)[0])
    # In one chunk they would see each other as they are, whatever the method does to them.
    together = fidelity.continue_with(llama, prefilled(), start.following)
    expected, other = (
        fidelity.compare(start.logits, x, start.following)["kl"] for x in (mx.concatenate(apart), together)
    )
    assert live.evaluate(llama, "sliding-window", start, window=5)["kl"] == pytest.approx(expected)
    assert expected != pytest.approx(other, rel=0.01)


def test_sizes_are_those_of_the_arrays_held_against_two_bytes_an_element(llama, start):
    record = live.evaluate(llama, "sliding-window", start, window=110)
    a_token = 2 * 2 * 2 * 8 * 2  # layers, slots, heads, dims, bytes
    assert record["tokens"] == 330
    assert record["fp16_bytes"] == 330 * a_token
    assert record["cache_bytes"] == 110 * a_token
    assert record["ratio"] == 3


@pytest.mark.parametrize("name", ["lfm2", "glm4_moe_lite"])
def test_sizes_count_attention_layers_and_both_slots_alone(name):
    model = tiny_model(name)
    record = live.evaluate(model, "streaming-llm", fidelity.prefix(model, tiny_tokens(80), 60, predict=15), window=21)
    elements = {"lfm2": 2 * 2 * 2 * 16, "glm4_moe_lite": 3 * (16 + 8)}[name]
    assert record["fp16_bytes"] == 2 * 75 * elements
    assert record["ratio"] == 3


def test_a_record_says_what_it_is_of(llama, start):
    record = live.evaluate(llama, "h2o-256", start, recent=3)
    assert record["cache"] == "h2o-256"
    assert record["settings"] == {"heavy": 128, "recent": 3}
    assert (record["prefix_tokens"], record["predicted_tokens"]) == (300, 30)
    assert record["prefill_seconds"] > 0 < record["decode_seconds"]


def test_a_codec_is_no_live_cache(llama, start):
    with pytest.raises(PresetError, match="not a live method"):
        live.evaluate(llama, "kvtc-16", start)

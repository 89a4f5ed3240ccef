"""What is evaluated: every way to hold a context answers as the same steps by hand do."""

from dataclasses import replace

import mlx.core as mx
import pytest
from conftest import tiny_model, tiny_tokens
from mlx_lm.models.cache import make_prompt_cache
from synthetic import PLAIN, toy_dump

from mlxkv import CacheCodec, calibrate, lm, write_dump
from mlxkv.codec.methods.kvtc import KVTCConfig
from mlxkv.errors import InputError
from mlxkv.evaluate import variants

CONTEXT, QUESTION = tiny_tokens(90), tiny_tokens(5, seed=1)


class Ends:
    """As much of a tokenizer as answering needs."""

    def __init__(self, *ends):
        self.eos_token_ids = set(ends)


def greedy(model, tokens, count):
    said = []
    for _ in range(count):
        said.append(int(mx.argmax(model(mx.array([[*tokens, *said]]))[0, -1])))
    return said


@pytest.mark.parametrize("architecture", ["llama", "lfm2", "glm4_moe_lite"])
def test_whole_and_full_caches_say_what_the_model_says_without_any(architecture):
    model = tiny_model(architecture)
    expected = greedy(model, CONTEXT + QUESTION, 6)
    for variant in (variants.baseline(), variants.live_variant("full")):
        assert variants.generate_answer(model, Ends(), variant.build(model, CONTEXT), QUESTION, 6) == expected


def test_an_end_of_text_token_ends_the_answer_and_is_not_in_it():
    model = tiny_model("llama")
    said = greedy(model, CONTEXT + QUESTION, 6)
    end = said[3]
    held = variants.baseline().build(model, CONTEXT)
    assert variants.generate_answer(model, Ends(end), held, QUESTION, 6) == said[: said.index(end)]


def test_the_question_is_asked_after_the_context_was_made_small():
    model = tiny_model("llama")
    cache = variants.live_variant("sliding-window", recent=10).build(model, CONTEXT).cache
    assert [(entry.offset, entry.kept) for entry in cache] == [(90, 10)] * len(cache)


def test_a_codec_holds_what_compressing_and_restoring_gives(tmp_path):
    model = tiny_model("llama")
    dump = lm.dump(model, tiny_tokens(400, seed=2))
    write_dump(tmp_path / "c.npz", dump)
    codec = CacheCodec(calibrate([tmp_path / "c.npz"], KVTCConfig(4)), recent=16)
    stock = make_prompt_cache(model)
    lm.prefill(model, CONTEXT, stock)
    coded = variants.codec_variant(codec, "kvtc-4").build(model, CONTEXT)
    begun = variants.codec_variant(codec, "kvtc-4").build(model, CONTEXT, variants.CachedContext(stock, {}))
    held = coded.cache
    assert mx.array_equal(begun.cache[0].keys_and_values()[0], held[0].keys_and_values()[0])
    assert stock[0].offset == 90
    assert coded.sizes["tokens"] == 90
    assert coded.sizes["fp16_bytes"] / coded.sizes["cache_bytes"] == coded.sizes["ratio"]
    assert coded.details["file_bytes"] == coded.sizes["cache_bytes"]
    keys, exact = held[0].keys_and_values()[0], stock[0].keys_and_values()[0]
    assert held[0].offset == 90
    assert mx.array_equal(keys[..., -16:, :], exact[..., -16:, :])
    assert not mx.allclose(keys, exact, atol=1e-4)


@pytest.mark.parametrize("needs_baseline", [False, True])
def test_one_prefill_serves_the_whole_cache_and_what_begins_with_it(needs_baseline):
    model, given = tiny_model("lfm2"), []

    def hold(model, tokens, exact=None):
        given.append(exact)
        return variants.baseline().build(model, tokens)

    other = variants.Variant("other", {}, hold, needs_baseline)
    for _, held in variants.iter_variants(model, [variants.baseline(), other], CONTEXT):
        variants.generate_answer(model, Ends(), held, QUESTION, 3)
    if needs_baseline:
        cache = given[0].cache
        assert [entry.offset for entry in cache if hasattr(entry, "offset")] == [90, 90]
        said = variants.generate_answer(model, Ends(), given[0], QUESTION, 6)
        assert said == greedy(model, CONTEXT + QUESTION, 6)
    else:
        assert given == [None]


def test_names_say_what_was_changed():
    assert variants.live_variant("h2o", heavy=3).name == "h2o (heavy=3)"
    assert variants.live_variant("int8").name == "int8"
    assert variants.live_variant("h2o", heavy=3).settings == {"cache": "h2o", "heavy": 3, "recent": 256}


def test_nothing_to_hold_or_to_ask_is_refused():
    model = tiny_model("llama")
    with pytest.raises(InputError, match="a question of 1 token"):
        variants.generate_answer(model, Ends(), variants.baseline().build(model, CONTEXT), [], 4)
    with pytest.raises(InputError, match="a context of 1 token"):
        next(variants.iter_variants(model, [variants.baseline()], []))


def test_sizes_are_those_of_the_arrays_held_against_two_bytes_an_element():
    held = variants.live_variant("sliding-window", recent=30).build(tiny_model("llama"), CONTEXT).sizes
    a_token = 2 * 2 * 2 * 8 * 2  # layers, slots, heads, dims, bytes
    assert held == {"tokens": 90, "fp16_bytes": 90 * a_token, "cache_bytes": 30 * a_token, "ratio": 3}


@pytest.mark.parametrize("name", ["lfm2", "glm4_moe_lite"])
def test_sizes_count_both_slots_and_the_states_of_other_layers(name):
    sizes = variants.live_variant("streaming-llm", sinks=4, recent=26).build(tiny_model(name), CONTEXT).sizes
    elements = {"lfm2": 2 * 2 * 2 * 16, "glm4_moe_lite": 3 * (16 + 8)}[name]
    states = {"lfm2": 2 * 2 * 64, "glm4_moe_lite": 0}[name]  # two convolutions keep two tokens each, float32
    assert sizes["fp16_bytes"] == 2 * (90 * elements + states)
    assert sizes["cache_bytes"] == 2 * 30 * elements + 4 * states


WINDOW, ROW = 16, 2 * 2 * 8  # tokens; slots, heads, dims


@pytest.mark.parametrize("length", [10, 90])
@pytest.mark.parametrize("method", ["whole", "full", "sliding-window"])
def test_sizes_count_the_windows_that_a_method_leaves_to_mlx_lm(method, length):
    model = tiny_model("llama", layer_types=["sliding_attention", "full_attention"], sliding_window=WINDOW)
    variant = variants.baseline() if method == "whole" else variants.live_variant(method)
    cached = variant.build(model, CONTEXT[:length])
    window, other = cached.cache
    assert type(window).__name__ == "RotatingKVCache"
    assert cached.sizes["cache_bytes"] == window.nbytes + other.nbytes
    kept = window.keys.shape[2]
    assert cached.sizes["fp16_bytes"] == 2 * ROW * (length + min(length, kept))
    assert cached.sizes["tokens"] == length


@pytest.mark.parametrize("name", ["llama", "lfm2"])
def test_a_codec_is_held_against_the_same_bytes_as_a_live_cache(name, tmp_path):
    model = tiny_model(name)
    write_dump(tmp_path / "a.npz", lm.dump(model, tiny_tokens(300, seed=2)))
    codec = CacheCodec(calibrate([tmp_path / "a.npz"], KVTCConfig(4)), recent=16)
    coded = variants.codec_variant(codec, "kvtc").build(model, CONTEXT).sizes
    live = variants.live_variant("int8").build(model, CONTEXT).sizes
    assert coded["fp16_bytes"] == live["fp16_bytes"]
    assert coded["ratio"] == coded["fp16_bytes"] / coded["cache_bytes"]


def test_a_question_has_the_tokens_that_it_has_after_its_context():
    class Pairs:
        """Two letters a token, with a first token and a blank before every text."""

        def encode(self, text):
            text = f" {text}"
            return ["first", *(text[i : i + 2] for i in range(0, len(text), 2))]

    assert variants.split_tokens(Pairs(), "abc", "def") == (["first", " a", "bc"], ["de", "f"])
    assert variants.split_tokens(Pairs(), "abcd", "ef") == (["first", " a", "bc"], ["de", "f"])
    assert variants.split_tokens(Pairs(), "abc", "") == (["first", " a", "bc"], [])


def test_errors_are_of_the_coded_tokens_alone():
    dump = toy_dump(PLAIN, length=60)
    decoded = replace(dump, k=dump.k.copy(), v=dump.v.copy())
    decoded.k[..., :4, :] = decoded.v[..., -16:, :] = 9
    found = variants.coding_errors({"sinks": 4, "recent": 16, "tokens": 60}, dump, decoded)
    assert found["k_relative_error"] == found["v_relative_error"] == 0

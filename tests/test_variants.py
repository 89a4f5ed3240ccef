"""What is evaluated: every way to hold a context answers as the same steps by hand do."""

import mlx.core as mx
import pytest
from conftest import tiny_model, tiny_tokens
from mlx_lm.models.cache import make_prompt_cache

from mlxkv import KVTCCacheCodec, calibrate, lm, write_dump
from mlxkv.codec.kvtc import Settings
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
    for variant in (variants.whole(), variants.live("full")):
        assert variants.answer(model, Ends(), variant, CONTEXT, QUESTION, 6) == expected


def test_an_end_of_text_token_ends_the_answer_and_is_not_in_it():
    model = tiny_model("llama")
    said = greedy(model, CONTEXT + QUESTION, 6)
    end = said[3]
    assert variants.answer(model, Ends(end), variants.whole(), CONTEXT, QUESTION, 6) == said[: said.index(end)]


def test_the_question_is_asked_after_the_context_was_made_small():
    model = tiny_model("llama")
    cache = variants.live("sliding-window", window=10).hold(model, CONTEXT)
    assert [(entry.offset, entry.kept) for entry in cache] == [(90, 10)] * len(cache)


def test_a_codec_holds_what_compressing_and_restoring_gives(tmp_path):
    model = tiny_model("llama")
    dump = lm.dump(model, tiny_tokens(400, seed=2))
    write_dump(tmp_path / "c.npz", dump)
    codec = KVTCCacheCodec(calibrate([tmp_path / "c.npz"], Settings(4)), w=16)
    held = variants.coded(codec, "kvtc-4").hold(model, CONTEXT)
    stock = make_prompt_cache(model)
    lm.prefill(model, CONTEXT, stock)
    keys, exact = held[0].keys_and_values()[0], stock[0].keys_and_values()[0]
    assert held[0].offset == 90
    assert mx.array_equal(keys[..., -16:, :], exact[..., -16:, :])
    assert not mx.allclose(keys, exact, atol=1e-4)


def test_the_untouched_cache_comes_first_and_once():
    names = [v.name for v in variants.beside_whole([variants.live("int8"), variants.whole()])]
    assert names == ["whole", "int8"]


def test_names_say_what_was_changed():
    assert variants.live("h2o", heavy=3).name == "h2o (heavy=3)"
    assert variants.live("int8").name == "int8"


def test_nothing_to_ask_is_refused():
    with pytest.raises(InputError, match="90 and 0"):
        variants.answer(tiny_model("llama"), Ends(), variants.whole(), CONTEXT, [], 4)

"""Any kind of cache file made into any other: a model goes on from both alike, or the reason why not is said."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import DIFFERENT, tiny_model, tiny_tokens
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache, save_prompt_cache
from prompt_cache_models import FILES, FOLDER, exact_model, next_logits, tokens_of
from zoo.build import build

from mlxkv import conversion, lm, make_cache, save_cache, stock
from mlxkv.conversion import COMPRESSED, DUMP, LIVE, OLD_PROMPT, PROMPT, read_content, write_content
from mlxkv.dump import read_dump, write_dump
from mlxkv.errors import FormatError, InputError, MismatchError, UnsupportedError
from mlxkv.live import live_methods
from mlxkv.live.base import LayerCache
from mlxkv.live.prompt_files import write_prompt_cache
from mlxkv.live.serialization import load_cache

VERSIONS = ("0.31.3", "0.32.2")
QUANTIZED = ("quantized-8", "quantized-4")
WHOLE = [name for name in FILES if name not in (*QUANTIZED, "rotating-wrapped")]
LLAMA = tiny_model("llama")


def original(name, version="0.32.2"):
    """The content of a file that mlx-lm wrote, its tokens known."""
    model = exact_model(FILES[name][0])
    content = read_content(FOLDER / version / f"{name}.safetensors", PROMPT, model)
    content.tokens = tokens_of(name)
    return model, content


def converted(content, model, kind, path, **more):
    """The content of a file of another kind."""
    if kind == COMPRESSED:
        more["codec"] = conversion.codec_for(content, "exact", model=model)
    write_content(path, kind, content, model, **more)
    return read_content(path, PROMPT if kind == OLD_PROMPT else kind, model)


def said(content, model):
    return next_logits(model, conversion._as_cache(content, model))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", [DUMP, COMPRESSED, LIVE])
@pytest.mark.parametrize("name", WHOLE)
def test_a_model_goes_on_from_an_exact_kind_bit_for_bit_and_back(name, kind, version, tmp_path):
    model, content = original(name, version)
    expected = said(original(name, version)[1], model)
    there = converted(content, model, kind, tmp_path / "a")
    there.tokens = there.tokens or tokens_of(name)
    back = converted(there, model, PROMPT, tmp_path / "b")
    assert mx.array_equal(said(read_content(tmp_path / "a", kind, model), model), expected)
    assert back.tokens == tokens_of(name)
    first, last = (stock.entries(each.cache) for each in (original(name, version)[1], back))
    if "rotating" not in name:  # in place of whose ring there is a cache of all tokens now
        for one, other in zip(first, last):
            assert str(stock.state_parts(one)) == str(stock.state_parts(other))
    assert mx.array_equal(said(back, model), expected)


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("version", VERSIONS)
def test_quantized_values_come_along_as_they_are(name, version, tmp_path):
    model, expected = exact_model("wide"), said(*reversed(original(name, version)))
    found = [
        said(converted(original(name, version)[1], model, kind, tmp_path / kind), model)
        for kind in (DUMP, COMPRESSED, LIVE)
    ]
    assert mx.array_equal(found[0], found[1])
    assert mx.array_equal(found[0], found[2])
    # Tokens that follow are not quantized.
    assert mx.allclose(found[0], expected, atol=0.02 if name == "quantized-8" else 0.5)
    again = converted(original(name, version)[1], model, PROMPT, tmp_path / "q")
    assert mx.array_equal(said(again, model), expected)


@pytest.mark.parametrize("kind", [DUMP, COMPRESSED, LIVE])
def test_a_cache_that_gave_tokens_up_is_refused_where_all_are_needed(kind, tmp_path):
    model, content = original("rotating-wrapped")
    with pytest.raises(UnsupportedError, match="given up 6 of 22 tokens"):
        converted(content, model, kind, tmp_path / "a")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("kind", [PROMPT, OLD_PROMPT])
@pytest.mark.parametrize("name", ["rotating-wrapped", "quantized-4", "window-wrapped", "recurrences", "latents"])
def test_layouts_of_mlx_lm_are_made_into_each_other_as_they_are(name, kind, tmp_path):
    model, content = original(name, VERSIONS[kind == PROMPT])
    found = converted(content, model, kind, tmp_path / "a")
    assert found.texts["model"] == f"exact/{FILES[name][0]}"
    assert mx.array_equal(said(found, model), said(original(name)[1], model))


@pytest.mark.parametrize("architecture", DIFFERENT)
@pytest.mark.parametrize("method", ["int8", "int4", "kivi-4"])
def test_what_a_packing_method_holds_comes_out_of_it_unchanged(method, architecture, tmp_path):
    model, tokens = tiny_model(architecture), tiny_tokens(150)
    cache = make_cache(model, method)
    for chunk in (tokens[:100], tokens[100:]):
        mx.eval(model(mx.array([chunk]), cache=cache))
    save_cache(tmp_path / "a", model, cache)
    content = read_content(tmp_path / "a", LIVE, model)
    content.tokens = tokens
    found = converted(content, model, DUMP, tmp_path / "b")
    expected = next_logits(model, cache)
    assert found.dump.dtype == "float32"  # in which the model goes on
    assert mx.allclose(said(found, model), expected, atol=2e-2 * mx.abs(expected).max().item())


@pytest.mark.parametrize("method", ["int8", "int4", "kivi-4", "streaming-llm-96"])
@pytest.mark.parametrize("name", ["window", "window-wrapped", "convolutions", "recurrences", "latents"])
def test_a_live_cache_made_of_another_goes_on_and_is_saved_again(name, method, tmp_path):
    model, content = original(name)
    if name == "latents" and method == "streaming-llm-96":
        with pytest.raises(UnsupportedError):
            converted(content, model, LIVE, tmp_path / "a", method=method)
        return
    found = converted(content, model, LIVE, tmp_path / "a", method=method)
    live = [entry for entry in stock.entries(found.cache) if isinstance(entry, LayerCache)]
    assert {(entry.method_name, entry.offset) for entry in live} == {(live[0].method_name, len(tokens_of(name)))}
    expected = said(original(name)[1], model)
    assert mx.allclose(said(found, model), expected, atol=0.02)
    save_cache(tmp_path / "b", model, found.cache)
    load_cache(tmp_path / "b", model)


@pytest.mark.parametrize("method", ["int8", "int4", "kivi"])
@pytest.mark.parametrize("length", [150, 70, 71, 7])
def test_packed_windows_begin_where_reading_the_text_would_have_left_them(method, length, tmp_path):
    model = tiny_model("llama", layer_types=["sliding_attention", "full_attention"], sliding_window=8)
    tokens, cache = tiny_tokens(length), make_prompt_cache(model)
    mx.eval(model(mx.array([tokens]), cache=cache))
    write_prompt_cache(tmp_path / "a", model, cache)
    found = converted(read_content(tmp_path / "a", PROMPT, model), model, LIVE, tmp_path / "b", method=method)
    read = make_cache(model, method)
    mx.eval(model(mx.array([tokens]), cache=read))
    assert [entry.kept for entry in found.cache] == [entry.kept for entry in read]
    expected = next_logits(model, read)
    assert mx.allclose(next_logits(model, found.cache), expected, atol=0.05 * mx.abs(expected).max().item())
    back = conversion.plain_cache(model, found.cache)
    assert isinstance(back[0], RotatingKVCache)
    assert mx.isfinite(next_logits(model, back)).all()


@pytest.mark.parametrize(
    "method", [name for name in live_methods.names() if name not in ("full", "int8", "int4", "kivi")]
)
def test_methods_that_go_by_attention_or_give_tokens_up_say_why_not(method, tmp_path):
    content = conversion.Content(cache=make_prompt_cache(LLAMA), tokens=tiny_tokens(300))
    mx.eval(LLAMA(mx.array([content.tokens]), cache=content.cache))
    live = make_cache(LLAMA, method)
    if live[0].observation_window:
        with pytest.raises(UnsupportedError, match="goes by the attention"):
            write_content(tmp_path / "a", LIVE, content, LLAMA, method=method)
    for start in (0, 150):
        mx.eval(LLAMA(mx.array([content.tokens[start : start + 150]]), cache=live))
    save_cache(tmp_path / "b", LLAMA, live)
    for kind in (DUMP, PROMPT):
        held = read_content(tmp_path / "b", LIVE, LLAMA)
        held.tokens = content.tokens
        if method in ("sliding-window", "streaming-llm", "random"):  # whose defaults have room for them
            assert read_content_length(held, kind, tmp_path) == 300
            continue
        with pytest.raises(UnsupportedError, match="gives tokens up, merges or sorts them"):
            write_content(tmp_path / "c", kind, held, LLAMA)


def read_content_length(content, kind, folder):
    write_content(folder / "c", kind, content, LLAMA)
    return read_content(folder / "c", kind, LLAMA).length


def test_tokens_are_asked_for_where_a_file_lacks_them(tmp_path):
    model, content = original("whole")
    content.tokens = None
    with pytest.raises(InputError, match="tokens of this cache are not known"):
        write_content(tmp_path / "a", DUMP, content, model)
    content.tokens = [1, 2]
    with pytest.raises(MismatchError, match="holds 21 tokens, but 2 were given"):
        write_content(tmp_path / "a", DUMP, content, model)


def test_a_batch_of_texts_becomes_no_cache_of_one(tmp_path):
    cache = make_prompt_cache(LLAMA)
    mx.eval(LLAMA(mx.array([[1, 2, 3], [4, 5, 6]]), cache=cache))
    spec = conversion.cache_spec(LLAMA)
    dump = lm.extract_cache(cache, spec, [[1, 2, 3], [4, 5, 6]], fingerprint=lm.fingerprint(LLAMA))
    for kind in (LIVE, PROMPT, OLD_PROMPT):
        with pytest.raises(UnsupportedError, match="2 texts"):
            write_content(tmp_path / "a", kind, conversion.Content(dump), LLAMA)


def test_dumps_and_compressed_caches_need_no_model(tmp_path):
    dump = lm.dump(LLAMA, tiny_tokens(40), name="tiny")
    write_dump(tmp_path / "a", dump)
    content = read_content(tmp_path / "a", DUMP)
    codec = conversion.codec_for(content, "exact")
    write_content(tmp_path / "b", COMPRESSED, content, codec=codec)
    write_content(tmp_path / "c", DUMP, read_content(tmp_path / "b", COMPRESSED))
    found = read_dump(tmp_path / "c")
    assert np.array_equal(found.k, dump.k)
    assert (found.model, found.fingerprint) == ("tiny", dump.fingerprint)


@pytest.mark.parametrize("architecture", [*DIFFERENT, "window"])
def test_another_text_of_as_many_tokens_is_noticed(architecture):
    window = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    model = tiny_model("llama", **window) if architecture == "window" else tiny_model(architecture)
    for method in ("full", "int8", "kivi"):
        content = conversion.Content(cache=make_cache(model, method))
        mx.eval(model(mx.array([tiny_tokens(200)]), cache=content.cache))
        assert conversion.begins_with(content, model, tiny_tokens(200))
        assert not conversion.begins_with(content, model, tiny_tokens(200, seed=2))


@pytest.mark.parametrize("method", ["full", "int8", "int4", "kivi"])
@pytest.mark.parametrize(
    ("architecture", "noticed"),
    [("llama", (3, 63, 600, 1099)), ("glm4_moe_lite", (3, 600)), ("lfm2", (3, 63))],
)
def test_a_text_that_differs_in_one_token_is_noticed(architecture, noticed, method):
    model, tokens = tiny_model(architecture), tiny_tokens(1100)
    content = conversion.Content(cache=make_cache(model, method))
    mx.eval(model(mx.array([tokens]), cache=content.cache))
    assert conversion.begins_with(content, model, tokens)
    for place in noticed:
        other = [*tokens[:place], (tokens[place] + 7) % 97, *tokens[place + 1 :]]
        assert not conversion.begins_with(content, model, other)


def test_a_model_none_of_whose_layers_becomes_live_is_refused(tmp_path):
    model = build("recurrent_gemma")
    content = conversion.Content(cache=make_prompt_cache(model), tokens=[1, 2, 3])
    mx.eval(model(mx.array([content.tokens]), cache=content.cache))
    with pytest.raises(UnsupportedError, match="no layer of this model has a live cache with full"):
        write_content(tmp_path / "a", LIVE, content, model)


def test_a_prompt_cache_without_keys_and_values_is_refused_as_such(tmp_path):
    model = build("mamba")
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([[1, 2, 3]]), cache=cache))
    save_prompt_cache(str(tmp_path / "a.safetensors"), cache)
    with pytest.raises(UnsupportedError, match="no keys and values"):
        read_content(tmp_path / "a.safetensors", PROMPT, model)


@pytest.mark.parametrize("tokens", [[1, 2], ["a"] * 20, [-1] * 20, [2**31] * 20, [1.0] * 20, "x" * 20, {"1": 2}])
def test_forged_tokens_of_a_live_cache_are_refused(tokens, tmp_path):
    cache = make_cache(LLAMA, "int8")
    mx.eval(LLAMA(mx.array([tiny_tokens(20)]), cache=cache))
    save_cache(tmp_path / "a", LLAMA, cache, notes={"tokens": tokens})
    with pytest.raises(FormatError, match="names"):
        read_content(tmp_path / "a", LIVE, LLAMA)

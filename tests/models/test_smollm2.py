"""SmolLM2-135M converted from its GGUF file is the published model: its tokenizer, its text, its perplexity."""

import math
import pydoc_data.topics

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlxkv import lm
from mlxkv.bundled import smollm2 as conversion
from mlxkv.errors import ModelNotFoundError
from mlxkv.models import cache_spec


@pytest.fixture(scope="module")
def text():
    """Python's own help texts: English with code, there on every machine."""
    return "\n".join(value for _, value in sorted(pydoc_data.topics.topics.items()))


@pytest.fixture(scope="module")
def gguf():
    """Weights (read only when used) and metadata of the GGUF file."""
    try:
        return mx.load(str(conversion.find_gguf()), return_metadata=True)
    except ModelNotFoundError as error:
        pytest.skip(str(error))


def perplexity(model, tokens):
    logits = model(mx.array([tokens[:-1]]))
    return math.exp(nn.losses.cross_entropy(logits[0], mx.array(tokens[1:]), reduction="mean").item())


def test_the_converted_folder_is_what_todays_code_would_write(smollm2, gguf):
    (model, tokenizer), (weights, meta) = smollm2, gguf
    config = conversion._config(meta)
    converted = conversion._weights(weights, config)
    for name in ("model.layers.7.self_attn.k_proj.weight", "model.layers.29.mlp.down_proj.weight", "model.norm.weight"):
        loaded = model
        for part in name.split("."):
            loaded = loaded[int(part)] if part.isdigit() else getattr(loaded, part)
        assert mx.array_equal(converted[name].astype(mx.float32), loaded.astype(mx.float32)), f"{name} is stale"
    assert all(getattr(model.args, key) == value for key, value in config.items() if hasattr(model.args, key))
    fresh = conversion._tokenizer(meta, config)
    assert fresh.chat_template == tokenizer.chat_template
    sample = "<|im_start|> In 2024,\n\tnaïve  "
    assert fresh.encode(sample) == tokenizer.encode(sample)


# Its tokenizer


@pytest.mark.parametrize(
    "text",
    [
        "  two leading",
        "\ttab\n\n\nlines \r\n ",
        "naïve 你好 🙂",
        "e\u0301 \u00a0 \u2018\u2019\u201c",
        "42 007 3.14",
        "x  =\\n{}[]",
        "\x00\x7f",
    ],
    ids=ascii,
)
def test_any_text_comes_back_from_its_tokens(smollm2, text):
    _, tokenizer = smollm2
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_are_split_one_by_one(smollm2):
    _, tokenizer = smollm2
    assert [tokenizer.decode([token]) for token in tokenizer.encode("in 2024!")] == ["in", " ", "2", "0", "2", "4", "!"]


def test_words_are_whole_tokens_with_their_space(smollm2):
    _, tokenizer = smollm2
    words = ["The", " capital", " of", " France", " is", " Paris"]
    assert [tokenizer.decode([token]) for token in tokenizer.encode("".join(words))] == words


def test_special_tokens_are_single_ids_also_inside_text(smollm2):
    _, tokenizer = smollm2
    for id_, special in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]):
        tokens = tokenizer.encode(f"a{special}b")
        assert tokens == [*tokenizer.encode("a"), id_, *tokenizer.encode("b")]
    assert tokenizer.eos_token_ids == {2}


def test_the_chat_template_leads_to_an_answer(smollm2):
    model, tokenizer = smollm2
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)
    assert tokenizer.decode(prompt).endswith(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    taken = lm.dump(model, prompt, max_tokens=20, stop=sorted(tokenizer.eos_token_ids))
    answer = tokenizer.decode(taken.tokens[0, len(prompt) :].tolist())
    assert answer == "The capital of France is Paris."


# Its weights


def test_geometry_is_the_published_one(smollm2):
    spec = cache_spec(smollm2[0])
    stream = spec.stream("k")
    assert (stream.layers, stream.heads, stream.dim, spec.stream("v").width) == (30, 3, 64, 5760)
    assert {(rope.dims, rope.base, rope.traditional) for rope in stream.ropes} == {(64, 1e5, False)}


def test_perplexity_is_low_and_only_with_query_and_key_rows_in_half_split_order(smollm2, text):
    model, tokenizer = smollm2
    tokens = tokenizer.encode(text[:8000])[:256]
    assert len(tokens) == 256
    assert 15 < perplexity(model, tokens) < 20
    projections = [p for layer in model.layers for p in (layer.self_attn.q_proj, layer.self_attn.k_proj)]
    weights = [projection.weight for projection in projections]
    try:
        for projection in projections:
            rows, columns = projection.weight.shape
            halves = projection.weight.reshape(rows // 64, 2, 32, columns)
            projection.weight = halves.swapaxes(1, 2).reshape(rows, columns)  # the GGUF file's own order
        assert perplexity(model, tokens[:48]) > 50
    finally:
        for projection, weight in zip(projections, weights):
            projection.weight = weight


def test_a_restored_cache_continues_with_identical_logits(smollm2, text):
    model, tokenizer = smollm2
    *tokens, following = tokenizer.encode(text[:2000])[:65]
    cache = make_prompt_cache(model)
    lm.prefill(model, tokens, cache)
    restored = lm.restore(
        model, lm.extract_cache(cache, cache_spec(model), [tokens], fingerprint=lm.fingerprint(model))
    )
    step = mx.array([[following]])
    assert mx.array_equal(model(step, cache=restored), model(step, cache=cache))

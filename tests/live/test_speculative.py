"""Speculative decoding by mlx-lm's own loop: the text is the cache's own, or mlx-lm refuses before the first token."""

import copy
import os

import mlx.core as mx
import pytest
from conftest import tiny_model, tiny_tokens
from live_checks import METHODS, feed, lone_cache, small
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models.cache import RotatingKVCache, can_trim_prompt_cache, make_prompt_cache

from mlxkv import presets
from mlxkv.errors import InputError, UnsupportedError
from mlxkv.live import live_methods, make_cache
from mlxkv.live.arrays import iter_arrays
from mlxkv.live.group import CacheGroup
from mlxkv.spec import CacheSpec, Slot

TOY = CacheSpec("toy", ((Slot("keys", 2, 16), Slot("values", 2, 8)),))
TOY_MLA = CacheSpec("toy", ((Slot("latent", 1, 16), Slot("k_pe", 1, 8)),), "single_stream")
KEEPING = [method for method in METHODS if live_methods.get(method).takes_tokens_back]
GIVING_UP = sorted(set(METHODS) - set(KEEPING))


def undrafted(model, cache, prompt, count):
    return [token for token, _ in generate_step(mx.array(prompt), model, prompt_cache=cache, max_tokens=count)]


def drafted(model, draft, cache, prompt, count, drafts):
    """The text, and how many of its tokens were drafts."""
    cache = cache + make_prompt_cache(draft)
    rows = list(
        speculative_generate_step(
            mx.array(prompt), model, draft, prompt_cache=cache, max_tokens=count, num_draft_tokens=drafts
        )
    )
    return [token for token, _, _ in rows], sum(accepted for _, _, accepted in rows)


def like(architecture):
    """A model that often has the same next token."""
    draft = tiny_model(architecture)
    embedding = draft.model.embed_tokens if hasattr(draft.model, "embed_tokens") else draft.model.wte
    embedding.weight = embedding.weight + 0.15 * mx.random.normal(embedding.weight.shape, key=mx.random.key(3))
    return draft


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "glm4_moe_lite"])
@pytest.mark.parametrize("method", KEEPING)
def test_drafts_leave_no_trace_in_the_text(method, architecture):
    model = tiny_model(architecture)
    draft, settings = like(architecture), small(method)
    latent = architecture == "glm4_moe_lite"  # its chunks see themselves unpacked: the prompt ends far from a block's
    for prompt in (tiny_tokens(8), tiny_tokens(66 if latent else 56)):
        expected = undrafted(model, make_cache(model, method, **settings), prompt, 20)
        cache = make_cache(model, method, **settings)
        text, accepted = drafted(model, draft, cache, prompt, 20, drafts=3)
        assert text == expected
        assert cache[0].offset in (len(prompt) + 20, len(prompt) + 19)
        assert accepted < 20


@pytest.mark.parametrize("architecture", ["llama", "glm4_moe_lite"])
@pytest.mark.parametrize("method", GIVING_UP)
def test_a_method_that_cannot_take_tokens_back_refuses_drafts_before_the_first_token(method, architecture):
    model, draft = tiny_model(architecture), tiny_model(architecture, seed=5)
    cache = make_cache(model, method, **small(method))
    with pytest.raises(ValueError, match="trimmable"):
        drafted(model, draft, cache, tiny_tokens(8), 20, drafts=2)
    assert {entry.offset for entry in cache} == {0}


@pytest.mark.parametrize("spec", [TOY, TOY_MLA], ids=["heads", "latent"])
@pytest.mark.parametrize("method", KEEPING)
def test_part_of_a_small_chunk_is_taken_back_exactly_across_a_packing_boundary(method, spec):
    keys, values = (
        mx.random.normal((1, slot.heads, 80, slot.dim), key=mx.random.key(i)) for i, slot in enumerate(spec.layers[0])
    )

    def fed(*sizes):
        cache, start = lone_cache(method, spec), 0
        for size in sizes:
            rows = slice(start, start + size)
            fetched = cache.update_and_fetch(keys[:, :, rows], values[:, :, rows])
            both = (fetched[0], fetched[0]) if spec is TOY_MLA else fetched  # MLA's values come from its latents
            cache.attend(keys[:, :, rows], *both, 0.3, "causal" if size > 1 else None)
            start += size
        return cache

    for before in (61, 69):  # blocks are packed at 64 tokens, and at 72 where 8 stay
        for count in range(7):
            cache, expected = fed(before, 6), fed(before, *[1] * (6 - count))
            assert cache.trim(count) == count
            assert (cache.offset, cache.kept) == (expected.offset, expected.kept)
            for ours, theirs in zip(cache.keys_and_values(), expected.keys_and_values()):
                assert mx.array_equal(ours, theirs)


@pytest.mark.parametrize("n", [-1, -3, 1.0, True, "2", None])
@pytest.mark.parametrize("method", METHODS)
def test_only_a_whole_number_of_tokens_can_be_taken_back(method, n):
    cache = lone_cache(method, TOY)
    feed(cache, mx.random.normal((1, 2, 10, 16)), mx.random.normal((1, 2, 10, 8)))
    with pytest.raises(InputError, match="0 or more tokens"):
        cache.trim(n)
    assert (cache.offset, cache.kept) == (10, 10)


@pytest.mark.parametrize("method", GIVING_UP)
def test_a_method_that_gives_tokens_up_takes_them_back_exactly_or_says_that_it_cannot(method):
    cache, fresh = lone_cache(method, TOY), lone_cache(method, TOY)
    keys, values = mx.random.normal((1, 2, 10, 16)), mx.random.normal((1, 2, 10, 8))
    feed(cache, keys, values)
    feed(fresh, keys[:, :, :7], values[:, :, :7])
    assert not cache.is_trimmable()
    if cache.can_take_back(3):
        assert cache.trim(3) == 3
        assert all(mx.array_equal(*pair) for pair in zip(iter_arrays(cache.state), iter_arrays(fresh.state)))
    else:
        with pytest.raises(UnsupportedError, match="cannot take 3 tokens back"):
            cache.trim(3)
        assert cache.offset == 10


def test_beside_layers_of_mlx_lms_that_drop_tokens_nothing_is_trimmable():
    model = tiny_model("llama")
    cache = make_cache(model, "int8")
    assert can_trim_prompt_cache(cache)
    cache[0].join(CacheGroup({1: RotatingKVCache(max_size=8)}, model))
    assert not cache[0].is_trimmable()


@pytest.mark.slow
def test_smollm2_drafts_for_itself_and_writes_the_same(smollm2):
    model, tokenizer = smollm2
    draft = copy.copy(model)
    draft.model = copy.copy(model.model)
    draft.model.layers = model.model.layers[:6]
    text = "The history of the lighthouse begins long before the first stone was laid on the rock. " * 12
    count = int(os.environ.get("MLXKV_DRAFTED", "12"))  # int4 packs a block at 128 tokens
    prompt = tokenizer.encode(text)[:122]
    expected = undrafted(model, make_cache(model, "int4"), prompt, count)
    assert drafted(model, draft, make_cache(model, "int4"), prompt, count, 4)[0] == expected


def test_every_preset_writes_its_own_text_or_is_refused():
    model = tiny_model("llama", head_dim=64)
    live = [name for name in presets.preset_names("methods") if presets.method_preset(name).method in METHODS]
    refused = {name for name in live if not can_trim_prompt_cache(make_cache(model, name))}
    assert {presets.method_preset(name).method for name in refused} == set(GIVING_UP) & {
        presets.method_preset(name).method for name in live
    }

"""The seam: live caches compute the model's attention, other caches notice nothing, and `full` is mlx-lm's own cache."""

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, tiny_model, tiny_tokens
from mlx_lm.generate import generate, generate_step, stream_generate
from mlx_lm.models.cache import ArraysCache, KVCache, make_prompt_cache, trim_prompt_cache

import mlxkv.lm
from mlxkv.errors import PresetError, UnsupportedError
from mlxkv.kernels.decode_attention import decode_attention
from mlxkv.live.base import LayerCache, attention_mass, causal_mask, unquantized
from mlxkv.live.methods import full
from mlxkv.live.methods.streaming_llm import StreamingLLMConfig
from mlxkv.live.seam import attach, detach, live_config, make_cache
from mlxkv.models import cache_spec, kv_slots
from mlxkv.spec import CacheSpec, Rope

ROOT = Path(__file__).parents[2]
SPEC = CacheSpec("toy", (None, kv_slots(2, 8, Rope(8, base=1e4))))


def generated(model, cache, prompt, step=64, count=12):
    """Tokens and log-probabilities `[count, vocabulary]` of mlx-lm's own loop."""
    pairs = list(generate_step(mx.array(prompt), model, prompt_cache=cache, max_tokens=count, prefill_step_size=step))
    return [token for token, _ in pairs], np.array(mx.stack([logprobs for _, logprobs in pairs]))


def attention_of(model):
    """The attention that the model's own module calls."""
    return __import__(type(model).__module__, fromlist=["x"]).scaled_dot_product_attention


# What it loads


def test_live_caches_that_are_made_load_no_codec_and_no_evaluation():
    start = "import sys; sys.path.insert(0, 'tests'); import mlxkv; from conftest import tiny_model; "
    end = "; print([name for name in sys.modules if name.startswith(('mlxkv.codec', 'mlxkv.evaluate', 'mlxkv.cli'))])"
    code = "mlxkv.make_cache(tiny_model('llama'), 'kivi-2')"
    done = subprocess.run([sys.executable, "-c", start + code + end], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


# The seam


def test_attach_replaces_attention_once_and_detach_puts_it_back(tiny):
    detach(tiny)  # other tests leave it attached
    before = attention_of(tiny)
    attach(tiny)
    attached = attention_of(tiny)
    attach(tiny)
    assert attention_of(tiny) is attached is not before
    detach(tiny)
    assert attention_of(tiny) is before
    detach(tiny)
    assert attention_of(tiny) is before


def test_other_caches_give_the_same_bits_with_the_seam_installed(tiny):
    prompt = tiny_tokens(50)
    expected = generated(tiny, make_prompt_cache(tiny), prompt)
    attach(tiny)
    tokens, logprobs = generated(tiny, make_prompt_cache(tiny), prompt)
    detach(tiny)
    assert tokens == expected[0]
    assert np.array_equal(logprobs, expected[1])


@pytest.mark.parametrize("step", [1, 7, 512])
def test_full_is_mlx_lms_cache_bit_for_bit(tiny, step):
    prompt = tiny_tokens(300 if step > 1 else 40)
    expected = generated(tiny, make_prompt_cache(tiny), prompt, step)
    tokens, logprobs = generated(tiny, make_cache(tiny, "full"), prompt, step)
    assert tokens == expected[0]
    assert np.array_equal(logprobs, expected[1])


def test_without_the_seam_the_second_chunk_is_refused_and_says_what_to_do():
    model = tiny_model("llama")
    cache = make_cache(model, "int8")
    detach(model)
    model(mx.array([[1, 2]]), cache=cache)
    with pytest.raises(UnsupportedError, match=r"mlxkv\.attach\(model\)"):
        model(mx.array([[3]]), cache=cache)


def test_attending_twice_is_refused():
    cache = make_cache(tiny_model("llama"), "int8")[0]
    with pytest.raises(UnsupportedError, match="once for each"):
        cache.attend(mx.zeros((1, 4, 1, 8)), mx.zeros((1, 2, 1, 8)), mx.zeros((1, 2, 1, 8)), 1.0)


# make_cache


@pytest.mark.parametrize("name", sorted(TINY))
def test_layers_without_keys_and_values_keep_mlx_lms_cache(name):
    model = tiny_model(name)
    stock, live = make_prompt_cache(model), make_cache(model, "int8")
    for index, (old, new) in enumerate(zip(stock, live, strict=True)):
        assert isinstance(new, LayerCache if isinstance(old, KVCache) else ArraysCache), index
    attention = [i for i, entry in enumerate(live) if isinstance(entry, LayerCache)]
    assert tuple(attention) == cache_spec(model).attention_layers


def test_a_preset_a_method_and_overrides_name_settings():
    model = tiny_model("llama")
    assert make_cache(model, "streaming-llm-256")[0].config.recent == 252
    assert make_cache(model, "streaming-llm")[0].config.recent == 508
    expected = StreamingLLMConfig(sinks=7, recent=252)
    assert make_cache(model, "streaming-llm-256", sinks=7)[0].config == expected
    assert make_cache(model, expected)[0].config == expected
    assert make_cache(model, expected, sinks=8)[0].config == StreamingLLMConfig(sinks=8, recent=252)


@pytest.mark.parametrize(
    ("method", "old", "new"),
    [
        ("streaming-llm", {"window": 9}, {"recent": 9}),
        ("sliding-window-256", {"window": 9}, {"recent": 9}),
        ("kivi-2", {"residual": 9}, {"recent": 9}),
        ("mp-kvm", {"window": 9, "preserve": 3}, {"recent": 9, "sinks": 3}),
    ],
)
def test_old_names_of_settings_work_and_warn_where_they_are_used(method, old, new):
    model = tiny_model("llama")
    with pytest.warns(DeprecationWarning, match=r"the setting \w+ is called \w+ now") as warned:
        caches = make_cache(model, method, **old)
    assert [warning.filename for warning in warned] == [__file__] * len(old)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = make_cache(model, method, **new)
    assert caches[0].config == expected[0].config != live_config(method)
    with pytest.raises(PresetError, match="given twice, once by its old name"):
        make_cache(model, method, **old, **new)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("h3o", {}, "no preset or live method 'h3o'"),
        ("_packing", {}, "no preset or live method"),
        ("kvtc-8", {}, "not a live method"),
        ("int8", {"window": 3}, "window"),
        ("int8", {"recent": 3}, "recent"),
        ("streaming-llm", {"recent": 0}, "recent must be 1 or more"),
    ],
)
def test_wrong_names_and_settings_are_refused(name, overrides, message):
    with pytest.raises(PresetError, match=message):
        make_cache(tiny_model("llama"), name, **overrides)


def test_a_layer_without_keys_has_no_live_cache():
    with pytest.raises(UnsupportedError, match="layer 0"):
        full.FullCache(full.FullConfig(), SPEC, 0)


# mlx-lm's contract


def test_a_mask_shows_all_that_is_kept_and_the_chunk_causally():
    model = tiny_model("llama")
    caches = make_cache(model, "sliding-window", recent=5)
    model(mx.array([tiny_tokens(20)]), cache=caches)
    cache = caches[0]
    assert (cache.offset, cache.kept, cache.size()) == (20, 5, 5)
    assert cache.make_mask(1, return_array=True) is None
    assert cache.make_mask(3) == "causal"
    expected = np.tril(np.ones((3, 8), bool), 5)
    assert np.array_equal(np.array(cache.make_mask(3, return_array=True)), expected)
    with pytest.raises(UnsupportedError, match="gave tokens up"):
        cache.make_mask(3, window_size=5)


def test_no_attribute_makes_mlx_lm_take_the_cache_for_its_own_quantized_one():
    for method in ("int8", "kivi"):
        assert not hasattr(make_cache(tiny_model("llama"), method)[0], "bits")


def test_a_method_that_evicts_is_never_trimmable_but_takes_back_what_it_still_can():
    model, tokens = tiny_model("llama"), tiny_tokens(100)
    caches = make_cache(model, "sliding-window", recent=90)
    assert not caches[0].is_trimmable()
    model(mx.array([tokens[:80]]), cache=caches)
    assert trim_prompt_cache(caches, 30) == 0
    assert caches[0].can_take_back(30)
    assert [entry.trim(30) for entry in caches] == [30, 30]
    assert (caches[0].offset, caches[0].kept) == (50, 50)
    fresh = make_cache(model, "sliding-window", recent=90)
    model(mx.array([tokens[:50]]), cache=fresh)
    following = mx.array([tokens[50:60]])
    assert mx.allclose(model(following, cache=caches), model(following, cache=fresh), atol=1e-2)
    model(mx.array([tokens]), cache=caches)
    assert not caches[0].can_take_back(3)
    with pytest.raises(UnsupportedError, match="is_trimmable"):
        caches[0].trim(3)


def test_a_copied_cache_goes_its_own_way():
    model = tiny_model("llama")
    caches = make_cache(model, "int8")
    model(mx.array([tiny_tokens(70)]), cache=caches)
    twin = copy.deepcopy(caches)
    following = mx.array([tiny_tokens(70, seed=2)])
    expected = model(following, cache=caches)
    assert twin[0].offset == 70
    assert mx.array_equal(model(following, cache=twin), expected)


def test_mlx_lms_generate_and_stream_generate_run_on_live_caches(model_dir):
    model, tokenizer = mlxkv.lm.load(str(model_dir))
    prompt = tokenizer.encode("the cat sat on the mat. " * 12)
    plain = generate(model, tokenizer, prompt, max_tokens=20)
    assert generate(model, tokenizer, prompt, max_tokens=20, prompt_cache=make_cache(model, "full")) == plain
    for step in (16, 512):
        caches = make_cache(model, "int8")
        pieces = stream_generate(model, tokenizer, prompt, max_tokens=20, prompt_cache=caches, prefill_step_size=step)
        assert len(list(pieces)) == 20
        assert caches[0].offset >= len(prompt) + 19
        assert caches[0].packed[0].bits == 8


# Attention mass


@pytest.mark.parametrize("mask", ["causal", None, "bool", "scores"])
def test_mass_is_the_softmax_summed_over_queries_and_their_heads(mask):
    random = np.random.default_rng(0)
    queries, keys = random.standard_normal((2, 6, 70, 8)), random.standard_normal((2, 3, 90, 8))
    scores = np.einsum("bhld,bhtd->bhlt", queries, keys.repeat(2, axis=1)) * 0.3
    added = random.standard_normal((2, 6, 70, 90))
    scores = scores + added if mask == "scores" else scores
    if mask in ("causal", "bool"):
        scores = np.where(np.tril(np.ones((70, 90), bool), 20), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    argument = {"bool": causal_mask(70, 90), "scores": mx.array(added.astype(np.float32))}.get(mask, mask)
    wide = [mx.array(x.astype(np.float32)) for x in (queries, keys)]
    for last in (70, 66, 1):
        expected = weights[:, :, -last:].reshape(2, 3, 2, last, 90).sum(axis=(2, 3))
        np.testing.assert_allclose(attention_mass(*wide, 0.3, argument, last, 3), expected, atol=1e-5)


def test_the_mass_of_one_query_is_what_decode_attention_says():
    queries, keys = mx.random.normal((1, 4, 1, 8)), mx.random.normal((1, 2, 30, 8))
    _, mass = decode_attention(queries, [(unquantized(keys), unquantized(keys))], 0.3)
    assert mx.allclose(attention_mass(queries, keys, 0.3, None, 1, 2), mass, atol=1e-6)


@pytest.mark.parametrize("missing", ["buckets", "absorb"])
def test_a_method_that_lacks_a_part_cannot_be_built(missing):
    parts = {name: lambda self, *_: [] for name in ("buckets", "absorb") if name != missing}
    with pytest.raises(TypeError, match=missing):
        type("Cache", (LayerCache,), parts)(None, cache_spec(tiny_model("llama")), 0)

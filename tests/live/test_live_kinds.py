"""Live caches on models whose caches are not all alike: windows, lists, latents here and there, sinks, layers that share.

The models are the zoo's. Each kind of layer is one of theirs; the contract of the layer itself is in the other tests.
"""

import copy
import dataclasses
import functools

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_model
from live_checks import METHODS, feed, lone_cache, small
from mlx_lm.models.cache import CacheList, ChunkedKVCache, KVCache, RotatingKVCache, make_prompt_cache
from zoo.build import build, tokens

from mlxkv import stock
from mlxkv.errors import MismatchError, UnsupportedError
from mlxkv.kernels.bits import unpack
from mlxkv.live import LayerCache, make_cache
from mlxkv.live.attention import attention_mass
from mlxkv.live.group import CacheGroup
from mlxkv.live.methods.int8 import Int8Cache, Int8Config
from mlxkv.live.packing import quantize_per_token
from mlxkv.live.seam import attach, detach, make_cache_of
from mlxkv.live.serialization import load_cache, save_cache
from mlxkv.models import cache_spec
from mlxkv.spec import CacheSpec, Slot

KINDS = {
    "gemma3_text": "windows",
    "gpt_oss": "windows and sinks",
    "plamo3": "windows that are asked for one longer",
    "gemma3n": "layers that read what another has stored",
    "gemma4_text": "layers that get what another fetched, heads of two sizes",
    "iquestloopcoder": "attention to what another layer fetched",
    "gemma2": "attention of the model's own",
    "deepseek_v32": "latents in lists beside an indexer, chosen by index",
    "minimax_m3_vl": "masks for each head beside an indexer",
    "longcat_flash": "two latents in each list",
    "llama4": "chunks of mlx-lm's own",
}
FETCHED = ("gemma3n", "gemma4_text", "iquestloopcoder", "gemma2", "deepseek_v32", "minimax_m3_vl")
KEEPING = {"full": {}, "int8": {}, "int4": {}, "kivi": {"recent": 16}}
TOY = CacheSpec("toy", ((Slot("keys", 2, 16), Slot("values", 2, 16)),))


class Exact(Int8Cache):
    """Packs blocks and drops them without changing a value, and decodes by the kernel's reference."""

    observation_window = 1

    def pack(self, keys, values):
        return quantize_per_token(keys, 16), quantize_per_token(values, 16)


model_of = functools.cache(build)


def read(name, caches, sizes, seed=1):
    """Logits of a text in chunks of these sizes."""
    text, start, outputs = tokens(name, sum(sizes), seed), 0, []
    for size in sizes:
        outputs.append(model_of(name)(mx.array([text[start : start + size]]), cache=caches))
        mx.eval(outputs[-1])
        start += size
    return mx.concatenate(outputs, axis=1)


def gap(found, expected):
    """Largest difference, relative to the largest logit that is finite."""
    used = np.isfinite(np.array(expected))
    found, expected = np.array(found)[used], np.array(expected)[used]
    return np.abs(found - expected).max() / np.abs(expected).max()


# What the model sees


@pytest.mark.parametrize("name", KINDS)
def test_full_predicts_what_mlx_lms_own_cache_does_bit_for_bit(name):
    sizes = (40, 3, 1, 1, 20, 1)
    own, live = make_prompt_cache(model_of(name)), make_cache(model_of(name), "full")
    assert mx.array_equal(read(name, live, sizes), read(name, own, sizes), equal_nan=True)


@pytest.fixture
def unrounded(monkeypatch):
    """Live caches store float32 as it is."""
    monkeypatch.setattr("mlxkv.live.base.storage_dtype", lambda *_: mx.float32)
    for room in ("arrays", "base"):
        monkeypatch.setattr(f"mlxkv.live.{room}.to_storage_dtype", lambda x, _=None: x)


@pytest.mark.usefixtures("unrounded")
def test_masks_of_each_head_reach_tokens_that_are_packed():
    """MiniMax M3 chooses tokens by a mask, so its attention may be a live cache's."""
    name, sizes = "minimax_m3_vl", (130, 1, 1, 8, 20, 1)
    uses = [(layer.use, layer.selects) for layer in cache_spec(model_of(name)).layers if layer]
    assert ("seam", True) in uses
    own, live = make_prompt_cache(model_of(name)), make_cache_of(model_of(name), Exact, Int8Config())
    assert gap(read(name, live, sizes), read(name, own, sizes)) < 2e-4


@pytest.mark.usefixtures("unrounded")
@pytest.mark.parametrize("sizes", [(75, 75, 1, 1, 1, 8, 20, 1), (130, *[1] * 12)], ids=len)
@pytest.mark.parametrize("name", KINDS)
def test_a_method_that_changes_no_value_predicts_what_mlx_lms_own_cache_does(name, sizes):
    own, live = make_prompt_cache(model_of(name)), make_cache_of(model_of(name), Exact, Int8Config())
    assert gap(read(name, live, sizes), read(name, own, sizes)) < 2e-4


@pytest.mark.parametrize("method", KEEPING)
@pytest.mark.parametrize("name", KINDS)
def test_methods_that_keep_every_token_run_stay_small_and_are_saved(name, method, tmp_path):
    model = model_of(name)
    caches = make_cache(model, method, **KEEPING[method])
    found = read(name, caches, (100, 50, 1, 5))
    assert np.isfinite(np.array(found)).all()
    live = [entry for entry in stock.entries(caches) if isinstance(entry, LayerCache)]
    assert [entry.layer for entry in live] == [i for i, entry in enumerate(stock.entries(caches)) if entry in live]
    for entry in live:
        entry.check_state()
        assert entry.kept == 156 or (entry.window and entry.kept < entry.window + entry.block + 50)
    save_cache(tmp_path / "cache", model, caches)
    detach(model)
    loaded = load_cache(tmp_path / "cache", model)
    assert [type(entry) for entry in loaded] == [type(entry) for entry in caches]
    for sizes in ((1, 1), (20,)):
        assert mx.array_equal(*(read(name, each, sizes, seed=2) for each in (caches, loaded)), equal_nan=True)


@pytest.mark.parametrize("name", KINDS)
def test_int8_predicts_nearly_what_mlx_lms_own_cache_does(name):
    sizes = (150, *[1] * 8)
    logs = []
    for caches in (make_prompt_cache(model_of(name)), make_cache(model_of(name), "int8")):
        logits = read(name, caches, sizes)[:, 150:]
        logs.append(np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True)))
    used = np.isfinite(logs[0])
    apart = np.where(used, np.exp(logs[0]) * (logs[0] - np.where(used, logs[1], 0)), 0).sum(axis=-1).mean()
    assert 0 < apart < (0.05 if "indexer" in KINDS[name] else 0.02)  # other tokens may be chosen


def test_sinks_and_windows_are_packed_where_the_model_has_them():
    for name in ("gpt_oss", "mimo_v2_flash"):
        model = model_of(name)
        windows = cache_spec(model).window_layers
        assert windows
        own, live, h2o = (
            make_prompt_cache(model),
            make_cache(model, "int8"),
            make_cache(model, "h2o", heavy=8, recent=8),
        )
        assert {type(own[layer]) for layer in windows} == {RotatingKVCache} == {type(h2o[layer]) for layer in windows}
        assert {type(live[layer]) for layer in windows} == {Int8Cache}
        assert np.isfinite(np.array(read(name, h2o, (60, 1, 1, 20)))).all()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_counts_sinks_as_one_more_token_without_a_value(method):
    """A token of zero key and value whose score is the sink's logit is the same thing."""
    queries, keys, values = (
        mx.random.normal((1, heads, 60, 16), key=mx.random.key(i)) for i, heads in enumerate((4, 2, 2))
    )
    sinks = mx.array([0.5, 3.0, -2.0, 1.0])
    cache, plain = lone_cache(method, TOY), lone_cache(method, TOY)
    for start, stop in ((0, 20), (20, 21), (21, 22)):
        part = [x[:, :, start:stop] for x in (queries, keys, values)]
        mask = "causal" if stop - start > 1 else None
        old, bias = copy.deepcopy(cache).buckets(), cache.score_bias()
        output = cache.attend(part[0], *cache.update_and_fetch(*part[1:]), 0.3, mask, sinks)
        without = plain.attend(part[0], *plain.update_and_fetch(*part[1:]), 0.3, mask)
        if stop - start == 1 and bias is None:
            seen = np.concatenate([*(np.array(unpack(k, mx.float32)) for k, _ in old), np.array(part[1])], axis=2)
            scores = 0.3 * np.array(part[0]) @ seen.repeat(2, axis=1).swapaxes(-1, -2)
            share = np.exp(scores).sum(axis=-1)
            share /= share + np.exp(np.array(sinks))[:, None]
            if method not in ("h2o", "sketch-topk", "sketch-aggregate", "smartkv", "mp-kvm") or start == 20:
                np.testing.assert_allclose(output, without * share[..., None], atol=2e-3)
        assert not mx.allclose(output, without, atol=1e-2)


def test_the_attention_of_tokens_leaves_out_what_sinks_take():
    queries, keys = mx.random.normal((1, 4, 30, 16)), mx.random.normal((1, 2, 50, 16))
    sinks = mx.array([0.5, 3.0, -2.0, -mx.inf])
    scores = 0.3 * np.array(queries) @ np.array(keys).repeat(2, axis=1).swapaxes(-1, -2)
    scores = np.exp(np.where(np.tril(np.ones((30, 50), bool), 20), scores, -np.inf))
    weights = scores / (scores.sum(axis=-1, keepdims=True) + np.exp(np.array(sinks))[:, None, None])
    for last in (1, 30):
        expected = weights[:, :, -last:].reshape(1, 2, 2, last, 50).sum(axis=(2, 3))
        np.testing.assert_allclose(attention_mass(queries, keys, 0.3, "causal", last, 2, sinks), expected, atol=1e-5)


def test_methods_count_the_attention_that_sinks_leave():
    queries, keys = mx.random.normal((1, 4, 21, 16)), mx.random.normal((1, 2, 21, 16))
    sinks, cache = mx.array([0.5, 3.0, -2.0, 1.0]), lone_cache("h2o", TOY, heavy=30, recent=30)
    for rows, mask in ((slice(0, 20), "causal"), (slice(20, 21), None)):
        part = keys[:, :, rows]
        cache.attend(queries[:, :, rows], *cache.update_and_fetch(part, part), 0.3, mask, sinks)
    expected = attention_mass(queries, keys, 0.3, "causal", 21, 2, sinks)
    np.testing.assert_allclose(cache.tokens.attention, expected, atol=1e-3)


# Where live caches go


@pytest.mark.parametrize("name", KINDS)
def test_the_prompt_cache_keeps_its_form_and_what_is_no_layers_stays(name):
    model = model_of(name)
    own, live = make_prompt_cache(model), make_cache(model, "int8")
    assert [isinstance(entry, CacheList) for entry in live] == [isinstance(entry, CacheList) for entry in own]
    spec = cache_spec(model)
    for layer, old, new in zip(spec.layers, stock.entries(own), stock.entries(live), strict=True):
        assert type(new) is (type(old) if layer is None else Int8Cache)
    kept = {type(entry) for entry, layer in zip(stock.entries(live), spec.layers) if layer is None}
    assert kept <= {KVCache, ChunkedKVCache}
    first = next(entry for entry in stock.entries(live) if isinstance(entry, LayerCache))
    beside = set(range(len(live[0].caches))) if isinstance(live[0], CacheList) else {first.layer}
    assert first.group.beside == beside


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(KEEPING)))
@pytest.mark.parametrize("name", FETCHED)
def test_a_method_that_needs_attention_or_gives_tokens_up_says_where_it_does_not_work(name, method):
    reason = "chooses tokens by their index" if "indexer" in KINDS[name] else "read outside of mlx-lm's attention"
    with pytest.raises(UnsupportedError, match=rf"layer \d of this {name} model .*{reason}.*full, int4, int8, kivi"):
        make_cache(model_of(name), method, **small(method))


def test_a_list_whose_indexer_comes_first_is_not_taken_for_an_interrupted_call():
    """As in a MiniMax M3 whose first layer is sparse already."""
    model, keys = tiny_model("llama"), mx.random.normal((1, 2, 3, 16))
    live, indexer, other = lone_cache("int8", TOY), KVCache(), KVCache()
    live.join(CacheGroup({1: indexer, 2: other}, model, beside=range(2)))
    for _ in range(2):
        indexer.update_and_fetch(keys, keys)
        feed(live, keys, keys)
        other.update_and_fetch(keys, keys)
    indexer.update_and_fetch(keys, keys)
    other.offset -= 1
    with pytest.raises(MismatchError, match="interrupted"):
        live.update_and_fetch(keys, keys)


# Attention that the layer does not see


def fetching(method, **settings):
    (layer,) = TOY.layers
    return lone_cache(method, dataclasses.replace(TOY, layers=(dataclasses.replace(layer, use="fetch"),)), **settings)


@pytest.mark.parametrize("method", KEEPING)
def test_all_that_is_stored_is_fetched_and_the_chunk_exactly(method):
    cache = fetching(method)
    for length in (70, 1, 6, 30, 1):
        keys, values = (mx.random.normal((1, 2, length, 16), key=mx.random.key(cache.offset + i)) for i in range(2))
        before = cache.keys_and_values() if cache.offset else None
        fetched = cache.update_and_fetch(keys, values)
        for slot, chunk in enumerate((keys, values)):
            assert mx.array_equal(fetched[slot][:, :, -length:], chunk)
            assert fetched[slot].shape[2] == cache.kept == cache.offset
            if before:
                assert mx.allclose(fetched[slot][:, :, :-length], before[slot].astype(mx.float32), atol=2e-3)
        mask = "causal" if length > 1 else None
        for _ in range(2):  # attention of several layers may be told of it
            expected = mx.fast.scaled_dot_product_attention(keys, *fetched, scale=0.3, mask=mask)
            assert mx.array_equal(cache.attend(keys, *fetched, 0.3, mask), expected)


@pytest.mark.parametrize("method", ["int8", "int4", "kivi"])
def test_what_is_stored_where_the_model_fetches_is_what_is_stored_elsewhere(method):
    settings = {"recent": 0} if method == "kivi" else {}
    cache, plain = fetching(method, **settings), lone_cache(method, TOY, **settings)
    for length in (61, 6, 1, 80):
        keys, values = (mx.random.normal((1, 2, length, 16), key=mx.random.key(cache.offset + i)) for i in range(2))
        cache.update_and_fetch(keys, values), feed(plain, keys, values)
        assert all(mx.array_equal(*pair) for pair in zip(cache.keys_and_values(), plain.keys_and_values()))
    keys = mx.random.normal((1, 2, 9, 16))
    for each in (cache, plain):
        each.trim(25)  # to shortly before a block is full
        each.attend(keys, *each.update_and_fetch(keys, keys), 0.3, "causal")
        assert each.trim(5) == 5  # exactly, of a small chunk
    assert all(mx.array_equal(*pair) for pair in zip(cache.keys_and_values(), plain.keys_and_values()))


def test_what_a_model_ties_to_a_fetched_layer_is_computed_with_the_next_chunk():
    cache, keys = fetching("int8"), mx.random.normal((1, 2, 1, 16))
    for _ in range(3):
        fetched = cache.update_and_fetch(keys, keys)
        extra = mx.zeros(4) + cache.offset
        cache.keys, cache.values = mx.depends(cache.keys, extra), mx.depends(cache.values, extra)
        mx.eval(fetched)
        assert len(cache._ties) == 2


# The seam


def test_attention_is_found_in_the_module_of_every_wrapped_model():
    for name in ("gemma3n", "llama4", "minimax_m3_vl", "qwen3_5"):
        model = model_of(name)
        attach(model)
        (module,) = {type(part).__module__ for part in model.modules() if "Attention" in type(part).__name__}
        assert hasattr(__import__(module, fromlist=["x"]).scaled_dot_product_attention, "__wrapped__")
        detach(model)


def test_plain_models_are_as_before():
    caches = make_cache(tiny_model("llama"), "int8")
    assert not any(hasattr(entry, "max_size") for entry in caches)

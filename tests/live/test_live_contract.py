"""What mlx-lm's loops may do with any cache: masks of every shape, interrupted calls, threads, state, keys and values."""

import copy
import threading

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_model, tiny_tokens
from live_checks import METHODS, feed, lone_cache, plain_attention, small, stored
from mlx_lm.models.cache import KVCache, save_prompt_cache, trim_prompt_cache

from mlxkv.errors import InputError, MismatchError, UnsupportedError
from mlxkv.live import live_methods, make_cache
from mlxkv.live.arrays import iter_arrays
from mlxkv.live.attention import attention_mass
from mlxkv.live.base import check_consistent
from mlxkv.live.group import CacheGroup
from mlxkv.spec import CacheSpec, Slot

TOY = CacheSpec("toy", ((Slot("keys", 2, 16), Slot("values", 2, 16)),))
B, HQ = 2, 4
MASKS = {"[T]": (1,), "[1, T]": (1, 1), "[B, 1, 1, T]": (B, 1, 1), "[B, Hq, L, T]": (B, HQ, None), "[L, T]": (None,)}


def numbers(seed, heads, length):
    return mx.random.normal((B, heads, length, 16), key=mx.random.key(seed))


def some_mask(shape, length, tokens, kind):
    """A mask that hides some tokens, or adds to their scores; every query still sees its own token."""
    lead = tuple(length if n is None else n for n in shape)
    seen = mx.random.uniform(shape=(*lead, tokens), key=mx.random.key(9)) > 0.4
    seen = seen | (mx.arange(tokens) >= tokens - length)
    return seen if kind == "bool" else mx.where(seen, 0.5, -mx.inf)


# Masks


@pytest.mark.parametrize("kind", ["bool", "added"])
@pytest.mark.parametrize("shape", MASKS)
@pytest.mark.parametrize("method", METHODS)
def test_a_mask_of_any_shape_hides_tokens_at_prefill_and_at_decode(method, shape, kind):
    for packed in (False, True):
        before = 70 if packed else 8
        for length in (1, 5, 20):
            one_by_one = 1 < length <= 16 and method != "full" and live_methods.get(method).takes_tokens_back
            if packed and one_by_one:
                continue  # its tokens see each other as they are stored
            cache = lone_cache(method, TOY)
            feed(cache, numbers(1, 2, before), numbers(2, 2, before), numbers(3, HQ, before))
            old, bias = [stored(cache, slot) for slot in (0, 1)], cache.score_bias()
            keys, values, queries = numbers(4, 2, length), numbers(5, 2, length), numbers(6, HQ, length)
            mask = some_mask(MASKS[shape], length, cache.kept + length, kind)
            output = cache.attend(queries, *cache.update_and_fetch(keys, values), 0.3, mask)
            if one_by_one:
                mask = mask & causal(length, mask) if kind == "bool" else mx.where(causal(length, mask), mask, -mx.inf)
            seen = [np.concatenate([a, np.array(b)], axis=2) for a, b in zip(old, (keys, values))]
            bias = None if bias is None else np.array(bias)
            expected = plain_attention(np.array(queries), *seen, 0.3, mask, bias)
            np.testing.assert_allclose(output, expected, atol=2e-3, rtol=2e-3)


def causal(length, mask):
    tokens = mask.shape[-1]
    return mx.arange(tokens - length, tokens)[:, None] >= mx.arange(tokens)


def test_hidden_tokens_get_no_attention_whatever_the_masks_shape():
    queries, keys = numbers(0, HQ, 3), numbers(1, 2, 9)
    hidden = mx.arange(9) != 4
    expected = attention_mass(queries, keys, 0.3, mx.broadcast_to(hidden, (B, HQ, 3, 9)), 2, 2)
    assert float(expected[..., 4].max()) == 0
    for shape in ((9,), (1, 9), (1, 1, 1, 9), (B, 1, 1, 9), (1, 1, 3, 9)):
        mask = mx.broadcast_to(hidden, shape)
        assert mx.allclose(attention_mass(queries, keys, 0.3, mask, 2, 2), expected)


# Interrupted calls


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("step", ["update_and_fetch", "attend", "_end"])
@pytest.mark.parametrize("method", METHODS)
def test_after_an_interrupted_call_the_next_one_is_refused(method, step):
    model = tiny_model("llama")
    for layer in (0, 1):
        caches = make_cache(model, method, **small(method))
        mx.eval(model(mx.array([tiny_tokens(30)]), cache=caches))
        check_consistent(caches)
        caches[layer].__dict__[step] = interrupt
        with pytest.raises(KeyboardInterrupt):
            model(mx.array([tiny_tokens(3)]), cache=caches)
        del caches[layer].__dict__[step]
        if (layer, step) == (0, "update_and_fetch"):
            model(mx.array([[1]]), cache=caches)  # nothing had happened yet
            continue
        for each in (copy.deepcopy(caches), caches):
            with pytest.raises(MismatchError, match="start again with a new cache"):
                check_consistent(each)
            assert trim_prompt_cache(each, 3) == 0
            with pytest.raises((MismatchError, UnsupportedError), match="start again with a new cache"):
                model(mx.array([[1]]), cache=each)


def test_layers_of_mlx_lms_own_count_as_well():
    model, keys = tiny_model("llama"), numbers(0, 2, 3)
    first, last, live = KVCache(), KVCache(), lone_cache("int8", TOY)
    group = CacheGroup({-1: first, 1: last}, model)
    live.join(group)
    for chunk in (keys, keys):
        first.update_and_fetch(chunk, chunk)
        feed(live, chunk, chunk)
        last.update_and_fetch(chunk, chunk)
    check_consistent([first, live, last])
    first.update_and_fetch(keys, keys)  # and then the call was interrupted
    first.update_and_fetch(keys, keys)
    with pytest.raises(MismatchError, match="6 and 9 tokens"):
        live.update_and_fetch(keys, keys)


# Batches


@pytest.mark.parametrize("architecture", ["llama", "glm4_moe_lite"])
@pytest.mark.parametrize("method", METHODS)
def test_a_call_with_another_number_of_texts_is_refused_and_leaves_the_cache_as_it_was(method, architecture):
    model, batch = tiny_model(architecture), mx.array([tiny_tokens(30), tiny_tokens(30, seed=2)])
    caches = make_cache(model, method, **small(method))
    mx.eval(model(batch, cache=caches))
    expected = model(batch[:, :3], cache=copy.deepcopy(caches))
    for tokens in (batch[:1], batch[:1, :1], mx.concatenate([batch, batch])[:3, :5]):
        with pytest.raises(MismatchError, match=f"holds 2 texts, the call has {tokens.shape[0]}"):
            model(tokens, cache=caches)
    assert mx.array_equal(model(batch[:, :3], cache=caches), expected)


# Threads


@pytest.mark.parametrize("method", METHODS)
def test_a_cache_that_one_thread_made_and_trimmed_is_used_by_another(method):
    model = tiny_model("llama")

    def start():
        caches = make_cache(model, method, **small(method))
        mx.eval(model(mx.array([tiny_tokens(70)]), cache=caches), [entry.state for entry in caches])
        for entry in caches:
            if entry.can_take_back(10):
                entry.trim(10)
        made.append(caches)

    made, expected = [], []
    for thread in (threading.Thread(target=start), None):
        start() if thread is None else (thread.start(), thread.join())
        expected.append(np.array(model(mx.array([tiny_tokens(2)]), cache=made[-1])))
    assert np.array_equal(*expected)


# State


@pytest.mark.parametrize("method", METHODS)
def test_mlx_lm_refuses_to_save_a_live_cache_and_names_what_can(method, tmp_path):
    model = tiny_model("llama")
    caches = make_cache(model, method, **small(method))
    mx.eval(model(mx.array([tiny_tokens(70)]), cache=caches), [entry.state for entry in caches])
    mx.async_eval([entry.state for entry in caches])
    with pytest.raises(ValueError, match=r"not serializable.*mlxkv\.save_cache"):
        save_prompt_cache(str(tmp_path / "cache.safetensors"), caches)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", METHODS)
def test_a_cache_made_of_a_state_goes_on_as_the_one_that_had_it(method):
    cache = lone_cache(method, TOY)
    feed(cache, numbers(1, 2, 70), numbers(2, 2, 70))
    twin = type(cache).from_state([x + 0 if isinstance(x, mx.array) else x for x in cache.state])
    assert (twin.offset, twin.kept, twin.config) == (cache.offset, cache.kept, cache.config)
    assert 0 < twin.nbytes <= cache.nbytes
    outputs = [feed(each, numbers(3, 2, 9), numbers(4, 2, 9)) for each in (cache, twin)]
    assert mx.array_equal(*outputs)
    assert all(mx.array_equal(*pair) for pair in zip(iter_arrays(cache.state), iter_arrays(twin.state), strict=True))
    for wrong in ([], cache.state[:-1], cache.state[1:], lone_cache("full" if method != "full" else "int8", TOY).state):
        with pytest.raises(InputError, match="state"):
            type(cache).from_state(wrong)
        with pytest.raises(InputError, match="state"):
            cache.state = wrong


@pytest.mark.parametrize("method", METHODS)
def test_keys_and_values_are_what_is_stored_where_that_says_all(method):
    cache = lone_cache(method, TOY)
    with pytest.raises(InputError, match="no token yet"):
        cache.keys_and_values()
    feed(cache, numbers(1, 2, 70), numbers(2, 2, 70))
    if cache.score_bias() is None:
        for slot, part in enumerate(cache.keys_and_values()):
            np.testing.assert_allclose(part.astype(mx.float32), stored(cache, slot), rtol=2e-3, atol=1e-3)
    else:
        with pytest.raises(UnsupportedError, match="several tokens"):
            cache.keys_and_values()


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"full"}))
def test_models_can_tie_something_to_the_chunk_as_deepseek_v32_does(method):
    cache, plain = lone_cache(method, TOY), lone_cache(method, TOY)
    keys, values = numbers(1, 2, 20), numbers(2, 2, 20)
    fetched, extra = cache.update_and_fetch(keys, values), mx.zeros(3) + 1
    cache.keys, cache.values = mx.depends(cache.keys, extra), mx.depends(cache.values, extra)
    output = cache.attend(keys, *fetched, 0.3, "causal")
    assert mx.array_equal(output, feed(plain, keys, values))
    for name in ("keys", "values"):
        if name not in cache.state_fields:
            with pytest.raises(UnsupportedError, match="keys_and_values"):
                getattr(cache, name)
            with pytest.raises(UnsupportedError, match="keys_and_values"):
                setattr(cache, name, keys)

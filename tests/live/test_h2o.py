import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_model, tiny_tokens

from mlxkv import make_cache
from mlxkv.errors import InputError, PresetError
from mlxkv.live.methods.h2o import H2OCache, H2OConfig
from mlxkv.models import kv_slots
from mlxkv.spec import CacheSpec

B, HQ, H, D = 2, 4, 2, 8
HEAVY, RECENT = 6, 5


def new_cache(heavy=HEAVY, recent=RECENT):
    return H2OCache(H2OConfig(heavy=heavy, recent=recent), CacheSpec("llama", (kv_slots(H, D, None),)), 0)


def numbers(seed, *shape, wide=1.0):
    # float16 from the start, so that storing them changes nothing
    x = np.random.default_rng(seed).normal(size=shape) * wide
    return x.astype(np.float16).astype(np.float32)


def run(cache, queries, keys, values, chunks):
    """Outputs `[B, HQ, T, D]` of all tokens, chunk by chunk."""
    outputs, start = [], 0
    for length in chunks:
        q, k, v = (mx.array(x[:, :, start : start + length]) for x in (queries, keys, values))
        mask = cache.make_mask(length)
        outputs.append(np.array(cache.attend(q, *cache.update_and_fetch(k, v), D**-0.5, mask)))
        start += length
    return np.concatenate(outputs, axis=2)


def plain(queries, keys, values, chunks, heavy, recent):
    """The method for one kv head in NumPy: queries `[G, T, D]`; outputs, and which tokens are kept at the end."""
    kept, drawn, outputs, start = np.arange(0), np.zeros(keys.shape[0]), [], 0
    for length in chunks:
        new = np.arange(start, start + length)
        seen = np.concatenate([kept, new])
        scores = queries[:, new] @ keys[seen].T * D**-0.5
        scores[:, new[:, None] < seen[None]] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        outputs.append(weights @ values[seen])
        drawn[seen] += weights.sum(axis=(0, 1))
        old, last = seen[: max(0, len(seen) - recent)], seen[max(0, len(seen) - recent) :]
        heaviest = old[np.argsort(-drawn[old])[:heavy]] if len(seen) > heavy + recent else old
        kept = np.sort(np.concatenate([heaviest, last]))
        start += length
    return np.concatenate(outputs, axis=1), kept


def in_order(cache):
    """Keys and values kept, in the order they came."""
    keys, values, _, *rows = map(np.array, cache.tokens)
    order = np.argsort(rows[0], axis=-1)[..., None] if rows[0].ndim else slice(None)
    return [np.take_along_axis(x, order, axis=2) if rows[0].ndim else x for x in (keys, values)]


def random_chunks(rng, length):
    chunks = []
    while sum(chunks) < length:
        chunks.append(min(int(rng.choice([1, 1, 2, 7, 20])), length - sum(chunks)))
    return chunks


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("heavy", "recent"), [(HEAVY, RECENT), (4, 0), (9, 1)])
def test_each_head_keeps_what_a_plain_model_of_the_method_keeps(seed, heavy, recent):
    chunks = random_chunks(np.random.default_rng(seed), 48)
    queries, keys, values = (numbers(seed * 3 + i, B, h, 48, D, wide=2) for i, h in enumerate((HQ, H, H)))
    cache = new_cache(heavy, recent)
    outputs = run(cache, queries, keys, values, chunks)
    held_keys, held_values = in_order(cache)
    choices = set()
    for b in range(B):
        for h in range(H):
            group = slice(h * HQ // H, (h + 1) * HQ // H)
            expected, kept = plain(queries[b, group], keys[b, h], values[b, h], chunks, heavy, recent)
            assert np.allclose(outputs[b, group], expected, atol=1e-5)
            assert np.array_equal(held_keys[b, h], keys[b, h, kept])
            assert np.array_equal(held_values[b, h], values[b, h, kept])
            choices.add(tuple(kept))
    assert len(choices) > 1  # heads choose for themselves


@pytest.mark.parametrize("seed", range(4))
def test_there_are_never_more_tokens_than_the_budget_and_the_recent_ones_are_always_there(seed):
    chunks = random_chunks(np.random.default_rng(seed), 60)
    queries, keys, values = (numbers(seed * 3 + i, B, h, 60, D, wide=3) for i, h in enumerate((HQ, H, H)))
    cache = new_cache()
    for end, length in zip(np.cumsum(chunks), chunks):
        run(cache, *(x[:, :, end - length : end] for x in (queries, keys, values)), [length])
        assert cache.kept == min(end, HEAVY + RECENT)
        recent = keys[:, :, max(0, end - RECENT) : end]
        assert np.array_equal(in_order(cache)[0][:, :, -recent.shape[2] :], recent)
        a_token = H * (2 * D * 2 + 8)  # keys and values in 2 bytes an element, sum and time in 4
        assert cache.nbytes <= B * ((HEAVY + RECENT + 1) * a_token + H * 4)  # and a row more, whose number has 4


def test_a_token_that_everyone_looks_at_outlives_one_that_no_one_does():
    keys = numbers(0, 1, H, 40, D, wide=0.1)
    keys[:, :, 3] = 5
    keys[:, :, 9] = -5
    cache = new_cache()
    run(cache, np.full((1, HQ, 40, D), 1, np.float32), keys, keys, [20] + [1] * 20)
    held = np.array(cache.tokens.keys)[0, 0, :, 0]
    assert 5 in held
    assert -5 not in held
    assert float(cache.tokens.attention.max()) > 30 * HQ / H


@pytest.mark.parametrize("name", ["llama", "glm4_moe_lite", "lfm2"])
def test_with_room_for_every_token_the_model_says_what_it_says_with_the_whole_cache(name):
    model, tokens = tiny_model(name), mx.array([tiny_tokens(30)])
    whole = model(tokens)
    caches = make_cache(model, "h2o", heavy=20, recent=20)
    steps = [model(tokens[:, a:b], cache=caches) for a, b in ((0, 17), (17, 24), *((i, i + 1) for i in range(24, 30)))]
    assert np.allclose(np.array(mx.concatenate(steps, axis=1)), np.array(whole), atol=3e-2)  # stored as float16
    small = make_cache(model, "h2o", heavy=3, recent=3)
    model(tokens[:, :20], cache=small)
    assert np.abs(np.array(model(tokens[:, 20:], cache=small)) - np.array(whole[:, 20:])).max() > 0.1


@pytest.mark.parametrize("settings", [{"heavy": 0}, {"recent": -1}, {"heavy": 2.0}, {"recent": True}])
def test_impossible_settings_are_refused(settings):
    message = {"heavy": "heavy must be 1 or more", "recent": "recent must be 0 or more"}[next(iter(settings))]
    with pytest.raises(InputError, match=message):
        H2OConfig(**settings)
    with pytest.raises(PresetError, match=message):
        make_cache(tiny_model("llama"), "h2o-256", **settings)

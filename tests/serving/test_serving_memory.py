"""Caches that stay in RAM: the longest beginning, its order of use, its bounds, and that nobody shares one."""

import copy
import threading

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_model, tiny_tokens
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache
from zoo.build import build

from mlxkv import lm, make_cache
from mlxkv.live.base import live_methods
from mlxkv.serving.memory import RecentCaches, common_prefix


def rows(tokens, kind=KVCache, **more):
    """A prompt cache of one layer that holds so many tokens."""
    cache = kind(**more)
    part = mx.arange(tokens, dtype=mx.float32).reshape(1, 1, tokens, 1)
    cache.update_and_fetch(part, part)
    return [cache]


def insert(recent, tokens, model="model", kind="assistant", cache=None):
    recent.insert(model, np.array(tokens, dtype=np.int64), cache or rows(len(tokens)), kind)


def length(recent, tokens, model="model"):
    found = recent.fetch(model, np.array(tokens, dtype=np.int64), len(tokens) - 1)
    return 0 if found is None else found.length


@pytest.mark.parametrize(("prompt", "expected"), [
    ([1, 2, 3, 4, 9], 4), ([1, 2, 3, 4], 3), ([1, 2, 3, 9, 9], 3), ([1, 2], 1), ([1], 0), ([], 0), ([9, 2, 3], 0), ([1, 9], 1),
])  # fmt: skip
def test_a_prompt_gets_its_longest_beginning_and_a_token_to_compute(prompt, expected):
    recent = RecentCaches(10)
    insert(recent, [1, 2, 3, 4])
    found = recent.fetch("model", np.array(prompt, dtype=np.int64), len(prompt) - 1)
    assert (found.length if found else 0) == expected
    if found:
        assert found.cache[0].offset == expected
    assert length(recent, [1, 2, 3, 4, 5], "another model") == 0


def test_of_equally_long_beginnings_the_smallest_cache_is_taken():
    recent = RecentCaches(10)
    insert(recent, [1, 2, 3, 4, 5, 6], cache=rows(6, RotatingKVCache, max_size=8))
    insert(recent, [1, 2, 3, 7], cache=rows(4, RotatingKVCache, max_size=8))
    assert len(recent) == 2
    found = recent.fetch("model", np.array([1, 2, 3, 9]), 3)
    assert found.size == min(rows(n, RotatingKVCache, max_size=8)[0].nbytes for n in (4, 6))


def test_what_cannot_be_cut_is_used_whole_or_not_at_all():
    recent = RecentCaches(10)
    for tokens in ([1, 2, 3, 4], [1, 2, 3, 4, 5, 6]):
        insert(recent, tokens, cache=rows(len(tokens), RotatingKVCache, max_size=4))
    assert len(recent) == 2
    assert [length(recent, [1, 2, 3, 4, 5, 6, 7][:n]) for n in range(1, 8)] == [0, 0, 0, 0, 4, 4, 6]


def test_a_cache_that_can_be_cut_stands_for_its_beginnings():
    recent = RecentCaches(10)
    insert(recent, [1, 2], kind="system")
    insert(recent, [1, 2, 3, 4], kind="user")
    insert(recent, [1, 2, 9])
    assert len(recent) == 2
    assert recent.by_kind()["system"] == {"n_sequences": 0, "n_bytes": 0}
    assert length(recent, [1, 2, 7]) == 2
    insert(recent, [1, 2, 9])
    assert len(recent) == 2


def test_what_was_used_longest_ago_goes_first():
    recent, texts = RecentCaches(3), [[n, n, n] for n in range(1, 5)]
    for text in texts[:3]:
        insert(recent, text)
    assert length(recent, [*texts[0], 5]) == 3
    insert(recent, texts[3])
    assert [length(recent, [*text, 5]) for text in texts] == [3, 0, 3, 3]


def test_bytes_are_bounded_and_what_is_larger_than_all_of_them_drives_nothing_out():
    size = rows(300)[0].nbytes
    recent = RecentCaches(100, 3 * size)
    for first in range(1, 6):
        insert(recent, [first] * 300)
        assert recent.size <= 3 * size
    assert len(recent) == 3
    assert recent.size == sum(kind["n_bytes"] for kind in recent.by_kind().values()) == 3 * size
    insert(recent, [9] * 2000)
    assert len(recent) == 3
    recent.shrink(limit=size)
    assert len(recent) == 1
    recent.shrink(0)
    assert recent.size == len(recent) == 0


def test_the_newest_may_be_spared_whatever_its_size():
    size = rows(300)[0].nbytes
    recent = RecentCaches(100, size, spares_newest=True)
    for text, expected in (([1] * 300, 300), ([2] * 2000, 2000), ([3] * 2000, 2000)):
        insert(recent, text)
        assert len(recent) == 1
        assert length(recent, [*text, 5]) == expected
        recent.shrink(limit=0)
        assert len(recent) == 1
    insert(recent, [4] * 300)
    assert recent.size == size


def test_after_drafts_only_tokens_that_all_layers_hold_count():
    """mlx-lm's speculative decoding may leave the newest token out of a cache that it names among the tokens."""
    recent = RecentCaches(10)
    insert(recent, [1, 2, 3, 4, 5], cache=[*rows(4), *rows(5)])
    found = recent.fetch("model", np.array([1, 2, 3, 4, 5, 6]), 5)
    assert found.length == 4
    assert [layer.offset for layer in found.cache] == [4, 4]


def test_layers_that_a_model_never_fills_do_not_count():
    recent = RecentCaches(10)
    insert(recent, [1, 2, 3], cache=[KVCache(), *rows(3)])
    assert length(recent, [1, 2, 3, 4]) == 3


def test_lists_of_negative_tokens_are_texts_with_images():
    recent = RecentCaches(10)
    insert(recent, [1, -(2**59), -(2**59), 4])
    assert length(recent, [1, -(2**59), -(2**59), 4, 5]) == 4
    assert length(recent, [1, -(2**58), -(2**58), 4, 5]) == 1


@pytest.mark.parametrize("first", [0, 5, 1023, 1024, 1025, 3000])
def test_texts_are_compared_to_their_first_difference(first):
    one = np.arange(3000)
    other = one.copy()
    other[first:] += 1
    assert common_prefix(one, other) == common_prefix(other[: first + 1], one) == first


@pytest.fixture(scope="module")
def models():
    return {name: tiny_model(name) for name in ("llama", "lfm2")} | {"gemma3_text": build("gemma3_text", 0)}


def continued(model, cache, tokens):
    return np.array(lm.prefill(model, tokens, cache))


@pytest.mark.parametrize(("kind", "method"), [
    *(("llama", method) for method in ("mlx-lm", *sorted(live_methods.names()))),
    *((kind, method) for kind in ("lfm2", "gemma3_text") for method in ("mlx-lm", "int4", "kivi")),
])  # fmt: skip
def test_requests_never_share_a_cache(models, kind, method):
    """Two requests go on from one cache, in turns and by threads of their own; it stays as it was."""
    model = models[kind]
    vocabulary = model.args.vocab_size
    text, more = tiny_tokens(150, vocabulary=vocabulary), tiny_tokens(40, vocabulary=vocabulary, seed=2)
    cache = make_prompt_cache(model) if method == "mlx-lm" else make_cache(model, method)
    continued(model, cache, text)
    expected = continued(model, copy.deepcopy(cache), more)
    recent = RecentCaches(10)
    insert(recent, text, cache=cache)
    before = [np.array(array) for entry in cache for array in entry.state if isinstance(array, mx.array)]
    one, other = (recent.fetch("model", np.array([*text, 1]), len(text)) for _ in range(2))
    assert one.length == other.length == len(text)
    assert not {id(entry) for entry in one.cache} & {id(entry) for entry in [*other.cache, *cache]}
    continued(model, other.cache, more[::-1])
    answers = []
    thread = threading.Thread(target=lambda: answers.append(continued(model, one.cache, more)))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(answers[0], expected)
    again = recent.fetch("model", np.array([*text, 1]), len(text))
    np.testing.assert_array_equal(continued(model, again.cache, more), expected)
    after = [np.array(array) for entry in cache for array in entry.state if isinstance(array, mx.array)]
    assert all(map(np.array_equal, before, after))

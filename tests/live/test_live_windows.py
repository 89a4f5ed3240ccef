"""Layers with a sliding window, packed: what they show, what they keep, and what they refuse."""

import copy
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_model, tiny_tokens
from live_checks import lone_cache, stored
from mlx_lm.models.cache import RotatingKVCache, can_trim_prompt_cache, make_prompt_cache

from mlxkv.errors import FormatError, UnsupportedError
from mlxkv.live import live_methods, make_cache
from mlxkv.live.arrays import iter_arrays
from mlxkv.live.seam import assemble_cache
from mlxkv.live.serialization import load_cache, save_cache
from mlxkv.spec import CacheSpec, Layer, Slot

PACKING = {"int8": {}, "int4": {"sinks": 3}, "kivi": {"recent": 10, "sinks": 2}}
SLOTS = Slot("keys", 2, 16), Slot("values", 2, 8)
WINDOWS = (5, 100)  # shorter and longer than a block
CHUNKS = {"one chunk": (330, 1, 1), "bit by bit": (70, 1, 1, 7, 33, *[1] * 20, 16, 2, 130, *[1] * 20)}
SINKS = mx.array([0.5, -1.0, 2.0, -mx.inf])


def spec_of(window, use="seam"):
    return CacheSpec("toy", (Layer(*SLOTS, window=window, use=use), Layer(*SLOTS)))


def windowed(method, window, use="seam"):
    return lone_cache(method, spec_of(window, use), **PACKING[method])


def numbers(seed, heads, length, dim=16):
    return mx.random.normal((1, heads, length, dim), key=mx.random.key(seed))


def chunks_of(total, sizes):
    """Queries, keys and values of each chunk."""
    parts = numbers(1, 4, total), numbers(2, 2, total), numbers(3, 2, total, 8)
    for start, stop in pairwise(np.cumsum([0, *sizes]).tolist()):
        yield [part[:, :, start:stop] for part in parts]


def fed(cache, total, sizes):
    """Feed chunks with the masks that the cache makes; returns the outputs."""
    outputs = []
    for queries, keys, values in chunks_of(total, sizes):
        mask = cache.make_mask(keys.shape[2], window_size=cache.window)
        outputs.append(cache.attend(queries, *cache.update_and_fetch(keys, values), 0.3, mask, SINKS))
    return mx.concatenate(outputs, axis=2)


def seen_positions(position, window):
    return slice(max(0, position - window + 1), position + 1)


def with_sink(queries, keys, values):
    """Attention of one query in NumPy, a sink's logit in the denominator."""
    scores = 0.3 * queries @ keys.repeat(2, axis=1).swapaxes(-1, -2)
    weights = np.exp(scores)
    weights /= weights.sum(axis=-1, keepdims=True) + np.exp(np.array(SINKS))[:, None, None]
    return weights @ values.repeat(2, axis=1)


# What a query sees


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("method", PACKING)
def test_each_query_sees_its_window_as_it_is_stored_and_its_chunk_exactly(method, window, chunks):
    cache, start = windowed(method, window), 0
    sizes = CHUNKS[chunks]
    for queries, keys, values in chunks_of(sum(sizes), sizes):
        before, small = copy.deepcopy(cache), 1 < keys.shape[2] <= 16
        mask = cache.make_mask(keys.shape[2], window_size=window)
        output = np.array(cache.attend(queries, *cache.update_and_fetch(keys, values), 0.3, mask, SINKS))
        new = [np.array(part) for part in (queries, keys, values)]
        for i in {0, keys.shape[2] // 2, keys.shape[2] - 1} if not small else ():
            position = start + i
            old = [stored(before, slot) for slot in (0, 1)]
            old = [np.zeros((1, *x.shape[1:2], 0, x.shape[3])) if o is None else o for o, x in zip(old, new[1:])]
            rows = seen_positions(position, window)
            first = start - old[0].shape[2]  # position of the oldest stored token
            assert first <= rows.start
            rows = slice(rows.start - first, rows.stop - first)
            k, v = (np.concatenate(pair, axis=2)[:, :, rows] for pair in zip(old, new[1:]))
            expected = with_sink(new[0][:, :, i : i + 1], k, v)
            np.testing.assert_allclose(output[:, :, i : i + 1], expected, atol=2e-3)
        start += keys.shape[2]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("method", PACKING)
def test_small_chunks_are_read_as_decoding_reads_them_across_the_windows_edge(method, window):
    sizes = (125, *[5] * 14)
    one_by_one = (125, *[1] * 70)
    caches = [windowed(method, window) for _ in range(2)]
    outputs = [fed(cache, 195, each) for cache, each in zip(caches, (sizes, one_by_one))]
    np.testing.assert_allclose(*outputs, atol=1e-5)
    assert [a.tolist() for a in iter_arrays(caches[0].state)] == [a.tolist() for a in iter_arrays(caches[1].state)]


@pytest.mark.parametrize("return_array", [False, True])
@pytest.mark.parametrize(("asked", "count"), [(w, n) for w in (None, 20, 21, 7) for n in (1, 2, 20, 50)])
def test_masks_show_what_those_of_mlx_lms_own_cache_do(asked, count, return_array):
    for seen in (0, 10, 19, 20, 21, 150):
        own, ours = RotatingKVCache(max_size=20), windowed("int8", 20)
        for part in range(seen) if seen < 30 else [0]:
            length = 1 if seen < 30 else seen
            keys = numbers(part, 2, length)
            (
                own.update_and_fetch(keys, keys),
                ours.attend(keys, *ours.update_and_fetch(keys, keys[..., :8]), 1.0, "causal"),
            )
        if count == 1 and asked == 7 and seen >= 20:
            continue  # there mlx-lm's own mask has the order of its ring
        theirs = _visible(own.make_mask(count, asked, return_array), count, min(seen, 19))
        mask = ours.make_mask(count, return_array, asked)
        if mask is None:  # then the cache itself hides what is before the window
            mask = mx.arange(ours.kept + 1) >= ours.kept - 19
        mask = _visible(mask, count, ours.kept)
        width = min(mask.shape[1], theirs.shape[1])
        assert np.array_equal(theirs[:, -width:], mask[:, -width:]), seen
        assert not mask[:, :-width].any()


def _visible(mask, count, older):
    """A mask as bool `[count, older + count]`."""
    if mask is None or isinstance(mask, str):
        return np.tril(np.ones((count, older + count), bool), older)
    return np.broadcast_to(np.array(mask), (count, mask.shape[-1]))


@pytest.mark.parametrize("sizes", [(400,), (200, 1, 199), (100, 16, 284), tuple([1] * 260)], ids=len)
@pytest.mark.parametrize("window", WINDOWS)
def test_where_the_model_fetches_it_gets_what_its_masks_show(window, sizes):
    """All tokens of the window, and no more columns than the mask has."""
    cache, start = windowed("int8", window, use="fetch"), 0
    for _, keys, values in chunks_of(sum(sizes), sizes):
        length = keys.shape[2]
        mask = cache.make_mask(length, window_size=window)
        fetched = cache.update_and_fetch(keys, values)
        again = cache.keys_and_values()
        assert mx.array_equal(fetched[0][:, :, -length:], keys)
        columns = _visible(mask, length, fetched[0].shape[2] - length)
        assert columns.shape == (length, fetched[0].shape[2])
        assert [part.shape for part in again] == [part.shape for part in fetched]
        np.testing.assert_allclose(again[0].astype(mx.float32), fetched[0], atol=0.05)
        for i in (0, length - 1):
            assert columns[i].sum() == min(start + i + 1, window)
        start += length
    assert cache.kept <= window + 64 + sizes[-1]


# What is kept


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("method", PACKING)
def test_no_more_is_kept_than_a_window_and_a_block_however_the_text_comes(method, window):
    kept = []
    for sizes in ((400,), (256, 144), tuple([1] * 400), (300, *[1] * 100)):
        cache = windowed(method, window)
        for queries, keys, values in chunks_of(400, sizes):
            mask = cache.make_mask(keys.shape[2], window_size=window)
            cache.attend(queries, *cache.update_and_fetch(keys, values), 0.3, mask)
            assert cache.kept < window + cache.block
            assert cache.size() == min(cache.offset, cache.max_size) == min(cache.offset, window)
        kept.append((cache.kept, [array.tolist() for array in iter_arrays(cache.state)]))
        cache.check_state()
    assert all(each == kept[0] for each in kept)


@pytest.mark.parametrize("method", PACKING)
def test_a_window_as_long_as_the_text_changes_nothing(method):
    sizes = CHUNKS["bit by bit"]
    outputs, states = zip(*((fed(cache, sum(sizes), sizes), cache.state) for cache in
                            (windowed(method, sum(sizes)), lone_cache(method, spec_of(None), **PACKING[method]))))  # fmt: skip
    assert mx.array_equal(*outputs)
    assert all(mx.array_equal(*pair) for pair in zip(*map(iter_arrays, states), strict=True))


# Taking tokens back


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("method", PACKING)
def test_tokens_are_taken_back_exactly_while_what_is_seen_then_is_still_there(method, window):
    refused = 0
    for seen in (3, 90, 163, 170, 200):
        for count in (1, 4, 40):
            cache, fresh = windowed(method, window), windowed(method, window)
            fed(cache, 300, (seen - 3, *[1] * 3)) if seen > 3 else fed(cache, 300, (1, 1, 1))
            if count > seen or not cache.can_take_back(count):
                refused += 1
                continue
            assert cache.trim(count) == count
            if seen > count:
                fed(fresh, 300, (seen - count,))
            assert cache.offset == fresh.offset
            cache.check_state()
            rows = min(cache.kept, fresh.kept)
            assert rows >= min(window - 1, cache.offset)
            for slot in (0, 1):
                if rows:
                    ours, theirs = (stored(each, slot)[:, :, -rows:] for each in (cache, fresh))
                    np.testing.assert_allclose(ours, theirs, atol=1.3)  # which may have been rounded to 2 bits
    assert refused
    cache = windowed(method, window)
    fed(cache, 240, (220, 8))
    with pytest.raises(UnsupportedError, match="cannot take 200 tokens back"):
        cache.trim(200)


@pytest.mark.parametrize(
    ("window", "around"), [(100, 160), (65, 122)]
)  # with the latter one is packed at the same time
@pytest.mark.parametrize("method", PACKING)
def test_part_of_a_small_chunk_is_taken_back_exactly_though_a_block_was_dropped(method, window, around):
    for before in range(around, around + 10):
        cache, fresh = windowed(method, window), windowed(method, window)
        fed(cache, 300, (before, 8))
        fed(fresh, 300, (before, 1))
        assert cache.trim(7) == 7
        assert [a.tolist() for a in iter_arrays(cache.state)] == [a.tolist() for a in iter_arrays(fresh.state)]


def test_a_cache_with_windows_is_not_trimmable_from_the_start():
    model = sliding(window=30)
    caches = make_cache(model, "int8")
    assert not any(entry.is_trimmable() for entry in caches)
    assert not can_trim_prompt_cache(caches)


# In models and files


def sliding(window, layers=2):
    """A llama whose first layer alone attends to everything."""
    kinds = ["full_attention", *["sliding_attention"] * (layers - 1)]
    return tiny_model("llama", num_hidden_layers=layers, layer_types=kinds, sliding_window=window)


@pytest.mark.parametrize("method", sorted(live_methods.names()))
def test_windows_are_packed_by_methods_that_can_and_mlx_lms_own_otherwise(method):
    caches = make_cache(sliding(window=30), method)
    packs = live_methods.get(method).takes_windows
    assert packs == (method in PACKING)
    beside = {"klt": live_methods.get("int4")}.get(method, RotatingKVCache)
    assert type(caches[1]) is (type(caches[0]) if packs else beside)


def test_layers_of_one_mask_are_live_all_or_none():
    model = sliding(window=30, layers=3)
    live = {layer: (type(entry), entry.config) for layer, entry in enumerate(make_cache(model, "int8"))}
    assemble_cache(model, live)
    with pytest.raises(UnsupportedError, match="all of them or to none"):
        assemble_cache(model, {0: live[0], 1: live[1]})
    h2o = make_cache(tiny_model("llama"), "h2o")[0]
    with pytest.raises(UnsupportedError, match="layer 1 of this llama model has a sliding window, where h2o does not"):
        assemble_cache(model, dict.fromkeys(range(3), (type(h2o), h2o.config)))


def test_methods_may_differ_between_layers_of_one_mask():
    model = sliding(window=20, layers=3)
    kivi = {"bits": 8, "recent": 10, "sinks": 2}
    methods = [
        make_cache(model, name, **settings)[0] for name, settings in (("int8", {}), ("int8", {}), ("kivi", kivi))
    ]
    caches = assemble_cache(model, {i: (type(entry), entry.config) for i, entry in enumerate(methods)})
    own = make_prompt_cache(model)
    for size in (100, 1, 9, 1, 60):
        tokens = mx.array([tiny_tokens(size)])
        assert mx.allclose(model(tokens, cache=caches), model(tokens, cache=own), atol=0.3)
    assert caches[1].kept != caches[2].kept


def test_a_saved_window_holds_its_rows_alone_and_a_forged_one_is_refused(tmp_path):
    model = sliding(window=20)
    caches = make_cache(model, "int8")
    for size in (150, 1, 40):
        mx.eval(model(mx.array([tiny_tokens(size)]), cache=caches))
    save_cache(tmp_path / "cache", model, caches)
    loaded = load_cache(tmp_path / "cache", model)
    assert (loaded[1].kept, loaded[1].offset) == (191 - 128, 191)
    for size in (1, 5, 70):
        tokens = mx.array([tiny_tokens(size, seed=size)])
        assert mx.array_equal(model(tokens, cache=loaded), model(tokens, cache=caches))
    entry = loaded[1]
    for offset, tail in ((entry.offset + 1, entry.tail), (entry.offset, entry.tail.copy_tokens(1))):
        before = entry.offset, entry.tail
        entry.offset, entry.tail = offset, tail
        with pytest.raises(FormatError, match="entries are stored, but"):
            entry.check_state()
        entry.offset, entry.tail = before


def test_a_file_of_before_windows_were_described_goes_on(tmp_path, monkeypatch):
    model = sliding(window=20)
    caches = make_cache(model, "full")
    mx.eval(model(mx.array([tiny_tokens(50)]), cache=caches))
    now = caches[0].spec
    old = CacheSpec(now.model_type, (now.layers[0], None))
    with monkeypatch.context() as patched:
        patched.setattr("mlxkv.live.serialization.cache_spec", lambda _: old)
        caches[0].spec = old
        save_cache(tmp_path / "cache", model, caches)
    loaded = load_cache(tmp_path / "cache", model)
    assert type(loaded[1]) is RotatingKVCache
    tokens = mx.array([tiny_tokens(5)])
    assert mx.array_equal(model(tokens, cache=loaded), model(tokens, cache=caches))

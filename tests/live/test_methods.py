"""Every live method on every architecture. Methods are found in the registry: a new one is tested without an edit."""

import dataclasses
import json
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from conftest import DIFFERENT, tiny_model, tiny_tokens
from live_checks import DECODED, METHODS, checked_cache, feed, lone_cache, small, stored

from mlxkv import presets
from mlxkv.live import LayerCache, live_config, live_methods, make_cache
from mlxkv.live.arrays import iter_arrays
from mlxkv.live.base import cache_class_of
from mlxkv.live.tail import STEP
from mlxkv.spec import CacheSpec, Slot

TOY = CacheSpec("toy", ((Slot("keys", 2, 16), Slot("values", 2, 8)),))


def chunks(tokens, sizes):
    start = 0
    for size in sizes:
        yield mx.array([row[start : start + size] for row in tokens])
        start += size


CHUNKINGS = {"one chunk": [100, 1, 1], "filled bit by bit": [*[7] * 6, *[1] * 12]}


@pytest.mark.parametrize("chunking", CHUNKINGS)
@pytest.mark.parametrize("architecture", DIFFERENT)
@pytest.mark.parametrize("method", METHODS)
def test_a_query_sees_the_stored_tokens_as_stored_and_its_chunk_exactly(method, architecture, chunking):
    model = tiny_model(architecture)
    caches = checked_cache(model, method)
    sizes = CHUNKINGS[chunking]
    for chunk in chunks([tiny_tokens(sum(sizes))], sizes):
        mx.eval(model(chunk, cache=caches))
    live = [entry for entry in caches if hasattr(entry, "attended")]
    assert [(entry.attended, entry.offset) for entry in live] == [(len(sizes), sum(sizes))] * len(live)
    assert len({entry.kept for entry in live}) == 1, "one mask serves all layers, so they keep equally many tokens"


@pytest.mark.parametrize("architecture", DIFFERENT)
@pytest.mark.parametrize("method", METHODS)
def test_rows_of_a_batch_do_not_see_each_other(method, architecture):
    model, rows = tiny_model(architecture), [tiny_tokens(90, seed=1), tiny_tokens(90, seed=2)]
    together, alone = make_cache(model, method, **small(method)), make_cache(model, method, **small(method))
    for both, first in zip(chunks(rows, [70, 1, 19]), chunks(rows[:1], [70, 1, 19])):
        np.testing.assert_allclose(model(both, cache=together)[:1], model(first, cache=alone), atol=5e-2)


@pytest.mark.parametrize("method", METHODS)
def test_bytes_are_those_of_the_arrays_held(method):
    cache = lone_cache(method, TOY)
    assert (cache.nbytes, cache.kept, cache.offset, cache.empty()) == (0, 0, 0, True)
    fill(cache, 200)
    used = sum(array.nbytes for array in iter_arrays(cache.state))
    assert 0 < used <= cache.nbytes < used + STEP * 2 * (16 + 8) * 2  # rows in advance, of 2 heads in float16
    assert not cache.empty()
    packed = sum(part.nbytes for bucket in cache.buckets() for part in bucket)
    assert cache.nbytes >= packed or method in DECODED, "buckets hold something that state does not"


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"full"}))
def test_a_method_saves_bytes(method):
    cache, full = lone_cache(method, TOY), lone_cache("full", TOY)
    for each in (cache, full):
        fill(each, 512)
    assert cache.nbytes < full.nbytes / 2


@pytest.mark.parametrize("kept", [15, 150])
@pytest.mark.parametrize("method", METHODS)
def test_trimming_and_going_on_is_as_if_the_tokens_had_never_come(method, kept):
    cache, fresh = lone_cache(method, TOY), lone_cache(method, TOY)
    fill(cache, kept + 5, upto=200)
    if not cache.can_take_back(5):
        pytest.skip("this method cannot undo what it did with these tokens")
    assert cache.trim(5) == 5
    fill(fresh, kept, upto=200)
    assert (cache.offset, cache.kept) == (fresh.offset, fresh.kept) == (kept, kept)
    for slot in (0, 1):
        np.testing.assert_allclose(stored(cache, slot), stored(fresh, slot), atol=1e-3)
    assert cache.trim(1000) == kept
    assert (cache.offset, cache.kept) == (0, 0)
    fill(cache, 10)
    assert cache.kept == 10


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_registered_once_and_its_settings_check_themselves(method):
    cache_class, settings = live_methods.get(method), live_config(method)
    assert method == live_methods.name_of(cache_class) == lone_cache(method, TOY).method_name
    assert issubclass(cache_class, LayerCache)
    assert cache_class_of(settings) is cache_class
    assert type(settings) is cache_class.config_class
    assert type(settings)(**dataclasses.asdict(settings)) == settings
    assert type(settings).from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.anything = 1
    for name in (f.name for f in dataclasses.fields(settings) if f.type in ("int", "float", int, float)):
        with pytest.raises(presets.PresetError, match=name):
            live_config(method, **{name: -1})


@pytest.mark.parametrize("method", [m for m in METHODS if live_methods.get(m).__module__.startswith("mlxkv.")])
def test_each_method_of_ours_has_a_preset_and_a_preset_named_like_a_method_is_of_it(method):
    found = {name: presets.method_preset(name).method for name in presets.preset_names("methods")}
    assert method in found.values()
    assert found.get(method, method) == method


@pytest.mark.parametrize(
    "name", [n for n in presets.preset_names("methods") if presets.method_preset(n).method in METHODS]
)
def test_every_live_preset_makes_caches(name):
    caches, preset = make_cache(tiny_model("llama", head_dim=64), name), presets.method_preset(name)
    expected = preset.config(live_methods.get(preset.method).config_class)
    assert all(entry.config == expected for entry in caches)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_output_and_storage_keep_the_models_half_types(method, dtype):
    cache = lone_cache(method, TOY)
    outputs = fill(cache, 90, dtype=dtype)
    assert {output.dtype for output in outputs} == {dtype}
    assert {part.dtype for bucket in cache.buckets() for part in bucket} == {dtype}


def fill(cache, count, upto=None, dtype=mx.float32):
    """Feed the first count of upto random tokens, in chunks of 13; returns the outputs."""
    keys = mx.random.normal((1, 2, upto or count, 16), key=mx.random.key(1)).astype(dtype)
    values = mx.random.normal((1, 2, upto or count, 8), key=mx.random.key(2)).astype(dtype)
    edges = [*range(0, count, 13), count]
    return [feed(cache, keys[:, :, a:b], values[:, :, a:b]) for a, b in pairwise(edges)]

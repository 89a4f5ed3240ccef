"""int4 and kivi as they are by default: 4 sinks exact, the rest rotated; and as they were before, by settings and from files."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_model, tiny_tokens
from forging import forge, header_of
from live_checks import feed, lone_cache, stored

from mlxkv.errors import FormatError
from mlxkv.kernels.bits import pack
from mlxkv.live import live_config, make_cache
from mlxkv.live.arrays import iter_arrays
from mlxkv.live.base import live_methods
from mlxkv.live.serialization import load_cache, save_cache
from mlxkv.spec import CacheSpec, Slot

METHODS = ["int4", "kivi"]
BEFORE = {"int4": {"rotate": False, "sinks": 0}, "kivi": {"rotate": False, "sinks": 0, "recent": 128}}


def spec(dim, heads=2):
    return CacheSpec("toy", ((Slot("keys", heads, dim), Slot("values", heads, dim)),))


def normal(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def cache_of(method, dim, before=False):
    return lone_cache(method, spec(dim), **(BEFORE[method] if before else {"sinks": 4}))


def with_means(tokens, dim):
    """Keys whose channels have constant means, a few of them large, as models have them."""
    means = normal(1, 2, 1, dim, seed=3) * mx.where(mx.arange(dim) % 16 == 3, 12, 0.5)
    return normal(1, 2, tokens, dim, seed=1) + means, normal(1, 2, tokens, dim, seed=2)


@pytest.mark.parametrize("method", METHODS)
def test_the_first_four_tokens_stay_as_they_are_also_after_trim(method):
    cache, (keys, values) = cache_of(method, 64), with_means(400, 64)
    feed(cache, keys, values)
    for left in (400, 333, 199, 66, 30, 3):
        cache.trim(cache.offset - left)
        assert cache.kept == left
        for slot, x in enumerate((keys, values)):
            first = np.array(x.astype(mx.float16).astype(mx.float32))[:, :, : min(4, left)]
            assert np.array_equal(stored(cache, slot)[:, :, :4], first)
    cache.trim(3)
    feed(cache, keys, values)
    assert np.array_equal(stored(cache, 0)[:, :, :4], keys[:, :, :4].astype(mx.float16).astype(mx.float32))


@pytest.mark.parametrize("method", METHODS)
def test_a_text_as_short_as_the_sinks_is_exact(method):
    cache, (keys, values) = cache_of(method, 64), with_means(3, 64)
    feed(cache, keys, values)
    assert cache.packed is None
    assert np.array_equal(stored(cache, 0), keys.astype(mx.float16).astype(mx.float32))


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 72, 33])
def test_constant_means_of_channels_cost_int4_little_on_heads_of_any_width(dim):
    keys, values = with_means(400, dim)
    queries = normal(1, 4, 1, dim, seed=7)
    exact = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.3, mask=None)
    errors = []
    for before in (True, False):
        cache = cache_of("int4", dim, before)
        feed(cache, keys[:, :, :-1], values[:, :, :-1], normal(1, 4, 399, dim))
        errors.append(mx.abs(feed(cache, keys[:, :, -1:], values[:, :, -1:], queries) - exact).mean().item())
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("method", METHODS)
def test_1024_tokens_take_no_more_bytes_than_before(method, dim):
    after, before = cache_of(method, dim), cache_of(method, dim, before=True)
    if method == "kivi":
        after = lone_cache("kivi", spec(dim), bits=2)
    for cache in (after, before):
        cache.offset = 1024
        cache.absorb(*mx.zeros((2, 1, 2, 1024, dim), mx.float16), None)
    assert after.nbytes <= before.nbytes


@pytest.mark.parametrize("method", METHODS)
def test_with_both_off_tokens_are_packed_as_before(method):
    cache, (keys, values) = cache_of(method, 64, before=True), with_means(300, 64)
    feed(cache, keys, values)
    keys, values = (x.astype(mx.float16)[:, :, : 256 if method == "int4" else 128] for x in (keys, values))
    forms = [(4, 1, 64)] * 2 if method == "int4" else [(2, 32, 1), (2, 1, 32)]
    expected = [pack(x, *form) for x, form in zip((keys, values), forms)]
    assert all(map(mx.array_equal, iter_arrays(cache.packed), iter_arrays(expected)))
    assert cache.first is None


@pytest.mark.parametrize("method", METHODS)
def test_settings_of_files_of_before_mean_what_they_meant(method):
    kind = live_methods.get(method).config_class
    old = kind.from_saved({"residual": 7} if method == "kivi" else {})
    assert (old.rotate, old.sinks) == (False, 0)
    assert kind.from_saved(kind().to_dict()) == kind() == live_config(method)
    assert (kind().rotate, kind().sinks) == (True, 4)


@pytest.mark.parametrize("method", METHODS)
def test_a_file_of_before_goes_on_as_it_would_have(method, tmp_path):
    """The file is made from one of today, with the settings taken out that there were not."""
    model, tokens = tiny_model("llama", num_hidden_layers=1), mx.array([tiny_tokens(300)])
    caches = make_cache(model, method, **BEFORE[method])
    mx.eval(model(tokens, cache=caches))
    save_cache(tmp_path / "cache", model, caches)
    header, body = header_of((tmp_path / "cache").read_bytes())
    for name in ("rotate", "sinks"):
        del header["methods"][0][1][name]
    (tmp_path / "old").write_bytes(forge(header, body))
    loaded = load_cache(tmp_path / "old", model)
    assert mx.array_equal(model(tokens, cache=loaded), model(tokens, cache=caches))
    assert [a.tolist() for a in iter_arrays(loaded[0].packed)] == [a.tolist() for a in iter_arrays(caches[0].packed)]


@pytest.mark.parametrize("method", METHODS)
def test_a_file_whose_settings_and_tokens_differ_in_rotation_is_refused(method, tmp_path):
    model = tiny_model("llama", num_hidden_layers=1)
    caches = make_cache(model, method)
    mx.eval(model(mx.array([tiny_tokens(300)]), cache=caches))
    save_cache(tmp_path / "cache", model, caches)
    header, body = header_of((tmp_path / "cache").read_bytes())
    for _, part in header["layers"][0][2]["dict"]:
        for packed in part["tuple"] if part and "packed" in part["tuple"][0] else []:
            packed["packed"] = packed["packed"][:7]
    (tmp_path / "forged").write_bytes(forge(header, body))
    with pytest.raises(FormatError, match="rotated"):
        load_cache(tmp_path / "forged", model)


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_goes_on_alike_and_alone(method):
    model, tokens = tiny_model("llama", num_hidden_layers=1), mx.array([tiny_tokens(300)])
    caches = make_cache(model, method)
    mx.eval(model(tokens, cache=caches))
    copied = copy.deepcopy(caches)
    assert mx.array_equal(model(tokens, cache=caches), model(tokens, cache=copied))
    copied[0].trim(250)
    assert caches[0].kept == 600


@pytest.mark.parametrize("method", METHODS)
def test_latents_are_rotated_and_the_part_that_is_unpacked_for_every_token_is_not(method):
    model = tiny_model("glm4_moe_lite")
    caches = make_cache(model, method, **({"rotate_keys": True} if method == "kivi" else {}))
    for chunk in (300, 1, 1):
        output = model(mx.array([tiny_tokens(chunk)]), cache=caches)
    assert mx.isfinite(output).all()
    assert [part.rotated for part in caches[0].packed] == [True, False]

"""States of layers without keys and values come back bit by bit, in their own type, whatever type the cache has."""

import dataclasses
import json
import threading

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, tiny_model, tiny_tokens
from forging import header_of
from mlx_lm.models.cache import KVCache, make_prompt_cache

import mlxkv
from mlxkv import lm
from mlxkv.codec.calibrate import calibrate
from mlxkv.codec.methods.kvtc import KVTCConfig
from mlxkv.codec.session import CacheCodec
from mlxkv.dump import STATE_TYPES, read_dump, write_dump
from mlxkv.errors import FormatError, MismatchError, UnsupportedError
from mlxkv.models import cache_spec

FLOATS = ["float32", "float16", "bfloat16"]


def bits(array):
    return np.array(mx.contiguous(array).view(mx.uint8)).tobytes()


def hybrid(dtype):
    model = tiny_model("lfm2")
    model.set_dtype(getattr(mx, dtype))
    return model


def filled(model, state_type, tokens):
    """A cache after tokens whose first state, of another layer, has been computed in a type of its own."""
    cache = make_prompt_cache(model)
    lm.prefill(model, tokens, cache)
    state = mx.random.normal(cache[0][0].shape, key=mx.random.key(7))  # float32 with all its bits
    cache[0][0] = state.astype(state_type)
    return cache


def taken_from(model, cache, tokens):
    return lm.extract_cache(cache, cache_spec(model), [tokens], fingerprint=lm.fingerprint(model))


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    """Returns a codec for a model."""

    def make(model):
        folder = tmp_path_factory.mktemp("calibration")
        write_dump(folder / "a.npz", lm.dump(model, tiny_tokens(150)))
        return CacheCodec(calibrate([folder / "a.npz"], KVTCConfig(compression_ratio=4)), recent=20)

    return make


@pytest.mark.parametrize("state", FLOATS)
@pytest.mark.parametrize("keys", FLOATS)
def test_a_state_comes_back_bit_by_bit_through_every_format(keys, state, codec, tmp_path):
    model, tokens = hybrid(keys), tiny_tokens(60)
    cache = filled(model, getattr(mx, state), tokens)
    taken = taken_from(model, cache, tokens)
    write_dump(tmp_path / "cache.npz", taken)
    coder = codec(model)
    for dump in (taken, read_dump(tmp_path / "cache.npz"), coder.decompress_dump(coder.compress_dump(taken))):
        restored = lm.restore(model, dump)
        assert dump.dtype == keys
        for layer in (0, 2):
            assert restored[layer][0].dtype == cache[layer][0].dtype
            assert bits(restored[layer][0]) == bits(cache[layer][0])


@pytest.mark.parametrize("state", FLOATS)
def test_a_live_cache_keeps_the_states_beside_it_bit_by_bit(state, tmp_path):
    model, tokens = hybrid("float16"), tiny_tokens(60)
    caches = mlxkv.make_cache(model, "int8")
    lm.prefill(model, tokens, caches)
    caches[0][0] = mx.random.normal(caches[0][0].shape, key=mx.random.key(7)).astype(getattr(mx, state))
    mlxkv.save_cache(tmp_path / "live.cache", model, caches)
    again = mlxkv.load_cache(tmp_path / "live.cache", model)
    assert again[0][0].dtype == caches[0][0].dtype
    assert bits(again[0][0]) == bits(caches[0][0])


@pytest.mark.parametrize("kind", sorted(STATE_TYPES))
def test_a_state_of_any_type_goes_through_dump_and_codec(kind, codec, tmp_path):
    model, tokens = hybrid("float16"), tiny_tokens(60)
    values = mx.array([[[0, 1, 2, 3]]]).astype(getattr(mx, {"bool": "bool_"}.get(kind, kind)))
    cache = make_prompt_cache(model)
    lm.prefill(model, tokens, cache)
    cache[0][0] = values
    taken = taken_from(model, cache, tokens)
    assert taken.state_types["0.0"] == kind
    write_dump(tmp_path / "cache.npz", taken)
    coder = codec(model)
    for dump in (read_dump(tmp_path / "cache.npz"), coder.decompress_dump(coder.compress_dump(taken))):
        assert dump.state_types == taken.state_types
        assert dump.states["0.0"].dtype == STATE_TYPES[kind]
        assert dump.states["0.0"].tolist() == taken.states["0.0"].tolist()


def test_a_state_that_no_file_can_hold_is_refused():
    model, tokens = hybrid("float16"), tiny_tokens(6)
    with pytest.raises(UnsupportedError, match="complex64"):
        taken_from(model, filled(model, mx.complex64, tokens), tokens)


def test_a_state_of_another_kind_than_the_models_is_refused():
    model, tokens = hybrid("float16"), tiny_tokens(6)
    with pytest.raises(MismatchError, match=r"state 0\.0 of the dump is int32"):
        lm.restore(model, taken_from(model, filled(model, mx.int32, tokens), tokens))


def test_a_part_of_a_file_without_its_last_token_has_no_states(codec):
    model = hybrid("bfloat16")
    coder = codec(model)
    part = coder.decompress_dump(coder.compress_dump(lm.dump(model, tiny_tokens(60))), tokens=(0, 30))
    assert part.states == part.state_types == {}


# Files of before and forged ones


def test_a_dump_that_names_no_types_restores_its_states_in_the_type_of_the_cache(tmp_path):
    model, tokens = hybrid("bfloat16"), tiny_tokens(20)
    taken = dataclasses.replace(lm.dump(model, tokens), state_types={})
    write_dump(tmp_path / "old.npz", taken)
    assert lm.restore(model, read_dump(tmp_path / "old.npz"))[0][0].dtype == mx.bfloat16


@pytest.mark.parametrize("types", [["0.0"], {"0.0": 3}, {"0.0": "float8"}, {"0.0": []}, "float32", None], ids=str)
def test_forged_types_are_refused(types, tmp_path):
    write_dump(tmp_path / "cache.npz", lm.dump(hybrid("float16"), tiny_tokens(5)))
    arrays = dict(np.load(tmp_path / "cache.npz"))
    arrays["meta"] = np.array(json.dumps({**json.loads(str(arrays["meta"])), "state_types": types}))
    np.savez(tmp_path / "forged.npz", **arrays)
    with pytest.raises(FormatError, match="no types of states"):
        read_dump(tmp_path / "forged.npz")


@pytest.mark.parametrize("types", [{"0.0": "float16"}, {"0.0": "float16", "2.0": "int8"}, {"9.0": "float16"}], ids=str)
def test_types_of_other_states_than_those_there_are_refused(types, tmp_path):
    taken = lm.dump(hybrid("float16"), tiny_tokens(5))
    with pytest.raises(MismatchError, match="states are not of the types"):
        dataclasses.replace(taken, state_types=types)


@pytest.mark.parametrize("array", [np.array(["text"]), np.array([1j]), np.zeros(3, ">f4")], ids=lambda a: str(a.dtype))
def test_a_state_of_a_type_that_no_layer_keeps_is_refused(array, tmp_path):
    write_dump(tmp_path / "cache.npz", lm.dump(hybrid("float16"), tiny_tokens(5)))
    arrays = {**np.load(tmp_path / "cache.npz"), "state.0.0": array}
    np.savez(tmp_path / "forged.npz", **arrays)
    with pytest.raises(FormatError, match="no layer keeps a state"):
        read_dump(tmp_path / "forged.npz")


def test_files_of_models_without_states_name_no_types(codec):
    model = tiny_model("llama")
    header, _ = header_of(codec(model).compress_dump(lm.dump(model, tiny_tokens(60))))
    assert "state_types" not in header["meta"]


# Threads and offsets


@pytest.mark.parametrize("name", sorted(TINY))
def test_a_restored_cache_works_in_another_thread(name):
    model, tokens = tiny_model(name), tiny_tokens(30)
    restored, found = lm.restore(model, lm.dump(model, tokens)), []
    thread = threading.Thread(target=lambda: found.append(np.array(model(mx.array([[5]]), cache=restored))))
    thread.start()
    thread.join()
    assert np.isfinite(found[0]).all()


def test_a_dump_holds_nothing_of_tokens_that_were_taken_back():
    model, tokens = tiny_model("llama"), tiny_tokens(30)
    cache = make_prompt_cache(model)
    lm.prefill(model, tokens, cache)
    for entry in cache:
        entry.trim(10)
    taken = taken_from(model, cache, tokens[:20])
    fresh = lm.dump(model, tokens[:20])
    assert taken.k.shape == fresh.k.shape
    assert np.allclose(taken.k, fresh.k, atol=1e-5)


def test_layers_that_have_seen_different_numbers_of_tokens_are_refused():
    model, tokens = tiny_model("llama"), tiny_tokens(30)
    cache = make_prompt_cache(model)
    lm.prefill(model, tokens, cache)
    assert isinstance(cache[1], KVCache)
    cache[1].trim(3)
    with pytest.raises(MismatchError, match="layer 1 holds 27 tokens, but 30 were given"):
        taken_from(model, cache, tokens)

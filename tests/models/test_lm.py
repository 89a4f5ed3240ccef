"""A cache taken out of a model and put back is the same cache: the model's next logits do not change by one bit."""

import dataclasses

import mlx.core as mx
import numpy as np
import pytest
from conftest import TINY, save_model, tiny_config, tiny_model, tiny_tokens
from mlx_lm import load as mlx_lm_load
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from mlxkv import lm
from mlxkv.dump import read_dump, write_dump
from mlxkv.errors import InputError, MismatchError, ModelNotFoundError, UnsupportedError
from mlxkv.lm import loading, running
from mlxkv.models import cache_spec
from mlxkv.spec import CacheSpec, Slot

# MLX multiplies by experts in float32 only on the CPU; what is cached does not depend on them.
WITHOUT_EXPERTS = {
    "qwen3_moe": {"mlp_only_layers": [0, 1]},
    "lfm2_moe": {"num_dense_layers": 4},
    "glm4_moe_lite": {"n_routed_experts": None},
}
ONE_LAYER = CacheSpec("llama", ((Slot("keys", 1, 4), Slot("values", 1, 4)),))


def logits_along(model, cache, tokens):
    """The logits after each of `tokens`, `[len(tokens), vocabulary]`."""
    return mx.stack([model(mx.array([[token]]), cache=cache)[0, -1] for token in tokens])


def live_and_dump(model, tokens):
    """A live cache holding `tokens`, the logits after them, and the dump taken from it."""
    cache = make_prompt_cache(model)
    logits = lm.prefill(model, tokens, cache)
    return cache, logits, lm.extract_cache(cache, cache_spec(model), [tokens], fingerprint=lm.fingerprint(model))


def one_layer_cache(value, dtype, length=3):
    """A live cache of one layer, every element `value`."""
    cache = KVCache()
    array = mx.full((1, 1, length, 4), value, dtype=dtype)
    cache.update_and_fetch(array, array)
    return [cache]


# Taking a cache out


@pytest.mark.parametrize("length", [1, 100, 256, 257])
def test_dump_holds_exactly_the_tokens_run_not_steps_of_256(length):
    tokens = tiny_tokens(length)
    taken = lm.dump(tiny_model("llama"), tokens)
    assert taken.length == taken.k.shape[3] == taken.v.shape[3] == length
    assert taken.tokens.tolist() == [tokens]
    assert np.abs(taken.k).max(axis=(0, 2, 4)).min() > 0, "a position holds only zeros"


def test_dump_includes_the_tokens_that_mlx_lm_generates_greedily(tiny):
    prompt = tiny_tokens(30)
    expected = [token for token, _ in generate_step(mx.array(prompt), tiny, max_tokens=6)]
    taken = lm.dump(tiny, prompt, max_tokens=6)
    assert taken.tokens.tolist() == [prompt + expected]
    assert taken.k.shape[3] == 36


def test_generation_ends_at_a_stop_token_which_stays_out_of_the_dump():
    model, prompt = tiny_model("llama"), tiny_tokens(30)
    free = lm.dump(model, prompt, max_tokens=8).tokens[0, 30:].tolist()
    stop = free[-1]
    first = free.index(stop)
    taken = lm.dump(model, prompt, max_tokens=8, stop=[stop])
    assert taken.tokens[0, 30:].tolist() == free[:first]
    assert taken.k.shape[3] == 30 + first < 38


def test_prefill_in_small_chunks_gives_the_same_cache(tiny, monkeypatch):
    tokens = tiny_tokens(100)
    whole = lm.dump(tiny, tokens, dtype="float32")
    monkeypatch.setattr(running, "PREFILL_CHUNK", 7)
    steps = []
    chunked = lm.dump(tiny, tokens, dtype="float32", progress=steps.append)
    assert steps == [7] * 14 + [2]
    assert np.abs(chunked.k - whole.k).max() < 1e-4
    assert np.abs(chunked.v - whole.v).max(initial=0) < 1e-4
    for key, state in whole.states.items():
        assert np.abs(chunked.states[key] - state).max() < 1e-4


def test_progress_counts_every_token_once():
    steps = []
    lm.dump(tiny_model("llama"), tiny_tokens(300), max_tokens=3, progress=steps.append)
    assert sum(steps) == 303


def test_an_empty_prompt_is_refused():
    with pytest.raises(InputError, match="the prompt is empty"):
        lm.dump(tiny_model("llama"), [])


def test_tokens_that_do_not_match_the_cache_are_refused():
    with pytest.raises(MismatchError, match="holds 3 tokens, but 2 were given"):
        lm.extract_cache(one_layer_cache(1.0, mx.float32), ONE_LAYER, [[1, 2]])


def test_a_rotating_cache_is_refused_because_it_drops_tokens():
    model = tiny_model("llama")
    cache = [RotatingKVCache(max_size=8) for _ in model.layers]
    lm.prefill(model, tiny_tokens(4), cache)
    with pytest.raises(UnsupportedError, match="layer 0 keeps a RotatingKVCache"):
        lm.extract_cache(cache, cache_spec(model), [tiny_tokens(4)])


@pytest.mark.parametrize(
    ("value", "live", "stored"),
    [
        (0.1, mx.float16, np.float16),
        (1.5, mx.bfloat16, np.float16),
        (1.5, mx.float32, np.float16),
        (1e-30, mx.bfloat16, np.float32),  # float16 would make it 0
        (1e5, mx.bfloat16, np.float32),  # and this infinite
        (0.1, mx.float32, np.float32),
    ],
)
def test_auto_stores_float16_only_when_nothing_is_lost(value, live, stored):
    taken = lm.extract_cache(one_layer_cache(value, live), ONE_LAYER, [[1, 2, 3]])
    assert taken.k.dtype == taken.v.dtype == stored
    assert taken.k.flat[0] == mx.array(value, dtype=live).item()
    assert f"mlx.core.{taken.dtype}" == str(live)


def test_float16_refuses_values_beyond_its_range_and_takes_its_largest():
    assert (
        lm.extract_cache(one_layer_cache(65504.0, mx.float32), ONE_LAYER, [[1, 2, 3]], dtype="float16").k.max() == 65504
    )
    with pytest.raises(InputError, match="65504"):
        lm.extract_cache(one_layer_cache(-7e4, mx.float32), ONE_LAYER, [[1, 2, 3]], dtype="float16")


def test_a_storage_type_other_than_the_three_is_refused():
    with pytest.raises(InputError, match="'bfloat16'"):
        lm.dump(tiny_model("llama"), [1], dtype="bfloat16")


# Putting it back


@pytest.mark.parametrize("through", ["memory", "a file"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", sorted(TINY))
def test_a_restored_cache_continues_with_identical_logits(name, dtype, through, tmp_path):
    model = tiny_model(name, **({} if dtype == "float32" else WITHOUT_EXPERTS.get(name, {})))
    model.set_dtype(getattr(mx, dtype))
    live, logits, taken = live_and_dump(model, tiny_tokens(70))
    assert taken.dtype == dtype
    if through == "a file":
        write_dump(tmp_path / "cache.npz", taken)
        taken = read_dump(tmp_path / "cache.npz")
    restored = lm.restore(model, taken)
    token = int(mx.argmax(logits).item())
    for _ in range(5):  # greedily
        expected = logits_along(model, live, [token])
        assert mx.array_equal(logits_along(model, restored, [token]), expected)
        token = int(mx.argmax(expected).item())


@pytest.mark.parametrize("length", [256, 300])
def test_a_cache_longer_than_one_step_continues_with_identical_logits(tiny, length):
    live, _, taken = live_and_dump(tiny, tiny_tokens(length))
    restored = lm.restore(tiny, taken)
    assert mx.array_equal(logits_along(tiny, restored, [5, 6, 7]), logits_along(tiny, live, [5, 6, 7]))


@pytest.mark.parametrize("part", ["k", "v", "0.0", "2.0"])
def test_every_part_of_a_dump_reaches_the_logits(part):
    model = tiny_model("lfm2")
    live, _, taken = live_and_dump(model, tiny_tokens(70))
    (taken.states if part in taken.states else vars(taken))[part] *= 0.99
    restored = lm.restore(model, taken)
    assert not mx.array_equal(logits_along(model, restored, [5]), logits_along(model, live, [5]))


def test_a_batch_of_two_is_taken_and_restored(tiny):
    tokens = [tiny_tokens(20, seed=1), tiny_tokens(20, seed=2)]
    cache = make_prompt_cache(tiny)
    tiny(mx.array(tokens), cache=cache)
    taken = lm.extract_cache(cache, cache_spec(tiny), tokens)
    assert taken.k.shape[1] == 2
    step = mx.array([[5], [6]])
    assert mx.array_equal(tiny(step, cache=lm.restore(tiny, taken)), tiny(step, cache=cache))


def test_restoring_leaves_the_dump_unchanged_for_the_next_time(tiny):
    taken = lm.dump(tiny, tiny_tokens(20))
    first = logits_along(tiny, lm.restore(tiny, taken), [5, 6])
    assert taken.length == 20
    assert mx.array_equal(logits_along(tiny, lm.restore(tiny, taken), [5, 6]), first)


def test_a_dump_of_other_weights_is_refused():
    taken = lm.dump(tiny_model("llama"), [1, 2, 3], name="the first")
    with pytest.raises(MismatchError, match="made by the first with fingerprint"):
        lm.restore(tiny_model("llama", seed=9), taken)


def test_a_dump_of_another_geometry_is_refused_even_without_fingerprint():
    taken = dataclasses.replace(lm.dump(tiny_model("llama"), [1, 2, 3]), fingerprint="")
    with pytest.raises(MismatchError, match="layers, heads or rotation differ"):
        lm.restore(tiny_model("llama", rope_theta=5e5), taken)


@pytest.mark.parametrize("dtype", ["load", "int32", ""])
def test_a_dump_that_claims_an_impossible_live_type_is_refused(dtype):
    model = tiny_model("llama")
    with pytest.raises(MismatchError, match="dtype"):
        lm.restore(model, dataclasses.replace(lm.dump(model, [1, 2, 3]), dtype=dtype))


@pytest.mark.parametrize("key", ["1.0", "9.0", "0.1", "0", "x.y", "-2.0"])
def test_a_state_that_the_model_does_not_keep_is_refused(key):
    model = tiny_model("lfm2")  # layers 0 and 2 are convolutions with one state each
    taken = lm.dump(model, [1, 2, 3])
    taken.states[key] = taken.states["0.0"]
    with pytest.raises(MismatchError, match=rf"states \['{key}'\]"):
        lm.restore(model, taken)


def test_a_dump_that_lost_a_convolution_state_is_refused():
    model = tiny_model("lfm2_moe")
    taken = lm.dump(model, [1, 2, 3])
    del taken.states["2.0"]
    with pytest.raises(MismatchError, match=r"states \['2\.0'\]"):
        lm.restore(model, taken)


# Fingerprints


def test_fingerprint_is_the_same_after_float16_weights_are_widened(tiny):
    tiny.set_dtype(mx.float16)
    half = lm.fingerprint(tiny)
    tiny.set_dtype(mx.float32)
    assert lm.fingerprint(tiny) == half


def test_fingerprint_changes_with_any_layers_weights():
    model = tiny_model("qwen3")
    before = lm.fingerprint(model)
    norm = model.layers[1].self_attn.k_norm
    norm.weight = norm.weight + 0.01
    assert lm.fingerprint(model) != before
    assert before == lm.fingerprint(tiny_model("qwen3"))


# Loading


@pytest.mark.parametrize("model_dir", sorted(TINY), indirect=True)
def test_a_local_directory_loads_with_its_tokenizer(model_dir):
    model, tokenizer = lm.load(str(model_dir))
    text = "  naïve\n\t你好 🙂 42"
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert lm.dump(model, tokens).length == len(tokens) == len(text.encode())


def test_weights_become_float32_where_there_is_no_gpu(tmp_path):
    if mx.default_device() != mx.cpu:
        pytest.skip("this machine has a GPU: weights keep their type")
    model = tiny_model("llama", vocab_size=264)
    model.set_dtype(mx.bfloat16)
    save_model(model, tiny_config("llama", vocab_size=264), tmp_path)
    loaded, _ = lm.load(str(tmp_path))
    assert loaded.layers[0].self_attn.k_proj.weight.dtype == mx.float32
    assert lm.fingerprint(loaded) == lm.fingerprint(model)


@pytest.mark.parametrize("name", ["no-such-model", "./no/such", "/no/such/model", "a/b/c"])
def test_a_missing_directory_is_named_with_what_is_allowed(name):
    with pytest.raises(ModelNotFoundError, match=rf"no model directory '{name}'; give a local path, a hub id"):
        lm.load(name)


def test_a_hub_that_does_not_answer_is_told_with_what_to_look_at(monkeypatch):
    def fail(_):
        raise OSError("no route")

    monkeypatch.setattr(loading, "mlx_lm_load", fail)
    with pytest.raises(
        ModelNotFoundError, match="cannot load 'org/name': no route; is the id right, and is there a network"
    ):
        lm.load("org/name")


def test_a_bundled_model_is_named_to_mlx_lm_by_its_folder_and_any_other_as_it_is():
    folder = lm.name_for_mlx_lm("miniature/qwen3")
    assert mlx_lm_load(folder)[0].model_type == "qwen3"
    for name in ("org/name", "./folder", "miniature/none", ""):
        assert lm.name_for_mlx_lm(name) == name


def test_a_directory_without_config_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"cannot load .*config"):
        lm.load(str(tmp_path))


def test_a_hub_id_without_a_hub_is_refused_with_the_reason(tmp_path, monkeypatch):
    # Both are read when huggingface_hub is imported, so the environment alone comes too late.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFoundError, match=r"cannot load 'mlxkv-test/absent': .{20}"):
        lm.load("mlxkv-test/absent")

"""Any model's cache is described by watching one small run; adapters say the same."""

import dataclasses
import sys
import threading
from importlib import import_module

import mlx.core as mx
import pytest
from conftest import TINY, tiny_model
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from zoo.build import build

from mlxkv.errors import UnsupportedError
from mlxkv.models import adapters, cache_spec, discovery, probe
from mlxkv.models.discovery import discover
from mlxkv.spec import Rope


def without_gain(layer):
    """A layer whose rotations have no gain: it is applied before a rotation, so a run does not show it as a part of one."""
    slots = [
        slot if slot.rope is None else dataclasses.replace(slot, rope=dataclasses.replace(slot.rope, gain=1.0))
        for slot in layer
    ]
    return dataclasses.replace(layer, keys=slots[0], values=slots[1])


def kinds(name):
    return [
        None if layer is None else (layer.use, layer.latent, layer.window, layer.selects)
        for layer in cache_spec(build(name)).layers
    ]


SCALED = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 12}


@pytest.mark.parametrize("name", TINY)
def test_an_adapter_and_a_watched_run_say_the_same(name):
    assert adapters.find(name) is not None
    model = tiny_model(name)
    assert cache_spec(model) == discover(model, name)


@pytest.mark.parametrize(
    "config", [{"rope_scaling": SCALED}, {"rope_scaling": LLAMA3}, {"rope_traditional": True}, SLIDING]
)
def test_they_do_for_rotations_with_tables_and_for_windows(config):
    model = tiny_model("llama", **config)
    adapted, found = cache_spec(model), discover(model, "llama")
    assert [without_gain(layer) for layer in adapted.layers] == list(found.layers)
    assert adapted.stream("k").ropes[0] is not None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gemma3_text", [("seam", False, 12, False)] * 2 + [("seam", False, None, False)]),
        ("deepseek_v32", [("fetch", True, None, True), None]),
        ("minimax_m3_vl", [("seam", False, None, False), ("seam", False, None, True), None]),
        ("longcat_flash", [("seam", True, None, False)] * 4),
        ("gemma2", [("fetch", False, None, False)] * 2),
        ("kimi_linear", [None]),
        ("mimo_v2_flash", [("seam", False, None, False)]),
    ],
)
def test_what_a_layer_is_follows_from_what_the_model_does_with_it(name, expected):
    assert kinds(name)[: len(expected)] == expected


def test_layers_that_share_a_cache_are_fetched():
    uses = {layer.use for layer in cache_spec(build("gemma3n")).layers}
    assert uses == {"seam", "fetch"}


def test_a_rotation_within_expanded_keys_is_found_by_its_numbers():
    spec = cache_spec(build("deepseek_v2"))
    rope = spec.layers[0].keys.rope
    assert (rope.offset, rope.dims, spec.layers[0].keys.dim) == (16, 8, 24)


def test_keys_that_are_normed_after_the_rotation_count_as_not_rotated():
    assert set(cache_spec(build("hunyuan")).stream("k").ropes) == {None}


@pytest.mark.parametrize("name", ["qwen3_next", "gemma3_text", "deepseek_v32", "gemma4"])
def test_a_run_leaves_the_model_and_mlx_as_they_were(name):
    model = build(name)
    module = import_module(type(model).__module__)
    before = [(key, id(value)) for key, value in tree_flatten(model.parameters())]
    attributes = [(part, set(vars(part))) for _, part in model.named_modules()]
    functions = mx.fast.rope, getattr(module, probe.ATTENTION, None)
    key = mx.array(mx.random.state[0])
    discovery.discover(model, name)
    assert [(key, id(value)) for key, value in tree_flatten(model.parameters())] == before
    assert all(set(vars(part)) == names for part, names in attributes)
    assert (mx.fast.rope, getattr(module, probe.ATTENTION, None)) == functions
    assert mx.array_equal(mx.random.state[0], key)


@pytest.mark.parametrize("name", ["qwen2", "gemma3_text", "gpt_oss", "olmo3"])
def test_numbers_are_computed_only_where_the_cache_does_not_get_the_rotation_itself(name, monkeypatch):
    monkeypatch.setattr(discovery, "_agree", lambda *_: pytest.fail("a model was computed to compare numbers"))
    assert all(layer.keys.rope is not None for layer in cache_spec(build(name)).layers)


def test_a_model_is_run_once(monkeypatch):
    model, runs = build("qwen2"), []
    run = probe.run
    monkeypatch.setattr(probe, "run", lambda model: runs.append(model) or run(model))
    assert cache_spec(model) == cache_spec(model)
    assert len(runs) == 1


def test_a_model_that_is_gone_is_forgotten():
    model = build("qwen2")
    cache_spec(model)
    key = id(model)
    assert key in discovery._known
    del model
    import gc

    gc.collect()
    assert key not in discovery._known


def test_another_thread_that_generates_meanwhile_is_not_taken_for_the_run():
    model, other, stop = build("phi3"), build("qwen2"), threading.Event()

    def generate():
        cache = make_prompt_cache(other)
        while not stop.is_set():
            mx.eval(other(mx.array([[1, 2, 3]]), cache=cache))

    thread = threading.Thread(target=generate)
    thread.start()
    try:
        found = probe.run(model)
    finally:
        stop.set()
        thread.join()
    assert all(len(each.attentions) == 2 for each in found.passes)


def test_a_rotation_is_one_of_the_caches_own_positions():
    rope = cache_spec(build("glm4")).stream("k").ropes[0]
    assert isinstance(rope, Rope)
    assert rope.traditional


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mamba", "keeps a key/value cache"),
        ("rwkv7", "keeps a key/value cache"),
        ("deepseek_v41", "keeps a key/value cache"),
    ],
)
def test_a_model_without_keys_and_values_is_refused_with_the_reason(name, reason):
    with pytest.raises(UnsupportedError, match=reason):
        cache_spec(build(name))


def test_a_model_that_cannot_run_is_refused_with_what_it_raised(monkeypatch):
    model = build("qwen2")
    monkeypatch.setattr(
        type(model), "__call__", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no back-end here"))
    )
    with pytest.raises(UnsupportedError, match=r"its cache: no back-end here$"):
        cache_spec(model)
    assert not hasattr(sys.modules[type(model).__module__].scaled_dot_product_attention, "__wrapped__")

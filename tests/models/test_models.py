"""Adapters describe what mlx-lm really caches: checked against live caches and against the keys before rope."""

import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import TINY, tiny_model, tiny_tokens
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlxkv import models
from mlxkv.errors import UnsupportedError
from mlxkv.lm import dump, prefill
from mlxkv.models import available, cache_spec, read_rope
from mlxkv.registry import Registry
from mlxkv.spec import CacheSpec

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {"type": "longrope", "original_max_position_embeddings": 128, "short_factor": [1.0] * 4,
            "long_factor": [1.0, 1.5, 2.0, 4.0]}  # fmt: skip
ROPES = {
    "llama3": ("llama", {"rope_scaling": LLAMA3}),
    "linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "traditional": ("llama", {"rope_traditional": True}),
    "longrope": ("llama", {"rope_scaling": LONGROPE}),
    "proportional": ("llama", {"rope_scaling": {"rope_type": "proportional", "partial_rotary_factor": 0.5}}),
    "yarn": ("qwen3", {"rope_scaling": YARN}),
    "rope_parameters": ("qwen3", {"rope_theta": None, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, **YARN}}),
    "mla yarn": ("glm4_moe_lite", {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}}),
}  # fmt: skip
EVERY_ROPE = {**{name: (name, {}) for name in TINY if name != "gpt2"}, **ROPES}


def attention_of(layer):
    return layer.attn if hasattr(layer, "attn") else getattr(layer, "self_attn", None)


def keys_before_rope(model, tokens):
    """What each attention layer hands to its rope as keys, `[layers, B, H, T, D]`; the queries come first."""
    calls = []
    for layer in filter(attention_of, model.layers):
        rope = attention_of(layer).rope
        record = SimpleNamespace(inputs=[])
        calls.append(record.inputs)

        def recorder(x, offset=0, *, rope=rope, record=record):
            record.inputs.append(x)
            return rope(x, offset)

        attention_of(layer).rope = recorder
    prefill(model, tokens, make_prompt_cache(model))
    return np.stack([np.array(mx.concatenate(inputs[1::2], axis=2)) for inputs in calls])


@pytest.fixture(params=sorted(EVERY_ROPE))
def roped(request):
    """A tiny model for each architecture and each kind of rope that mlx-lm builds."""
    name, overrides = EVERY_ROPE[request.param]
    return tiny_model(name, **overrides)


def test_spec_says_what_a_prefill_puts_into_the_cache(tiny):
    spec, cache = cache_spec(tiny), make_prompt_cache(tiny)
    prefill(tiny, tiny_tokens(5), cache)
    found = tuple(
        tuple((array.shape[1], array.shape[3]) for array in entry.keys_and_values()) if type(entry) is KVCache else None
        for entry in cache
    )
    assert found == tuple(slots and tuple((slot.heads, slot.dim) for slot in slots) for slots in spec.layers)


def test_spec_names_the_mlx_lm_module_and_survives_json(tiny):
    spec = cache_spec(tiny)
    assert spec.model_type == tiny.args.model_type
    assert CacheSpec.from_json(spec.to_json()) == spec


def test_lfm2_caches_only_its_attention_layers():
    for name in ("lfm2", "lfm2_moe"):
        assert cache_spec(tiny_model(name)).attention_layers == (1, 3)


def test_unrotated_keys_are_the_keys_before_rope_in_every_layer(roped):
    tokens = tiny_tokens(300)  # more than one prefill chunk
    stream, taken = cache_spec(roped).stream("k"), dump(roped, tokens, dtype="float32")
    before = keys_before_rope(roped, tokens)
    for rope, keys, expected in zip(stream.ropes, taken.k, before):
        rotated = slice(rope.offset, rope.offset + rope.dims)
        unrotated = np.array(rope.unrotate(mx.array(keys)))
        assert np.abs(unrotated[..., rotated] - expected).max() < 2e-5 * np.abs(expected).max()
        assert np.abs(keys[..., rotated] - expected).max() > 0.1 * np.abs(expected).max(), "rope did nothing"
        assert np.array_equal(unrotated[..., : rope.offset], keys[..., : rope.offset])


def test_rotating_again_gives_the_dumped_keys(roped):
    taken = dump(roped, tiny_tokens(40), dtype="float32")
    for rope, keys in zip(taken.spec.stream("k").ropes, taken.k):
        again = np.array(rope.rotate(rope.unrotate(mx.array(keys))))
        assert np.abs(again - keys).max() < 1e-5 * np.abs(keys).max()


def test_unrotated_first_layer_keys_of_one_token_are_the_same_at_all_positions(roped):
    taken = dump(roped, [7] * 200, dtype="float32")
    rope = taken.spec.stream("k").ropes[0]
    settled = 2  # LFM2's first attention layer comes after a convolution over three tokens
    for keys, same in ((taken.k[0], False), (np.array(rope.unrotate(mx.array(taken.k[0]))), True)):
        spread = np.ptp(keys[:, :, settled:], axis=2).max()
        assert (spread < 1e-4) == same, f"keys differ by {spread} over positions"


def test_gpt2_keys_are_not_rotated():
    model = tiny_model("gpt2")
    assert cache_spec(model).stream("k").ropes == (None, None)
    # Learned positions enter before the keys; without them the first layer's keys know no position at all.
    model.model.wpe.weight = mx.zeros_like(model.model.wpe.weight)
    assert np.ptp(dump(model, [7] * 50, dtype="float32").k[0], axis=2).max() < 1e-5


def test_values_are_never_rotated(tiny):
    assert set(cache_spec(tiny).stream("v").ropes) == {None}


def test_dynamic_ntk_rope_is_refused_because_it_cannot_be_undone():
    model = tiny_model("llama", rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(UnsupportedError, match="DynamicNTKScalingRoPE"):
        cache_spec(model)
    assert read_rope(nn.RoPE(8, base=5e5)).base == 5e5


def test_quantized_weights_give_the_same_spec(tiny):
    plain = cache_spec(tiny)

    def divisible(_, module):
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0

    nn.quantize(tiny, group_size=32, bits=4, class_predicate=divisible)
    assert any(isinstance(module, nn.QuantizedLinear) for module in tiny.modules()), "nothing was quantized"
    assert cache_spec(tiny) == plain
    assert dump(tiny, tiny_tokens(3)).spec == plain


def test_qwen3_30b_a3b_caches_48_layers_of_4_heads_of_128():
    model = tiny_model("qwen3_moe", num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
                       hidden_size=16, moe_intermediate_size=16, num_experts=2, num_experts_per_tok=1, rope_theta=1e6)  # fmt: skip
    taken = dump(model, [1, 2, 3])
    assert taken.k.shape == taken.v.shape == (48, 1, 4, 3, 128)
    assert {(rope.dims, rope.base, rope.traditional) for rope in taken.spec.stream("k").ropes} == {(128, 1e6, False)}


def test_glm_4_7_flash_caches_47_layers_of_one_stream_and_no_values():
    model = tiny_model("glm4_moe_lite", num_hidden_layers=47, num_attention_heads=2, kv_lora_rank=512,
                       qk_rope_head_dim=64, qk_nope_head_dim=192, v_head_dim=256, hidden_size=16)  # fmt: skip
    taken = dump(model, [1, 2, 3])
    assert taken.spec.mode == "single_stream"
    assert (taken.k.shape, taken.v.shape) == ((47, 1, 1, 3, 576), (47, 1, 1, 3, 0))
    ropes = {(rope.offset, rope.dims, rope.base, rope.traditional) for rope in taken.spec.stream("k").ropes}
    assert ropes == {(512, 64, 1e6, True)}


def test_lfm2_8b_a1b_caches_6_of_its_24_layers():
    attention = [2, 6, 10, 14, 18, 21]
    kinds = ["full_attention" if i in attention else "conv" for i in range(24)]
    model = tiny_model("lfm2_moe", num_hidden_layers=24, layer_types=kinds, hidden_size=512, num_attention_heads=8,
                       num_key_value_heads=8, intermediate_size=32, num_experts=2)  # fmt: skip
    taken = dump(model, [1, 2, 3])
    assert taken.k.shape == taken.v.shape == (6, 1, 8, 3, 64)
    assert list(taken.spec.attention_layers) == attention
    assert set(taken.states) == {f"{i}.0" for i in range(24) if i not in attention}
    assert {(rope.dims, rope.base, rope.traditional) for rope in taken.spec.stream("k").ropes} == {(64, 1e6, False)}


def test_sliding_window_layers_are_described_with_their_window_and_dumped_with_it():
    model = tiny_model("llama", layer_types=["full_attention", "sliding_attention"], sliding_window=8)
    spec, taken = cache_spec(model), dump(model, tiny_tokens(21))
    assert (spec.attention_layers, spec.window_layers) == ((0,), (1,))
    assert (taken.k.shape[3], taken.others["1.k"].shape[3]) == (21, 8)


@pytest.fixture
def fresh_adapters(monkeypatch):
    """A registry that has not looked at its folder yet; the adapters imported before are not in it."""
    monkeypatch.setattr(models, "adapters", Registry("model adapter", "mlxkv.models", "mlxkv.models"))
    yield
    sys.modules.pop("mlxkv.models.phi3", None)
    vars(models).pop("phi3", None)


PHI3 = """
from mlxkv.models import adapters

@adapters.register("phi3")
def spec(model):
    return ("described", model)
"""


def test_a_new_adapter_is_one_new_file(tmp_path, monkeypatch, fresh_adapters):
    (tmp_path / "phi3.py").write_text(PHI3)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    model = type("Model", (), {"__module__": "mlx_lm.models.phi3"})()
    assert "phi3" in available()
    assert cache_spec(model) == ("described", model)


def test_another_package_adds_an_adapter_by_an_entry_point(tmp_path, monkeypatch, fresh_adapters):
    (tmp_path / "phi3_adapter.py").write_text(PHI3)
    (tmp_path / "phi3_adapter-1.dist-info").mkdir()
    (tmp_path / "phi3_adapter-1.dist-info" / "entry_points.txt").write_text("[mlxkv.models]\nphi3 = phi3_adapter\n")
    (tmp_path / "phi3_adapter-1.dist-info" / "METADATA").write_text("Name: phi3_adapter\nVersion: 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = type("Model", (), {"__module__": "mlx_lm.models.phi3"})()
    try:
        assert cache_spec(model) == ("described", model)
    finally:
        sys.modules.pop("phi3_adapter", None)


def test_every_adapter_file_is_found_documented_and_tested_here():
    files = {path.stem for path in Path(models.__file__).parent.glob("*.py")} - {
        "__init__",
        "discovery",
        "probe",
        "rope",
    }
    assert set(available()) == files
    assert files == set(TINY), "give the new adapter a tiny model in conftest.TINY"
    for name in files:
        adapter = import_module(f"mlxkv.models.{name}")
        assert adapter.__doc__, f"mlxkv/models/{name}.py needs a docstring"
        assert adapter.__doc__.strip(), f"mlxkv/models/{name}.py needs a docstring"
        assert models.adapters.get(name) is adapter.spec

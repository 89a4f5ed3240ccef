"""Models whose linear layers are wrapped by adapters (LoRA, DoRA) keep caches like those of the models within."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import TINY, tiny_model, tiny_tokens
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers

import mlxkv
from mlxkv import lm
from mlxkv.dump import read_dump, write_dump
from mlxkv.errors import UnsupportedError
from mlxkv.models import cache_spec, head_dim


@pytest.fixture(params=[(name, dora) for name in sorted(TINY) for dora in (False, True)], ids=str)
def adapted(request):
    """A tiny model and the same with adapters on all its linear layers, whose weights are not zero."""
    name, dora = request.param
    plain, model = tiny_model(name), tiny_model(name)
    mx.random.seed(3)
    keys = {key for layer in model.layers for key, module in layer.named_modules() if type(module) is nn.Linear}
    config = {"rank": 4, "scale": 8.0, "dropout": 0.0, **({"keys": keys} if dora else {})}
    linear_to_lora_layers(model, len(model.layers), config, use_dora=dora)
    for seed, (_, module) in enumerate(model.named_modules()):
        if "lora_b" in module:
            module.lora_b = 0.1 * mx.random.normal(module.lora_b.shape, key=mx.random.key(seed))
    return plain, model.eval()


def text(model, cache, prompt, tokens=8):
    return [int(token) for token, _ in generate_step(mx.array(prompt), model, prompt_cache=cache, max_tokens=tokens)]


def test_an_adapter_changes_neither_the_shapes_nor_the_rotation_of_a_cache(adapted):
    plain, model = adapted
    assert cache_spec(model) == cache_spec(plain)


def test_a_dump_of_an_adapted_model_comes_back_and_goes_on_alike(adapted, tmp_path):
    plain, model = adapted
    prompt = tiny_tokens(30)
    write_dump(tmp_path / "cache.npz", lm.dump(model, prompt[:-1]))
    taken = read_dump(tmp_path / "cache.npz")
    live = make_prompt_cache(model)
    lm.prefill(model, prompt[:-1], live)
    assert text(model, lm.restore(model, taken), prompt[-1:]) == text(model, live, prompt[-1:])
    with pytest.raises(mlxkv.MlxkvError, match="fingerprint"):
        lm.restore(plain, taken)


def test_live_caches_of_an_adapted_model_write_its_text(adapted):
    _, model = adapted
    prompt = tiny_tokens(30)
    expected = text(model, make_prompt_cache(model), prompt)
    assert text(model, mlxkv.make_cache(model, "full"), prompt) == expected
    assert len(text(model, mlxkv.make_cache(model, "streaming-llm"), prompt)) == len(expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_around_a_quantized_layer_is_read_through(bits):
    model = tiny_model("llama", hidden_size=128)
    expected = cache_spec(model)
    nn.quantize(model, group_size=32, bits=bits)
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 8.0, "dropout": 0.0})
    assert "linear" in model.layers[0].self_attn.k_proj
    assert cache_spec(model) == expected


def test_a_projection_without_a_weight_is_named():
    class Attention(nn.Module):
        n_kv_heads, k_proj = 2, nn.Dropout()

    with pytest.raises(UnsupportedError, match="Dropout of the keys has no weight"):
        head_dim(Attention())

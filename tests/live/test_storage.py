"""float32 values that float16 does not reach: the predictions stay those of a cache whose values are ordinary."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_model, tiny_tokens
from live_checks import METHODS, feed, lone_cache, small, stored

from mlxkv.kernels.bits import bias_and_scale, pack, unpack
from mlxkv.live import make_cache
from mlxkv.spec import CacheSpec, Slot

TOY = CacheSpec("toy", ((Slot("keys", 2, 16), Slot("values", 2, 16)),))


def rescaled(keys, values):
    """A tiny model whose keys and values are so many times as large, and whose predictions are the same."""
    model = tiny_model("llama", num_hidden_layers=1)
    attention = model.layers[0].self_attn
    for inward, outward, factor in (("k_proj", "q_proj", keys), ("v_proj", "o_proj", values)):
        attention[inward].weight = attention[inward].weight * factor
        attention[outward].weight = attention[outward].weight / factor
    return model


def predictions(model, method):
    """Log-probabilities after a prompt of 80 tokens in two chunks, then token by token."""
    tokens, cache = tiny_tokens(88), make_cache(model, method, **small(method))
    rows = [
        model(mx.array([part]), cache=cache)[0] for part in (tokens[:60], tokens[60:80], *([t] for t in tokens[80:]))
    ]
    logits = mx.concatenate(rows)[60:]
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


@pytest.mark.parametrize("factors", [(1e5, 1), (1, 1e5), (1e-6, 1), (1, 1e-6)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_predictions_do_not_depend_on_the_size_of_keys_and_values(method, factors):
    exact = predictions(rescaled(1, 1), "full")
    ordinary, found = (predictions(rescaled(*each), method) for each in ((1, 1), factors))
    usual, kl = (float((mx.exp(exact) * (exact - each)).sum(axis=-1).mean()) for each in (ordinary, found))
    assert kl <= 1.5 * usual + 0.002


@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_that_grows_out_of_float16_is_kept_in_range_and_a_token_is_never_infinite(method):
    cache = lone_cache(method, TOY)
    ordinary, large = mx.random.normal((1, 2, 20, 16)), 3e5 * mx.random.normal((1, 2, 20, 16))
    feed(cache, ordinary, ordinary)
    feed(cache, large[:, :, :1], large[:, :, :1])
    assert all(np.isfinite(stored(cache, slot)).all() for slot in (0, 1))
    feed(cache, large, large)
    feed(cache, ordinary[:, :, :1], ordinary[:, :, :1])
    for slot in (0, 1):
        held = stored(cache, slot)
        assert np.isfinite(held).all()
        assert np.abs(held).max() > 1e5


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_steps_of_the_smallest_float16_values_do_not_vanish(bits):
    x = (mx.arange(64) * 2.0**-24).astype(mx.float16)[None]
    _, scale = bias_and_scale(x, bits, 1, 64)
    assert float(scale[0, 0]) > 0
    error = mx.abs(unpack(pack(x, bits, 1, 64), mx.float32) - x.astype(mx.float32)).max()
    assert float(error) <= 2.0**-24 * max(1, 63 / (2**bits - 1))


def test_float16_tiles_that_span_all_of_float16_are_finite():
    x = mx.array([[-65504.0, 65504.0, 0.0, 1.0]], mx.float16)
    assert mx.isfinite(unpack(pack(x, 2, 1, 4), mx.float32)).all()

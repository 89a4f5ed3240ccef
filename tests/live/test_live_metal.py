"""Live caches on the path that they take on Metal: kernels in one or two launches a layer give what plain operations give."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_model
from metal_host import installed

from mlxkv.live import attach, make_cache


@pytest.mark.parametrize("preset", ["int8", "int4", "kivi-2", "smartkv-0.5", "h2o-96"])
def test_tokens_decoded_by_kernels_are_those_of_plain_operations(preset):
    model = tiny_model("qwen3", num_hidden_layers=1)
    attach(model)
    text = mx.array(np.random.default_rng(0).integers(0, 90, (1, 130)))
    logits = []
    for path in (installed(), None):
        cache = make_cache(model, preset)
        mx.eval(model(text[:, :128], cache=cache))
        with path or np.errstate():
            steps = [model(text[:, i : i + 1], cache=cache) for i in range(128, 130)]
            mx.eval(steps)
        logits.append(mx.concatenate(steps, axis=1))
    np.testing.assert_allclose(*logits, atol=2e-3)

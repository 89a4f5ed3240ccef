"""What `test_plugin.py` runs where the example package is installed. Not collected otherwise."""

import os
from pathlib import Path

import mlx.core as mx
from conftest import tiny_model, tiny_tokens

import mlxkv
from mlxkv.live import LayerCache, live_config, live_methods

SETTINGS = {"sinks": 2, "recent": 8, "step": 3}


def test_every_other_is_found_by_its_name_and_makes_caches():
    model = tiny_model("llama")
    assert "every-other" in live_methods.names()
    caches = mlxkv.make_cache(model, "every-other", **SETTINGS)
    assert all(isinstance(entry, LayerCache) and entry.method_name == "every-other" for entry in caches)
    assert mlxkv.make_cache(model, live_config("every-other", step=3))[0].config.step == 3
    full = mlxkv.make_cache(model, "full")
    for size in (30, 1, 1, 20):
        for each in (caches, full):
            mx.eval(model(mx.array([tiny_tokens(size)]), cache=each))
    kept = [0, 1, *range(2, 44, 3), *range(44, 52)]
    assert (caches[0].offset, caches[0].kept) == (52, len(kept))
    # Keys of the first layer do not depend on what is stored.
    assert mx.array_equal(caches[0].tokens.keys, full[0].keys[:, :, mx.array(kept)].astype(mx.float16))


def test_every_other_is_saved_and_loaded():
    model, path = tiny_model("llama"), Path(os.environ["MLXKV_PLUGIN_CACHE"])
    caches = mlxkv.make_cache(model, "every-other", **SETTINGS)
    mx.eval(model(mx.array([tiny_tokens(60)]), cache=caches))
    mlxkv.save_cache(path, model, caches)
    loaded = mlxkv.load_cache(path, model)
    assert loaded[0].config == caches[0].config
    assert type(loaded[0].tokens) is type(caches[0].tokens)
    following = mx.array([tiny_tokens(5, seed=2)])
    assert mx.array_equal(model(following, cache=loaded), model(following, cache=caches))

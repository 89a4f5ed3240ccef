"""What holds for every codec method: finite caches come back finite, and sizes are estimated before they are made."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import tiny_model, tiny_tokens
from synthetic import DUAL, LATENT, rotated, stream_values, toy_dump, toy_sensitivity

from mlxkv import lm
from mlxkv.codec.calibrate import calibrate, uncalibrated
from mlxkv.codec.methods import codec_methods
from mlxkv.codec.methods.kvtc import KVTCConfig
from mlxkv.codec.methods.kvtc_rd import KVTCRDConfig
from mlxkv.codec.methods.kvtc_weighted import KVTCWeightedConfig
from mlxkv.codec.session import CacheCodec
from mlxkv.dump import write_dump
from mlxkv.spec import STREAMS

LEARNT = {"kvtc": KVTCConfig(12.0), "kvtc-weighted": KVTCWeightedConfig(12.0), "kvtc-rd": KVTCRDConfig()}
METHODS = (*LEARNT, "direct", "exact")
FLOAT16_MAX = 65504.0
SPECS = {"dual": DUAL, "latent": LATENT}


def artifacts_of(folder, method, dumps):
    if method not in LEARNT:
        return uncalibrated(dumps[0].spec, fingerprint=dumps[0].fingerprint, method=method)
    paths = [folder / f"{i}.npz" for i in range(len(dumps))]
    for path, dump in zip(paths, dumps):
        write_dump(path, replace(dump, sensitivity=toy_sensitivity(toy_dump(dump.spec, dump.length))))
    return calibrate(paths, LEARNT[method])


def enormous(spec, seed, length=200):
    """A float16 cache with a channel just below the end of its range, as a rotation of it may be."""
    arrays, random = {}, np.random.default_rng(seed)
    for name in STREAMS:
        values = stream_values(spec.stream(name), 1, length, seed)
        if values.size:
            values[..., :4] = 0
            values[..., 0] = FLOAT16_MAX - np.abs(random.normal(0, 30, values.shape[:-1]))
        arrays[name] = np.clip(rotated(spec, values) if name == "k" else values, -FLOAT16_MAX, FLOAT16_MAX)
    return replace(toy_dump(spec, length), **{name: array.astype(np.float16) for name, array in arrays.items()})


def test_every_method_is_tested_here():
    assert set(codec_methods.names()) == set(METHODS)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("method", METHODS)
def test_a_finite_cache_near_the_end_of_float16_comes_back_finite(tmp_path, method, spec):
    artifacts = artifacts_of(tmp_path, method, [enormous(spec, seed) for seed in (0, 1)])
    dump = enormous(spec, 9)
    assert np.isfinite(dump.k).all()
    for quality in (5, 40) if method in ("kvtc-rd", "direct") else (None,):
        codec = CacheCodec(artifacts, recent=4, quality=quality)
        back = codec.decompress_dump(codec.compress_dump(dump))
        for name in STREAMS:
            found = back.stream(name)
            assert found.dtype == np.float16
            assert np.isfinite(found).all()
            near = np.abs(found[..., 0].astype(np.float64)).max() if found.size else FLOAT16_MAX
            assert near > 0.9 * FLOAT16_MAX


def test_a_wider_dump_of_a_float16_cache_is_restored_finite():
    model = tiny_model("llama")
    dump = lm.dump(model, tiny_tokens(60), dtype="float32")
    beyond = replace(dump, dtype="float16", k=np.full_like(dump.k, 66000), v=np.full_like(dump.v, -1e30))
    cache = lm.restore(model, beyond)
    for layer in dump.spec.attention_layers:
        assert all(np.isfinite(np.array(array)).all() for array in cache[layer].keys_and_values())


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("method", METHODS)
def test_the_size_of_coded_tokens_is_estimated_before_they_are_coded(tmp_path, method, spec):
    artifacts = artifacts_of(tmp_path, method, [toy_dump(spec, seed=seed) for seed in (0, 1)])
    codec, dump = CacheCodec(artifacts, lossless="raw"), toy_dump(spec, length=700, seed=9)
    estimated = codec.coded_bytes(dump, blocks=2)
    assert type(estimated) is float
    made = len(codec.compress_dump(dump)) - codec.fixed_bytes(dump)
    assert estimated == pytest.approx(made, rel=0.15)

"""Small made-up caches for the codec's tests: a few directions carry almost all energy, as in a real cache."""

from dataclasses import replace

import mlx.core as mx
import numpy as np

from mlxkv.codec.calibrate import calibrate
from mlxkv.codec.methods import kvtc_rd
from mlxkv.codec.methods.kvtc import KVTCConfig
from mlxkv.dump import KVDump, write_dump
from mlxkv.spec import STREAMS, CacheSpec, Rope, Slot

ROPE = Rope(8, base=10000.0)
DUAL = CacheSpec("toy", (None, *((Slot("keys", 2, 8, ROPE), Slot("values", 2, 8)),) * 3))
PLAIN = CacheSpec("toy", (None, *((Slot("keys", 2, 8), Slot("values", 2, 8)),) * 3))
PE = Rope(4, base=10000.0, traditional=True)
LATENT = CacheSpec("mla", ((Slot("latent", 1, 20), Slot("k_pe", 1, 4, PE)),) * 2, "single_stream")
DIRECTIONS = 10


def stream_values(stream, batch, length, seed):
    """`[L, B, H, T, D]` float32, not rotated; the directions depend on the stream alone, the rest on the seed."""
    model, random = np.random.default_rng(ord(stream.name)), np.random.default_rng(seed)
    directions = model.standard_normal((DIRECTIONS, stream.width)) * 0.7 ** np.arange(DIRECTIONS)[:, None]
    rows = random.standard_normal((batch * length, DIRECTIONS)) @ directions + model.standard_normal(stream.width)
    rows += 0.005 * random.standard_normal(rows.shape)
    shape = (batch, length, stream.layers, stream.heads, stream.dim)
    return rows.reshape(shape).transpose(2, 0, 3, 1, 4).astype(np.float32)


def rotated(spec, k):
    """Keys turned as an mlx-lm layer does it: by `mx.fast.rope` itself, not by the class under test."""
    flat = mx.array(k.reshape(-1, *k.shape[2:]))
    if spec == DUAL:
        turned = mx.fast.rope(flat, 8, traditional=False, base=10000.0, scale=1.0, offset=0)
    elif spec == LATENT:
        part = mx.fast.rope(flat[..., 20:], 4, traditional=True, base=10000.0, scale=1.0, offset=0)
        turned = mx.concatenate([flat[..., :20], part], axis=-1)
    else:
        turned = flat
    return np.array(turned).reshape(k.shape)


def toy_dump(spec=DUAL, length=300, batch=1, seed=0, dtype=np.float16, fingerprint="f00d.cafe", states=False):
    k = rotated(spec, stream_values(spec.stream("k"), batch, length, seed)).astype(dtype)
    v = stream_values(spec.stream("v"), batch, length, seed + 1000).astype(dtype)
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 50000, (batch, length)).astype(np.int32)
    extra = {"0.0": random.standard_normal((batch, 3, 5)).astype(np.float32)} if states else {}
    return KVDump(k, v, spec, tokens, "a/toy", fingerprint, np.dtype(dtype).name, extra)


def toy_artifacts(folder, spec=DUAL, ratio=4.0, seeds=(0, 1, 2), **settings):
    paths = [folder / f"calibration{seed}.npz" for seed in seeds]
    for seed, path in zip(seeds, paths):
        write_dump(path, toy_dump(spec, seed=seed))
    return calibrate(paths, KVTCConfig(compression_ratio=ratio, **settings))


def toy_sensitivity(dump, seed=0):
    """As mlxkv.sensitivity makes it: made-up matrices, and energies that follow from the keys alone."""
    random, found = np.random.default_rng(seed), {}
    for name in STREAMS:
        stream = dump.spec.stream(name)
        shape = (stream.layers, stream.heads, stream.dim)
        half = random.standard_normal((*shape, stream.dim)) * 4.0 ** -np.arange(stream.layers)[:, None, None, None]
        found[name] = (half @ half.swapaxes(-1, -2)).astype(np.float32)
        energy = np.exp(2 * dump.k[:, 0, :, :, -1].astype(np.float32))  # [L, H, T]; the last dim of a key tells
        energy[..., :4] = 0
        found[f"{name}.energy"] = energy if stream.dim else np.zeros_like(energy)
    return found


def rd_artifacts(folder, spec=PLAIN, seeds=(0, 1, 2), **settings):
    paths = [folder / f"measured{seed}.npz" for seed in seeds]
    for seed, path in zip(seeds, paths):
        dump = toy_dump(spec, seed=seed)
        write_dump(path, replace(dump, sensitivity=toy_sensitivity(dump)))
    return calibrate(paths, kvtc_rd.KVTCRDConfig(**settings))

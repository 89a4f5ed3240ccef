"""Small made-up caches for the codec's tests: a few directions carry almost all energy, as in a real cache."""

from dataclasses import replace

import mlx.core as mx
import numpy as np

from mlxkv.codec.calibrate import calibrate
from mlxkv.codec.methods import kvtc_rd
from mlxkv.codec.methods.kvtc import KVTCConfig
from mlxkv.dump import KVDump, stream_key, write_dump
from mlxkv.spec import STREAMS, CacheSpec, Layer, Rope, Slot

ROPE = Rope(8, base=10000.0)
DUAL = CacheSpec("toy", (None, *((Slot("keys", 2, 8, ROPE), Slot("values", 2, 8)),) * 3))
PLAIN = CacheSpec("toy", (None, *((Slot("keys", 2, 8), Slot("values", 2, 8)),) * 3))
PE = Rope(4, base=10000.0, traditional=True)
LATENT = CacheSpec("mla", ((Slot("latent", 1, 20), Slot("k_pe", 1, 4, PE)),) * 2, "single_stream")
DIRECTIONS = 10

# Caches whose layers are not all alike: shapes, windows, latents beside keys, keys without values, values wider than keys.
_FULL = (Slot("keys", 2, 8, ROPE), Slot("values", 2, 8))
_WIDE = (Slot("keys", 1, 16, Rope(8, base=100.0)), Slot("values", 1, 24))
_WINDOW = Layer(Slot("keys", 1, 16, Rope(8, base=500.0)), Slot("values", 1, 16), window=40)
GROUPED = {
    "window": CacheSpec("toy", (None, _WINDOW, _WINDOW, _FULL, _WINDOW, _FULL)),
    "shapes": CacheSpec("toy", (_FULL, _WIDE, _FULL, None)),
    "all windows": CacheSpec("toy", (_WINDOW, _WINDOW, replace(_WINDOW, window=25))),
    "latent and keys": CacheSpec(
        "mla", (Layer(*LATENT.layers[0], latent=True), Layer(Slot("keys", 2, 8, ROPE), Slot("values", 2, 0)))
    ),
}  # fmt: skip


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


def by_rope(stream, k):
    """Keys of each layer turned as mlx-lm does it, from position 0 on."""
    turned = k.copy()
    for layer, rope in enumerate(stream.ropes):
        if rope is not None:
            part = slice(rope.offset, rope.offset + rope.dims)
            settings = {"traditional": rope.traditional, "base": rope.base, "scale": rope.scale, "offset": 0}
            turned[layer, ..., part] = np.array(
                mx.fast.rope(mx.array(np.ascontiguousarray(k[layer, ..., part])), rope.dims, **settings)
            )
    return turned


def grouped_dump(spec, length=300, batch=1, seed=0, dtype=np.float16, states=False, of=None):
    """A dump of several groups of layers, of the first tokens of a text of so many.

    Windows hold the newest tokens; keys are rotated from the beginning of the text.
    """
    arrays, of = {}, of or length
    for index, group in enumerate(spec.groups):
        for name in STREAMS:
            stream = group.stream(name)
            values = by_rope(stream, stream_values(stream, batch, of, seed + 2000 * index + 1000 * (name == "v")))
            arrays[stream_key(index, name)] = values[..., length - group.rows(length) : length, :].astype(dtype)
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 50000, (batch, of)).astype(np.int32)[:, :length]
    extra = {"0.0": random.standard_normal((batch, 3, 5)).astype(np.float32)} if states else {}
    rings = {i: 1 + length % g.window for i, g in enumerate(spec.groups) if g.window and length > g.window}
    k, v, kind = arrays.pop("k"), arrays.pop("v"), np.dtype(dtype).name
    return KVDump(k, v, spec, tokens, "a/toy", "f00d.cafe", kind, extra, others=arrays, rings=rings)


def grouped_sensitivity(dump, seed=0):
    """Made-up matrices and energies of all groups, of tokens 4 to 3/4 of the text."""
    random, found = np.random.default_rng(seed), {}
    counted = np.zeros(dump.length, np.float32)
    counted[4 : 3 * dump.length // 4] = 1
    for index, group in enumerate(dump.spec.groups):
        for name in STREAMS:
            stream, key = group.stream(name), stream_key(index, name)
            half = random.standard_normal((stream.layers, stream.heads, stream.dim, stream.dim))
            found[key] = (half @ half.swapaxes(-1, -2)).astype(np.float32)
            energy = np.exp(random.standard_normal((stream.layers, stream.heads, dump.length)))
            found[f"{key}.energy"] = (energy * counted * bool(stream.dim)).astype(np.float32)
    return found


def grouped_artifacts(folder, spec, config, seeds=(0, 1, 2), **options):
    """Artifacts of any method, learnt from dumps of several groups with a sensitivity."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"grouped{seed}.npz" for seed in seeds]
    for seed, path in zip(seeds, paths):
        dump = grouped_dump(spec, seed=seed, **options)
        write_dump(path, replace(dump, sensitivity=grouped_sensitivity(dump)))
    return calibrate(paths, config)


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

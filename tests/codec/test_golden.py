"""Files of format version 1 that every later mlxkv must read, on every platform.

All arithmetic in them is exact: the mean is 0, the basis picks coordinates, and coefficients lie on grids of powers
of two. After a deliberate change of format: MLXKV_REGENERATE_GOLDEN=1 pytest tests/codec/test_golden.py
"""

import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxkv.codec import writing
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.methods.kvtc import KVTCStream
from mlxkv.codec.session import CacheCodec
from mlxkv.codec.stages.plan import Group, Plan
from mlxkv.dump import KVDump
from mlxkv.io.container import Reader
from mlxkv.spec import CacheSpec, Slot

FOLDER = Path(__file__).parents[1] / "fixtures" / "golden"
SPEC = CacheSpec("golden", (None, *((Slot("keys", 1, 40), Slot("values", 1, 16)),) * 2))
PLANS = {
    "k": Plan(
        (Group(16, "int4"), Group(16, "int4"), Group(16, "int2"), Group(7, "none"), Group(16, "fp8"), Group(1, "int2"))
    ),
    "v": Plan((Group(16, "fp8"), Group(1, "int4"), Group(1, "fp8"))),
}
BATCH, LENGTH, SINKS, RECENT, BLOCK = 2, 15, 2, 3, 4
E4M3 = np.array([448, 416, 240, 104, 64, 32, 16, 8])  # all of them E4M3 numbers


def group_values(random, tokens, group):
    """Coefficients `[tokens, size]` that the group's kind codes without error, minimum and maximum included."""
    shift = random.integers(-32, 32, (tokens, 1)) / 8
    if group.kind == "none":
        return np.zeros((tokens, group.size))
    if group.size == 1:
        return shift
    if group.kind == "fp8":
        pairs = np.concatenate([E4M3, -E4M3]) * 2.0 ** -random.integers(4, 8, (tokens, 1))
        return random.permuted(pairs, axis=1) + shift
    top = 3 if group.kind == "int2" else 15
    codes = random.integers(0, top + 1, (tokens, group.size))
    codes[:, 0], codes[:, 1] = 0, top
    return random.permuted(codes, axis=1) * 2.0 ** -random.integers(1, 5, (tokens, 1)) + shift


def stream_artifacts(name):
    width, rank = SPEC.stream(name).width, PLANS[name].rank
    picked = np.random.default_rng(ord(name)).permutation(width)[:rank]
    return KVTCStream(np.zeros(width, np.float32), np.eye(width, dtype=np.float16)[:, picked], PLANS[name])


def golden_artifacts():
    meta = {"method": "kvtc", "model": "golden", "model_fingerprint": "f00d"}
    return CalibrationArtifacts(stream_artifacts("k"), stream_artifacts("v"), SPEC, meta)


def golden_dump():
    random, arrays = np.random.default_rng(0), {}
    for name in "kv":
        stream, part = SPEC.stream(name), stream_artifacts(name)
        coefficients = np.concatenate(
            [group_values(random, BATCH * LENGTH, group) for group in part.plan.groups], axis=1
        )
        rows = (coefficients @ part.V.T.astype(np.float64)).reshape(
            BATCH, LENGTH, stream.layers, stream.heads, stream.dim
        )
        array = rows.transpose(2, 0, 3, 1, 4)
        for ends in (array[..., :SINKS, :], array[..., LENGTH - RECENT :, :]):
            ends[...] = random.standard_normal(ends.shape)
        arrays[name] = np.ascontiguousarray(array).astype(np.float16)
        assert np.array_equal(arrays[name][..., SINKS : LENGTH - RECENT, :], array[..., SINKS : LENGTH - RECENT, :])
    tokens = random.integers(0, 50000, (BATCH, LENGTH)).astype(np.int32)
    states = {"0.0": random.standard_normal((BATCH, 3, 5)).astype(np.float32)}
    return KVDump(arrays["k"], arrays["v"], SPEC, tokens, "golden", "f00d", "float16", states)


@pytest.fixture(scope="module", autouse=True)
def regenerated():
    if os.environ.get("MLXKV_REGENERATE_GOLDEN") != "1":
        return
    dump, artifacts = golden_dump(), golden_artifacts()
    artifacts.save(FOLDER / "artifacts", overwrite=True)
    with pytest.MonkeyPatch.context() as patch:
        (FOLDER / "cache.mlxkv").write_bytes(encode(patch, artifacts, dump))
    np.savez(FOLDER / "expected.npz", k=dump.k, v=dump.v, tokens=dump.tokens, state=dump.states["0.0"])


def encode(patch, artifacts, dump):
    patch.setattr(writing, "BLOCK_ROWS", BLOCK * BATCH)  # several blocks in a small file
    return CacheCodec(artifacts, recent=RECENT, sinks=SINKS).compress_dump(dump)


@pytest.fixture
def expected():
    with np.load(FOLDER / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture
def artifacts():
    return CalibrationArtifacts.from_dir(FOLDER / "artifacts")


def test_the_fixtures_are_small():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert len(files) == 9
    assert sum(path.stat().st_size for path in files) < 100_000


def test_the_old_file_decodes_to_exactly_what_was_written(artifacts, expected):
    dump = CacheCodec(artifacts).decompress_dump(FOLDER / "cache.mlxkv")
    for name, found in {"k": dump.k, "v": dump.v, "tokens": dump.tokens, "state": dump.states["0.0"]}.items():
        assert found.dtype == expected[name].dtype
        assert np.array_equal(found, expected[name]), name
    assert (dump.model, dump.fingerprint, dump.dtype, dump.spec) == ("golden", "f00d", "float16", SPEC)


def test_the_old_file_has_the_documented_sections(artifacts):
    with Reader(FOLDER / "cache.mlxkv") as reader:
        assert reader.header["layout"] == {"batch": BATCH, "length": LENGTH, "s": SINKS, "w": RECENT, "block": BLOCK}
        assert reader.header["artifacts"] == artifacts.fingerprint == golden_artifacts().fingerprint
        assert set(reader.sections) == {
            *("k.sink", "v.sink", "k.window", "v.window", "tokens", "state.0.0"),
            *("k.0", "v.0", "k.1", "v.1", "k.2", "v.2"),
        }


@pytest.mark.parametrize("kind", [np.array, mx.array], ids=["numpy", "mlx"])
def test_the_same_cache_is_encoded_to_the_same_sections_again(monkeypatch, artifacts, expected, kind):
    monkeypatch.setattr(writing, "BLOCK_ROWS", BLOCK * BATCH)
    codec = CacheCodec(artifacts, recent=RECENT, sinks=SINKS)
    extras = {"tokens": expected["tokens"], "state.0.0": expected["state"]}
    blob = codec.compress([kind(x) for x in expected["k"]], [kind(x) for x in expected["v"]], extras=extras)
    with Reader(blob) as new, Reader(FOLDER / "cache.mlxkv") as old:
        assert set(new.sections) == set(old.sections)
        for name in old.sections:
            assert new.read(name) == old.read(name), name
        for key in ("method", "artifacts", "layout", "dtype", "raw"):
            assert new.header[key] == old.header[key]


def test_the_artifacts_hold_what_they_were_built_from(artifacts):
    for name in "kv":
        found, built = artifacts.stream(name), stream_artifacts(name)
        assert np.array_equal(found.mu, built.mu)
        assert np.array_equal(found.V, built.V)
        assert found.plan == PLANS[name]
    assert artifacts.spec == SPEC

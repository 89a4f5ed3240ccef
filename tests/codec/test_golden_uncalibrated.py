"""Files of `direct` and `exact` that every later mlxkv must read without any artifacts. Integers exactly.

After a deliberate change of format: MLXKV_REGENERATE_GOLDEN=1 pytest tests/codec/test_golden_uncalibrated.py
"""

import os
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
from synthetic import GROUPED, grouped_dump

from mlxkv.codec import writing
from mlxkv.codec.calibrate import read_uncalibrated, uncalibrated
from mlxkv.codec.session import CacheCodec
from mlxkv.codec.stages import entropy
from mlxkv.dump import stream_key
from mlxkv.io.container import Reader
from mlxkv.spec import STREAMS, CacheSpec

FOLDER = Path(__file__).parents[1] / "fixtures" / "golden_uncalibrated"
SPEC = CacheSpec("toy", tuple(x and replace(x, window=x.window and 24) for x in GROUPED["window"].layers))
LENGTH, SINKS, RECENT, BLOCK, QUALITY = 40, 2, 5, 16, 37.5
FINGERPRINTS = {"direct": "09529b5bd97afe018b78d11b5592d7cb", "exact": "5575b317cb21574d13975d30615e8adc"}
TABLES = "2a9ac12ce5d8cde49e1628ca26864577"


def golden_dump():
    return grouped_dump(SPEC, length=LENGTH, seed=9)


@pytest.fixture(scope="module", autouse=True)
def regenerated():
    if os.environ.get("MLXKV_REGENERATE_GOLDEN") != "1":
        return
    for method in FINGERPRINTS:
        quality = QUALITY if method == "direct" else None
        artifacts = uncalibrated(SPEC, model="a/toy", fingerprint="f00d.cafe", method=method)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writing, "BLOCK_ROWS", BLOCK)
            blob = CacheCodec(artifacts, recent=RECENT, sinks=SINKS, quality=quality).compress_dump(golden_dump())
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / f"{method}.mlxkv").write_bytes(blob)
        back = CacheCodec(artifacts).decompress_dump(blob)
        with Reader(blob) as reader:
            found = integers(reader, artifacts) if method == "direct" else {}
        np.savez(FOLDER / f"{method}.npz", tokens=back.tokens, **arrays(back), **found)


def arrays(dump):
    return {f"cache.{stream_key(g, name)}": dump.stream(name, g) for g in range(2) for name in STREAMS}


def integers(reader, artifacts):
    """The integers of each coded section."""
    found = {}
    for name in set(reader.sections) - set(reader.header["raw"]):
        group, stream, block = name.split(".", 2) if name[0].isdigit() else ("0", *name.split(".", 1))
        layout = reader.header["groups"][0] if group == "1" else reader.header["layout"]
        tokens = TOKENS[layout["length"], block]
        found[name] = artifacts.coder(int(group))._unpack(stream, reader.read(name), tokens).integers
    return found


# By length of the group and name of the block.
TOKENS = {
    (40, "0"): 16,
    (40, "1"): 16,
    (40, "2"): 1,
    (40, "window.0"): 5,
    (24, "0"): 16,
    (24, "1"): 3,
    (24, "window.0"): 5,
}


@pytest.mark.parametrize("method", FINGERPRINTS)
def test_the_old_file_decodes_to_the_same_cache(method):
    with Reader(FOLDER / f"{method}.mlxkv") as reader, np.load(FOLDER / f"{method}.npz") as expected:
        artifacts = read_uncalibrated(reader)
        assert artifacts.fingerprint == FINGERPRINTS[method]
        assert artifacts.spec == SPEC
        if method == "direct":
            found = integers(reader, artifacts)
            assert len(found) == 14
            for name, array in found.items():
                assert np.array_equal(array, expected[name]), name
            assert (reader.header["quality"], reader.header["window_quality"]) == (QUALITY, QUALITY + 10)
        dump = CacheCodec(artifacts).decompress_dump(FOLDER / f"{method}.mlxkv")
        assert np.array_equal(dump.tokens, golden_dump().tokens)
        for name, array in arrays(dump).items():
            if method == "exact":
                assert array.tobytes() == expected[name].tobytes()
            else:
                np.testing.assert_allclose(array.astype(float), expected[name], rtol=2e-3, atol=2e-3)


def test_the_tables_of_direct_are_the_same_on_every_machine():
    assert blake2b(entropy.even_tables().astype("<u2").tobytes(), digest_size=16).hexdigest() == TABLES


def test_the_fixtures_are_small_and_of_exact_the_cache_itself():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 100_000
    with np.load(FOLDER / "exact.npz") as expected:
        for name, array in arrays(golden_dump()).items():
            assert array.tobytes() == expected[name].tobytes()

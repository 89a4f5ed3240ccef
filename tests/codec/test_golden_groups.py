"""A file of full layers and a window, and its artifacts, that every later mlxkv must read, to rounding.

After a deliberate change of format: MLXKV_REGENERATE_GOLDEN=1 pytest tests/codec/test_golden_groups.py
"""

import os
from pathlib import Path

import numpy as np
import pytest
from synthetic import GROUPED, grouped_artifacts, grouped_dump

from mlxkv.codec import writing
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.methods.kvtc import KVTCConfig
from mlxkv.codec.session import CacheCodec
from mlxkv.io.container import Reader

FOLDER = Path(__file__).parents[1] / "fixtures" / "golden_groups"
LENGTH, SINKS, RECENT, BLOCK, WINDOW = 60, 2, 5, 16, 40
FINGERPRINT = "aec1784551e0080ff0f93fccf2e396a5"


@pytest.fixture(scope="module", autouse=True)
def regenerated(tmp_path_factory):
    if os.environ.get("MLXKV_REGENERATE_GOLDEN") != "1":
        return
    made = grouped_artifacts(tmp_path_factory.mktemp("golden"), GROUPED["window"], KVTCConfig(6.0))
    made.save(FOLDER / "artifacts", overwrite=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "BLOCK_ROWS", BLOCK)
        codec = CacheCodec(made, recent=RECENT, sinks=SINKS)
        (FOLDER / "cache.mlxkv").write_bytes(codec.compress_dump(grouped_dump(made.spec, LENGTH, seed=9)))
    back = CacheCodec(made).decompress_dump(FOLDER / "cache.mlxkv")
    np.savez(FOLDER / "expected.npz", k=back.k, v=back.v, tokens=back.tokens, **back.others)


@pytest.fixture
def artifacts():
    return CalibrationArtifacts.from_dir(FOLDER / "artifacts")


def test_the_old_file_decodes_to_the_same_cache(artifacts):
    assert artifacts.fingerprint == FINGERPRINT
    found = CacheCodec(artifacts).decompress_dump(FOLDER / "cache.mlxkv")
    assert found.rings == {1: 1 + LENGTH % WINDOW}
    with np.load(FOLDER / "expected.npz") as expected:
        assert np.array_equal(found.tokens, expected["tokens"])
        for name, array in {"k": found.k, "v": found.v, **found.others}.items():
            np.testing.assert_allclose(array.astype(float), expected[name], rtol=2e-3, atol=2e-3)


def test_the_old_file_has_the_documented_sections():
    with Reader(FOLDER / "cache.mlxkv") as reader:
        assert reader.header["layout"] == {"batch": 1, "length": LENGTH, "s": SINKS, "w": RECENT, "block": BLOCK}
        moved = {"batch": 1, "length": WINDOW, "s": 0, "w": RECENT, "block": BLOCK, "start": LENGTH - WINDOW}
        assert reader.header["groups"] == [moved]
        assert reader.header["meta"]["rings"] == {"1": 1 + LENGTH % WINDOW}
        blocks = {
            group: [f"{group}{name}.{i}" for i in range(count) for name in "kv"]
            for group, count in (("", 4), ("1.", 3))
        }
        rest = ["k.window", "v.window", "1.k.sink", "1.v.sink", "1.k.window", "1.v.window", "tokens"]
        assert list(reader.sections) == ["k.sink", "v.sink", *blocks[""], *blocks["1."], *rest]


def test_the_fixtures_are_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 100_000
